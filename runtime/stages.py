"""Stages: chunk programs over static buffers, on CUDA each segment one CUDA graph.

A prompt chunk runs segment by segment, since it may stop after each. Launched one kernel at a time that costs the host
more than the device; replayed it costs a launch a segment. The values of the chunk that is *on* a stage lie in the
stage's buffers. Another chunk that needs the stage sends it off: what it has computed is copied out, and copied back
in when it goes on. So any number of sessions may stand in the middle of a prompt, and the one that runs is fast.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from djinn_fx.program import Program
from djinn_fx.runtime.copies import Inbox, copy_all
from djinn_fx.runtime.modes import outside_inference, without_grad
from djinn_fx.runtime.segments import Env, run_segments
from djinn_fx.runtime.tables import BatchRow, int_views, neutral_tables, write_ints, write_steering
from djinn_fx.specs import ProgramShape, TableSpec, Variant

#: Bytes that the buffers of a model's stages may take together.
LIMIT = 512 << 20


@dataclass(eq=False)
class Chunk:
    """A prompt chunk in flight: its program, its values and the next segment to run.

    Attributes:
        program: the program.
        env: values by environment name: its own tensors, or those of the stage it is on.
        row: what it computes, and in which row of the arena.
        next_segment: index of the segment that runs next.
        stage: the stage it is on, or None.
        wanted: sites whose values will be asked for after later ones were reached; None: any.
    """

    program: Program
    env: Env
    row: BatchRow
    next_segment: int = 0
    stage: Stage | None = None
    wanted: frozenset[str] | None = None
    _saved: dict[str, torch.Tensor] | None = field(default=None, repr=False)

    @property
    def complete(self) -> bool:
        """Whether every segment has run."""
        return self.next_segment == len(self.program.segments)

    def put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Replace some of its values; what follows is computed from them."""
        self._saved = None
        if self.stage is None:
            self.env.update(values)
        else:
            copy_all([self.env[name] for name in values], list(values.values()))

    @without_grad
    def leave(self) -> None:
        """Take its values off the stage it is on, as copies of its own that nobody overwrites.

        What its row says need not be copied: it gets that anew when it comes back.
        """
        if self.stage is None:
            return
        self.save()
        self.env, self.stage, self._saved = {**self.stage.shared, **(self._saved or {})}, None, None

    @without_grad
    def save(self) -> None:
        """Copy now what :meth:`leave` would have to: whoever comes onto the stage then does not wait for it."""
        if self.stage is not None and self._saved is None:
            with outside_inference():
                self._saved = {name: self.env[name].clone() for name in self._needed()}

    def moved_on(self, until: int) -> None:
        """The segments below ``until`` have run."""
        if until > self.next_segment:
            self.next_segment, self._saved = until, None

    def _needed(self) -> list[str]:
        """What of the segments' results somebody will still read."""
        done = self.program.segments[: self.next_segment]
        made = [name for segment in done for name in segment.outputs]
        if self.wanted is None or not done:
            return made
        alive = {value.name for value in done[-1].live}.union(done[-1].outputs, self.wanted)
        return [name for name in made if name in alive]

    def twin(self) -> Chunk:
        """The same chunk once more; both keep the values, which nobody overwrites."""
        self.leave()
        return Chunk(self.program, dict(self.env), self.row, self.next_segment, wanted=self.wanted)


class Stage:
    """One chunk program, its buffers and its segments ready to run over them.

    Attributes:
        program: the program.
        shared: the inputs that are the same for all: the arenas.
        env: the buffers.

    Args:
        program: the program; its kernels must have run once.
        specs: its steering tables.
        ints: the integer inputs of dead rows, a host tensor laid out as :func:`djinn_fx.runtime.tables.int_views` says.
        shared: the arenas.
        recorder: makes a segment ready.
    """

    def __init__(
        self, program: Program, specs: Sequence[TableSpec], ints: torch.Tensor, shared: Env, recorder: Recorder
    ) -> None:
        self._ints = ints.to(recorder.device)
        self._inbox = Inbox(self._ints)
        self._neutral, self._written = {spec.name: spec.neutral for spec in specs}, set[str]()
        inputs = int_views(self._ints, program.shape) | neutral_tables(specs, recorder.device)
        self.program, self.shared = program, dict(shared)
        self.env: Env = {**inputs, **shared}
        self._steps = recorder.record(replace(program, feed=None), self.env)  # what is computed now nobody reads
        self._made = frozenset(name for segment in program.segments for name in segment.outputs)
        self._on: weakref.ref[Chunk] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers, without what all stages share."""
        storages = [tensor.untyped_storage() for name, tensor in self.env.items() if name not in self.shared]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def seat(self, chunk: Chunk) -> None:
        """Bring a chunk onto the stage; whoever is on it leaves. Its inputs are to be given by :meth:`refill`."""
        if chunk.stage is self:
            return
        there = None if self._on is None else self._on()
        if there is not None:
            there.leave()
        chunk.leave()
        names = [name for name in chunk.env if name in self._made]
        copy_all([self.env[name] for name in names], [chunk.env[name] for name in names])
        chunk.env, chunk.stage, self._on = self.env, self, weakref.ref(chunk)

    def refill(self, row: BatchRow, spare_row: int) -> None:
        """Give the chunk that is on it its inputs anew.

        Args:
            row: what it computes, and what acts in it.
            spare_row: of the arena.
        """
        self._inbox.send(lambda ints: write_ints(ints, [row], self.program.shape, spare_row))
        for name in self._written:
            self.env[name].fill_(self._neutral[name])
        self._written = write_steering(self.env, [row], self.program.sites) if self._neutral else set()

    def run(self, first: int, last: int) -> None:
        """Run segments ``first`` to ``last`` (inclusive) of the chunk that is on it."""
        feed = self.program.feed
        for index in range(first, last + 1):
            with nullcontext() if feed is None else feed.running(index):
                self._steps[index]()


@dataclass
class Recorder:
    """Makes segments ready to run again and again over the same tensors.

    Attributes:
        device: where; only CUDA has graphs, elsewhere a segment's results are copied to where they were the first time.
    """

    device: torch.device
    _stream: torch.cuda.Stream | None = field(default=None, repr=False)

    @torch.no_grad()
    def record(self, program: Program, env: Env) -> list[Callable[[], None]]:
        """One callable a segment; ``env`` gets the tensors that they write."""
        with torch.inference_mode(False):
            if self.device.type != "cuda":
                return [_recomputed(program, env, index) for index in range(len(program.segments))]
            if self._stream is None:
                self._stream = torch.cuda.Stream(self.device)
            return self._captured(program, env, self._stream)

    def _captured(self, program: Program, env: Env, stream: torch.cuda.Stream) -> list[Callable[[], None]]:
        graphs: list[Callable[[], None]] = []
        # A pool for each program: what a segment only needs while it runs is given to later segments of the same
        # program, which come after it in every chunk. Another program's results might lie there.
        pool: Any = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                dtypes = (weight.dtype for weight in program.weights.values() if weight.is_floating_point())
                some = torch.zeros(16, 16, dtype=next(dtypes, torch.float32), device=self.device)
                torch.mm(some, some)  # the library makes its workspace, which is to outlive the graphs
                torch.cuda.synchronize()
                for index in range(len(program.segments)):
                    # torch.cuda.graph() would also empty the caches of memory, once a segment.
                    graph = torch.cuda.CUDAGraph()
                    # Other threads may use the GPU meanwhile, as long as they leave this stream alone.
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    try:
                        run_segments(program, env, index, index)
                    finally:
                        graph.capture_end()
                    graphs.append(graph.replay)
        return graphs


def _recomputed(program: Program, env: Env, index: int) -> Callable[[], None]:
    """Run a segment now, and later again with its results copied to where they are now."""
    run_segments(program, env, index, index)
    names = program.segments[index].outputs
    for name in names:
        env[name] = _apart(env[name])

    def step() -> None:
        fresh = dict(env)
        run_segments(program, fresh, index, index)
        for name in names:
            env[name].untyped_storage().copy_(fresh[name].untyped_storage())

    return step


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides in a storage of its own: a result may be a view of what it was computed from."""
    storage = tensor.untyped_storage().clone()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


@dataclass
class Stages:
    """The stages of one model, by program; the ones used last, as far as their buffers fit in a bound.

    Attributes:
        recorder: makes segments ready.
        shared: the arenas.
        guard: raises if the model's weights were moved or replaced.
        limit: bytes of all stages; one that takes more is there alone.
    """

    recorder: Recorder
    shared: Env
    guard: Callable[[], None]
    limit: int = LIMIT
    _made: dict[tuple[ProgramShape, Variant, tuple[str, ...]], Stage] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all their buffers."""
        return sum(stage.nbytes for stage in self._made.values())

    def of(self, program: Program, inputs: Callable[[], tuple[Sequence[TableSpec], torch.Tensor]]) -> Stage:
        """The stage of a program, made now if there is none; ``inputs`` gives its ``specs`` and ``ints`` then."""
        key = (program.shape, program.variant, tuple(site.name for site in program.sites))
        stage = self._made.pop(key, None)
        if stage is None:
            self.guard()  # what a graph once read it reads for ever
            stage = Stage(program, *inputs(), self.shared, self.recorder)
            room = self.limit - stage.nbytes
            while self._made and self.nbytes > room:
                del self._made[next(iter(self._made))]  # the one that was not used for longest
        self._made[key] = stage
        return stage

    def keep(self, sites: Iterable[str]) -> None:
        """Drop the stages of other sites than these; a chunk that is on one keeps it."""
        names = tuple(sites)
        self._made = {key: stage for key, stage in self._made.items() if key[2] == names}
