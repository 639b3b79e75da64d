"""An oracle for sessions: what a script of calls and interventions computes, by a plain loop that knows no engine.

It uses the compiler (the same captured graph, cut at the same sites, in the ``plain`` variant) and draws tokens with
:mod:`djinn_fx.runtime.sampling`. Everything else is its own: the KV tensors, the steps, the arithmetic of edits. It
keeps nothing between two questions: every answer is computed from the session's first token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from djinn_fx.passes.context import Lower
from djinn_fx.passes.lower import lower_eager
from djinn_fx.passes.pipeline import CaptureStore, build, discover
from djinn_fx.passes.source import prepare
from djinn_fx.program import LOGITS, Program, kv_name
from djinn_fx.runtime.sampling import SamplingSpec, sample
from djinn_fx.sites import Site
from djinn_fx.specs import Edit, Positions, ProgramShape
from tests.edits import speaks_of, steered

#: A place in a session: the first position of a step, and the order of a site in it (-1: before the first).
Place = tuple[int, int]
#: Whether to stop at a site: gets the step, the site and its value after steering.
Watch = Callable[["Step", Site, Tensor], bool]


@dataclass(frozen=True)
class Call:
    """One call; ``cut`` is where it was abandoned: positions computed, and tokens that the session kept."""

    kind: Literal["forward", "generate"]
    tokens: tuple[int, ...]
    new: int = 0
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    ends: frozenset[int] = frozenset()
    cut: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Change:
    """Steering of one site from a place on; no edit: what steered it ends. ``key`` names the handle."""

    place: Place
    site: str
    edit: Edit | None
    key: int = 0


@dataclass(frozen=True, eq=False)
class Script:
    """All that decides what a session holds.

    Attributes:
        calls: in order.
        seeds: ``(position, seed)``: tokens drawn from that position on are drawn with that seed.
        changes: of the steering, in order.
        values: what was put in the place of a site's value, by the step's first position and the site.
        forced: tokens that are not drawn, by position, since they were drawn before something else was changed.
    """

    calls: tuple[Call, ...] = ()
    seeds: tuple[tuple[int, int], ...] = ((0, 0),)
    changes: tuple[Change, ...] = ()
    values: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)
    forced: Mapping[int, int] = field(default_factory=dict)


@dataclass
class Step:
    """One step, as far as it came; ``logits`` ``[kept, vocab]`` once it is complete."""

    index: int
    start: int
    tokens: list[int]
    sampled: list[bool]
    last_prompt: int
    shape: ProgramShape
    values: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    def positions(self, site: Site) -> range:
        """Positions that a site's value covers: all, or those that reach the head."""
        alone = site.axis == "kept" and self.shape.keep < self.shape.query
        return range(self.stop - 1 if alone else self.start, self.stop)

    def chosen(self, positions: Positions, site: Site) -> list[bool]:
        """For each position of a site's value, whether ``positions`` speaks of it."""
        return [
            speaks_of(positions, at, self.sampled[at - self.start], self.last_prompt) for at in self.positions(site)
        ]


@dataclass
class Played:
    """A session, as far as its script was played. ``kv`` are ``k, v`` of each layer, ``[heads, length, dim]``."""

    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    length: int = 0
    steps: list[Step] = field(default_factory=list)
    kv: list[Tensor] = field(default_factory=list)
    #: Where the watch stopped it: the step and the site; the value before anything was put in its place.
    stop: tuple[Step, Site, Tensor] | None = None
    paused: bool = False
    finished: bool = False
    reason: str | None = None
    #: Of the last call: where its own tokens begin and end, its first step, the logits behind each drawn token.
    span: tuple[int, int] = (0, 0)
    first: int = 0
    drawn: list[Tensor] = field(default_factory=list)


class Oracle:
    """Plays scripts on one model; ``lower`` compiles its segments, ``grouped`` is for decode steps of 16-bit models."""

    def __init__(
        self,
        model: nn.Module,
        *,
        length: int,
        chunk: int,
        rank: int,
        eos: Iterable[int] = (),
        lower: Lower = lower_eager,
        grouped: bool = False,
    ) -> None:
        self.lower, self.grouped = lower, grouped
        self.source, self.store = prepare(model), CaptureStore()
        self.table = discover(self.source, self.store)
        self.length, self.chunk, self.rank, self.eos = length, chunk, rank, frozenset(eos)
        self._programs: dict[object, Program] = {}

    def play(
        self,
        script: Script,
        sites: Sequence[Site],
        *,
        rows: int = 1,
        pause: tuple[int, int] | None = None,
        watch: Watch | None = None,
    ) -> Played:
        """Play a script.

        Args:
            script: what to play.
            sites: where the program is cut.
            rows: batch rows of a decode step; all but the first are dead.
            pause: stop in the last call before the step at which so many positions are computed, so many tokens known.
            watch: stop in the last call where it says so.
        """
        with torch.no_grad():
            return self.player()(self, script, tuple(sites), rows, pause, watch).whole()

    def player(self) -> type[Play]:
        """What plays one script."""
        return Play

    def arenas(self) -> list[tuple[Tensor, Tensor]]:
        """Empty KV of one session and of the dead rows, with a position for pads."""

        def empty(heads: int, dim: int) -> Tensor:
            return torch.zeros(2, heads, self.length + 1, dim, dtype=self.source.dtype, device=self.source.device)

        return [(empty(kv.heads, kv.key_dim), empty(kv.heads, kv.value_dim)) for kv in self.source.kv]

    def program(self, shape: ProgramShape, sites: tuple[Site, ...]) -> Program:
        key = (shape, tuple(site.name for site in sites))
        if key not in self._programs:
            self._programs[key] = build(
                self.source,
                shape,
                sites=sites,
                variant="plain",
                rank=1,
                arenas=self.arenas(),
                lower=self.lower,
                store=self.store,
                grouped=self.grouped and shape.query == 1,
            )
        return self._programs[key]


class Play:
    """One script, played from its first token on; the last arena row is for dead batch rows."""

    def __init__(
        self,
        oracle: Oracle,
        script: Script,
        sites: tuple[Site, ...],
        rows: int,
        pause: tuple[int, int] | None,
        watch: Watch | None,
    ) -> None:
        self.oracle, self.script, self.sites, self.rows = oracle, script, sites, rows
        self.pause, self.watch = pause, watch
        self.out, self.logits = Played(), torch.empty(0)
        self.arenas = oracle.arenas()

    def whole(self) -> Played:
        out = self.out
        for index, call in enumerate(self.script.calls, 1):
            self._call(call, index == len(self.script.calls))
        out.kv = [tensor[0, :, : out.length].clone() for pair in self.arenas for tensor in pair]
        return out

    def _call(self, call: Call, last: bool) -> None:
        out = self.out
        begin, known = out.length, len(out.tokens)
        out.tokens += call.tokens
        out.sampled += [False] * len(call.tokens)
        out.span, out.first, out.drawn = (known, len(out.tokens)), len(out.steps), []
        out.finished, out.reason = False, None
        while not out.finished:
            if call.cut is not None and out.length == call.cut[0]:
                self._cut(call, call.cut[1])
            elif last and (out.length, len(out.tokens)) == self.pause:
                out.paused = True
                return
            elif out.length == len(out.tokens):
                self._draw(call)
            elif not self._step(call, begin, last):
                return

    def _cut(self, call: Call, kept: int) -> None:
        out = self.out
        if kept > len(out.tokens):
            self._draw(call)
        del out.tokens[kept:], out.sampled[kept:]
        out.finished, out.reason = True, "closed"

    def _step(self, call: Call, begin: int, last: bool) -> bool:
        """One step; False if the watch stopped in it."""
        out, size = self.out, self.oracle.chunk
        start, stop, shape = out.length, len(out.tokens), ProgramShape(self.rows, 1, 1)
        if stop - start > 1 or not out.sampled[start]:
            stop = min(stop, begin + ((start - begin) // size + 1) * size)
            query = min(size, max(16, 1 << (stop - start - 1).bit_length()))
            shape = ProgramShape(1, query, query if call.kind == "forward" else 1)
        own = out.span[1] > out.span[0]
        tokens, sampled = out.tokens[start:stop], out.sampled[start:stop]
        step = Step(len(out.steps), start, tokens, sampled, out.span[1] - 1 if own else -1, shape)
        out.steps.append(step)
        if not self._run(step, last):
            return False
        assert step.logits is not None
        out.length, self.logits = stop, step.logits[-1]
        if out.length == len(out.tokens):
            if call.kind == "generate":
                self._draw(call)
            else:
                out.finished = True
        return True

    def _run(self, step: Step, last: bool) -> bool:
        program = self.oracle.program(step.shape, self.sites)
        env = {kv_name(i, part): t for i, pair in enumerate(self.arenas) for part, t in zip("kv", pair, strict=True)}
        env |= self._inputs(step)
        for segment in program.segments:
            given = [env[name] if name in env else program.weights[name] for name in segment.inputs]
            env.update(zip(segment.outputs, segment.run(*given), strict=True))
            if segment.site is not None and not self._pass(step, segment.site, env, last):
                return False
        step.logits = env[LOGITS][0, : len(step.tokens) if step.shape.keep == step.shape.query else 1].clone()
        return True

    def _inputs(self, step: Step) -> dict[str, Tensor]:
        shape, count = step.shape, len(step.tokens)
        tokens, positions = torch.zeros(2, shape.rows, shape.query, dtype=torch.int64)
        tokens[0, :count] = torch.tensor(step.tokens)
        positions[0, :count] = torch.arange(step.start, step.stop)
        spare = len(self.arenas[0][0]) - 1
        rows, lengths = torch.full((shape.rows,), spare), torch.zeros(shape.rows, dtype=torch.int64)
        rows[0], lengths[0] = 0, step.stop
        made = {"tokens": tokens, "positions": positions, "rows": rows, "lengths": lengths}
        if shape.keep < shape.query:
            made["keep"] = torch.zeros(shape.rows, 1, dtype=torch.int64)
            made["keep"][0] = count - 1
        return {name: tensor.to(self.oracle.source.device) for name, tensor in made.items()}

    def _pass(self, step: Step, site: Site, env: dict[str, Tensor], last: bool) -> bool:
        """Go past a site: steer, maybe stop there, put a given value in its place."""
        count = len(step.positions(site))
        whole = env[site.name].clone()
        place, edit = (step.start, site.order), None
        for change in self.script.changes:
            if change.site == site.name and change.place < place:
                edit = change.edit
        if edit is not None:
            # With the pads, as the program does it: on a GPU the size of a tensor decides how its rows are summed.
            chosen = [*step.chosen(edit.positions, site), *[False] * (whole.shape[1] - count)]
            whole[0] = self._steered(step, site, whole[0], edit, chosen)
        value = whole[0, :count].clone()
        if last and self.watch is not None and self.watch(step, site, value):
            self.out.stop = (step, site, value)
            return False
        value = self.script.values.get((step.start, site.name), value)
        step.values[site.name] = value.clone()
        whole[0, :count] = value
        env[site.name] = whole
        return True

    def _steered(self, step: Step, site: Site, value: Tensor, edit: Edit, chosen: list[bool]) -> Tensor:
        return steered(value, edit, chosen, self.oracle.rank)

    def _draw(self, call: Call) -> None:
        out, place = self.out, len(self.out.tokens)
        out.drawn.append(self.logits)
        token = self.script.forced.get(place)
        if token is None:
            token = self._choose(call.sampling, place)
        out.tokens.append(token)
        out.sampled.append(True)
        if token in self.oracle.eos:
            out.reason = "eos"
        elif token in call.ends:
            out.reason = "stop_token"
        elif len(out.tokens) - out.span[1] >= call.new or out.length >= self.oracle.length:
            out.reason = "length"
        out.finished = out.reason is not None

    def _choose(self, sampling: SamplingSpec, place: int) -> int:
        if not sampling.do_sample:
            logits = self.logits.tolist()
            numbers = [number for number in logits if not math.isnan(number)]
            return logits.index(max(numbers)) if numbers else 0
        seed = [seed for first, seed in self.script.seeds if first <= place][-1]
        seeds, places = torch.tensor([[seed], [place]], device=self.logits.device)
        return int(sample(self.logits[None], sampling, seeds, places))
