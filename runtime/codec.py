"""Sessions as plain data: JSON-able dicts and named tensors, no pickle.

What depends on one engine is written without it: the order of a site as its name, the key of a steering handle as a
number that the reading engine replaces by one of its own. Objects that many steps share (edits, tensors, the mappings
of what is in force) are written once and are shared again after reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from djinn_fx.runtime.breakpoints import ArmedBreakpoint
from djinn_fx.runtime.plain import Plain, Predicate, Reader, Writer, read_positions, write_positions
from djinn_fx.runtime.results import StepRecord
from djinn_fx.runtime.run import RunOptions
from djinn_fx.runtime.sampling import SamplingSpec
from djinn_fx.runtime.snapshot import FlightState, RunState, SessionState, StopState
from djinn_fx.runtime.steering import Armed, RankPart
from djinn_fx.runtime.steps import Steering, Step
from djinn_fx.specs import Breakpoint, Edit, Feature, ProgramShape


class Encoder(Writer):
    """Writes one session."""

    def __init__(self, names: Mapping[int, str]) -> None:
        """``names``: every site's name by its order."""
        super().__init__()
        self._names = names
        self._armed: dict[int, tuple[Armed, int]] = {}
        self._edits: list[Plain] = []
        self._states: dict[tuple[int, ...], int] = {}

    def session(self, state: SessionState) -> Plain:
        """A whole session."""
        made: Plain = {
            "seed": state.seed,
            "tokens": list(state.tokens),
            "sampled": [int(drawn) for drawn in state.sampled],
            "length": state.length,
            "last_logits": self.value(state.last_logits),
            "steering": self.steering(state.steering),
            "journal": [self.step(step) for step in state.journal],
            "run": None if state.run is None else self.run(state.run),
        }
        # Last: the lines above fill them.
        made["edits"] = self._edits
        made["states"] = [list(members) for members in self._states]
        return made

    def run(self, state: RunState) -> Plain:
        """A run with its step in the air."""
        flight = state.flight
        return {
            "options": self.options(state.options),
            "span": list(state.span),
            "first_step": state.first_step,
            "breakpoints": [self.breakpoint(point) for point in state.breakpoints],
            "capture": list(state.capture),
            "records": [self.record(record) for record in state.records],
            "finished": state.finished,
            "finish_reason": state.finish_reason,
            "stopped_early": state.stopped_early,
            "flight": None if flight is None else self.flight(flight),
        }

    def flight(self, state: FlightState) -> Plain:
        """A step in the air and the stop in it."""
        stop, at = state.stop, None
        if stop is not None:
            at = {**self.fields(stop, without=("fired",)), "fired": list(stop.fired)}
        return {"step": self.step(state.step), "passed": self._site(state.passed), "stop": at}

    def step(self, step: Step) -> Plain:
        """One step."""
        return {
            "start": step.start,
            "tokens": list(step.tokens),
            "sampled": [int(drawn) for drawn in step.sampled],
            "last_prompt": step.last_prompt,
            "shape": [step.shape.rows, step.shape.query, step.shape.keep],
            "steering": [[self._site(after), self.steering(edits)] for after, edits in step.steering],
            "injections": {site: self.value(value) for site, value in step.injections.items()},
        }

    def steering(self, edits: Steering) -> int:
        """Index of what is in force; equal mappings get one entry."""
        members = tuple(self.armed(armed) for armed in edits.values())
        return self._states.setdefault(members, len(self._states))

    def armed(self, armed: Armed) -> int:
        """Index of an edit in force, written once."""
        if id(armed) not in self._armed:
            self._armed[id(armed)] = (armed, len(self._edits))
            made = self.fields(armed, without=("edit", "rank"))
            made["edit"] = self.edit(armed.edit)
            made["rank"] = None if armed.rank is None else self.fields(armed.rank)
            self._edits.append(made)
        return self._armed[id(armed)][1]

    def edit(self, edit: Edit) -> Plain:
        """An edit as the user wrote it; its tensors are copied, since they are the user's."""
        made = self.fields(edit, without=("feature", "positions"), own=True)
        made["feature"] = None if edit.feature is None else self.fields(edit.feature, own=True)
        made["positions"] = write_positions(edit.positions)
        return made

    def breakpoint(self, point: ArmedBreakpoint) -> Plain:
        """An armed breakpoint."""
        spec = point.spec
        return {
            "site": spec.site,
            "when": None if spec.when is None else self.predicate(spec.when),
            "positions": write_positions(spec.positions),
            "times": spec.times,
            "sites": sorted(point.sites),
            "left": point.left,
        }

    def options(self, options: RunOptions) -> Plain:
        """A run's options, without the callback."""
        made = self.fields(options, without=("sampling", "stop_token_ids", "on_token"))
        made["sampling"] = self.fields(options.sampling)
        made["stop_token_ids"] = sorted(options.stop_token_ids)
        return made

    def record(self, record: StepRecord) -> Plain:
        """What one committed step gave its run."""
        made = self.fields(record, without=("captured",))
        made["captured"] = {site: self.value(value) for site, value in record.captured.items()}
        return made

    def _site(self, order: int) -> str | None:
        """The name of the site of an order; -1 lies before every site and becomes None."""
        return None if order < 0 else self._names[order]


class Decoder(Reader):
    """Reads what an :class:`Encoder` wrote; the inverse, method by method."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        functions: Mapping[str, Predicate],
        device: torch.device,
        orders: Callable[[str], int],
        fresh_key: Callable[[], int],
    ) -> None:
        """``orders``: a site's order by its name; ``fresh_key``: a new identity for a steering handle."""
        super().__init__(tensors, functions, device)
        self._orders, self._fresh_key = orders, fresh_key
        self._keys: dict[int, int] = {}
        self._states: list[Steering] = []

    def session(self, made: Plain) -> SessionState:
        """A whole session."""
        edits = [self.armed(one) for one in made["edits"]]
        self._states = [{edits[i].edit.site: edits[i] for i in members} for members in made["states"]]
        return SessionState(
            seed=made["seed"],
            tokens=tuple(made["tokens"]),
            sampled=tuple(map(bool, made["sampled"])),
            length=made["length"],
            last_logits=self.value(made["last_logits"]),
            steering=self._states[made["steering"]],
            journal=tuple(self.step(step) for step in made["journal"]),
            run=None if made["run"] is None else self.run(made["run"]),
        )

    def run(self, made: Plain) -> RunState:
        """A run with its step in the air."""
        begin, start, end = made["span"]
        return RunState(
            options=self.options(made["options"]),
            span=(begin, start, end),
            first_step=made["first_step"],
            breakpoints=tuple(self.breakpoint(point) for point in made["breakpoints"]),
            capture=tuple(made["capture"]),
            records=tuple(self.record(record) for record in made["records"]),
            finished=made["finished"],
            finish_reason=made["finish_reason"],
            stopped_early=made["stopped_early"],
            flight=None if made["flight"] is None else self.flight(made["flight"]),
        )

    def flight(self, made: Plain) -> FlightState:
        """A step in the air and the stop in it."""
        at, stop = made["stop"], None
        if at is not None:
            stop = StopState(fired=tuple(at["fired"]), **self.values(at, without=("fired",)))
        return FlightState(self.step(made["step"]), self._order(made["passed"]), stop)

    def step(self, made: Plain) -> Step:
        """One step."""
        rows, query, keep = made["shape"]
        return Step(
            start=made["start"],
            tokens=tuple(made["tokens"]),
            sampled=tuple(map(bool, made["sampled"])),
            last_prompt=made["last_prompt"],
            shape=ProgramShape(rows, query, keep),
            steering=tuple((self._order(after), self._states[index]) for after, index in made["steering"]),
            injections=self.values(made["injections"]),
        )

    def armed(self, made: Plain) -> Armed:
        """An edit in force; an old key becomes the same new key wherever it stands."""
        old, rank = made["key"], made["rank"]
        if old not in self._keys:
            self._keys[old] = self._fresh_key()
        return Armed(
            key=self._keys[old],
            edit=self.edit(made["edit"]),
            scale=self.value(made["scale"]),
            add=self.value(made["add"]),
            rank=None if rank is None else RankPart(**self.values(rank)),
        )

    def edit(self, made: Plain) -> Edit:
        """An edit as the user wrote it."""
        feature = made["feature"]
        return Edit(
            **self.values(made, without=("feature", "positions"), own=True),
            feature=None if feature is None else Feature(**self.values(feature, own=True)),
            positions=read_positions(made["positions"]),
        )

    def breakpoint(self, made: Plain) -> ArmedBreakpoint:
        """An armed breakpoint."""
        when = None if made["when"] is None else self.predicate(made["when"])
        spec = Breakpoint(made["site"], when, read_positions(made["positions"]), made["times"])
        return ArmedBreakpoint(spec, frozenset(made["sites"]), made["left"])

    def options(self, made: Plain) -> RunOptions:
        """A run's options; the callback is gone."""
        return RunOptions(
            **self.values(made, without=("sampling", "stop_token_ids")),
            sampling=SamplingSpec(**self.values(made["sampling"])),
            stop_token_ids=frozenset(made["stop_token_ids"]),
        )

    def record(self, made: Plain) -> StepRecord:
        """What one committed step gave its run."""
        return StepRecord(**self.values(made, without=("captured",)), captured=self.values(made["captured"]))

    def _order(self, site: str | None) -> int:
        return -1 if site is None else self._orders(site)
