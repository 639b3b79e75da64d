"""What the segments of a program cost when they run: time, kernels, fusions lost at the cuts, arming."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from djinn_fx.inspecting.code import joined_launches, launches
from djinn_fx.inspecting.making import Choice, Subject, program_of
from djinn_fx.passes.lower import lower_eager
from djinn_fx.passes.trace import SegmentCost
from djinn_fx.program import KEEP, LENGTHS, POSITIONS, ROWS, TOKENS, Program, kv_name
from djinn_fx.runtime.stages import Recorder
from djinn_fx.specs import edit_tables

Env = dict[str, torch.Tensor]

#: Runs before any is timed; then runs until so many seconds or so many runs.
WARM, SECONDS, MOST_RUNS = 3, 1.0, 50

#: Cycles that a GPU sleeps while the host launches a run: about a millisecond.
COVER = 2_000_000

#: Ops that Inductor calls as they are: nothing is fused into or across them.
_OPAQUE = frozenset(
    """
    linear mm bmm addmm matmul baddbmm convolution attention kv_write linears embedding copy_
    view reshape transpose permute slice expand unsqueeze squeeze
    """.split()  # noqa: SIM905 - a table to be read, not a list
)


def measure(what: Subject, choice: Choice, backend: str, tell: Callable[[str], None]) -> tuple[SegmentCost, ...]:
    """Run a program at the start of a sequence and say what each segment costs.

    Times are medians over runs of the whole program, armed and plain in turn. On CUDA they are by events, compiled
    segments each as a CUDA graph, which is how they run: no launches in them. Segments of the eager backend show their
    launches, where those take longer than the kernels. Kernels are counted by the profiler on CUDA; on the CPU they are
    the computing ops of the eager backend, or what Inductor's code calls.

    Args:
        what: the model; weights that were never written give times of their own.
        choice: which program.
        backend: ``"eager"`` or ``"inductor"``.
        tell: is told what is being done.
    """
    from djinn_fx.passes.inductor import InductorLowering

    lower = InductorLowering() if backend == "inductor" else lower_eager
    tell(f"making the {choice.variant} program")
    program = program_of(what, choice, lower)
    tell("making the plain program")
    plain = program_of(what, Choice(choice.shape, "plain", choice.sites, choice.rank), lower)
    tell("timing the segments")
    ours, theirs = _times(what, [program, plain], backend)
    tell("counting kernels")
    kernels = _kernels(what, program, backend)
    lost = _lost(program, backend, tell)
    return tuple(
        SegmentCost(
            name=segment.name,
            microseconds=ours[index],
            kernels=kernels[index],
            fusions_lost=lost[index],
            at_most=backend == "eager",
            arming=None if choice.variant == "plain" or segment.site is None else ours[index] - theirs[index],
        )
        for index, segment in enumerate(program.segments)
    )


@torch.no_grad()
def _times(what: Subject, programs: Sequence[Program], backend: str) -> list[list[float]]:
    """Median microseconds of every segment of each program, the programs in turn."""
    runners = [_runner(what, program, backend) for program in programs]
    found: list[list[list[float]]] = [[] for _ in programs]
    begin = time.perf_counter()
    for turn in range(MOST_RUNS):
        if turn > 4 and time.perf_counter() - begin > SECONDS * len(programs):
            break
        for runs, run in zip(found, runners, strict=True):
            runs.append(run())
    return [[statistics.median(each) for each in zip(*runs, strict=True)] for runs in found]


def _runner(what: Subject, program: Program, backend: str) -> Callable[[], list[float]]:
    """Runs a program that is warm; gives microseconds of each segment."""
    env, segments = _env(what, program), range(len(program.segments))
    for _ in range(WARM):
        warm = dict(env)
        for index in segments:
            _run(program, warm, index)
    device = what.source.device
    if device.type == "cuda" and backend == "inductor":
        return partial(_by_events, Recorder(device).record(program, env), COVER)
    steps = [partial(_run, program, env, index) for index in segments]
    return partial(_by_events, steps) if device.type == "cuda" else partial(_by_the_clock, steps)


def _by_the_clock(steps: Sequence[Callable[[], None]]) -> list[float]:
    took = []
    for step in steps:
        begin = time.perf_counter()
        step()
        took.append((time.perf_counter() - begin) * 1e6)
    return took


def _by_events(steps: Sequence[Callable[[], None]], cover: int = 0) -> list[float]:
    """By CUDA events; the device sleeps for so many cycles, while the host launches."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    torch.cuda._sleep(cover)
    marks[0].record()
    for step, mark in zip(steps, marks[1:], strict=True):
        step()
        mark.record()
    torch.cuda.synchronize()
    return [one.elapsed_time(two) * 1e3 for one, two in pairwise(marks)]


def _run(program: Program, env: Env, index: int) -> None:
    segment = program.segments[index]
    arguments = [env[name] if name in env else program.weights[name] for name in segment.inputs]
    env.update(zip(segment.outputs, segment.run(*arguments), strict=True))


def _env(what: Subject, program: Program) -> Env:
    """Inputs of a program at the start of a sequence, nothing armed; the arenas are zeroed."""
    shape, device = program.shape, what.source.device
    env: Env = {
        TOKENS: torch.zeros(shape.rows, shape.query, dtype=torch.long, device=device),
        POSITIONS: torch.arange(shape.query, device=device).expand(shape.rows, shape.query).contiguous(),
        ROWS: torch.arange(shape.rows, device=device),
        LENGTHS: torch.full((shape.rows,), shape.query, dtype=torch.long, device=device),
        KEEP: torch.full((shape.rows, shape.keep), shape.query - 1, dtype=torch.long, device=device),
    }
    for layer, pair in enumerate(what.arenas):
        for part, arena in zip("kv", pair, strict=True):
            env[kv_name(layer, part)] = arena.zero_()
    rank = max((spec.shape[1] for spec in program.inputs if spec.name.endswith(":slot")), default=0)
    for site in program.sites:
        for spec in edit_tables(site, shape, program.variant, what.source.dtype, rank):
            env[spec.name] = torch.full(spec.shape, spec.neutral, dtype=spec.dtype, device=device)
    return env


@torch.no_grad()
def _kernels(what: Subject, program: Program, backend: str) -> list[int]:
    """Kernels that each segment launches."""
    cuda = what.source.device.type == "cuda"
    if backend == "inductor" and not cuda:
        counts = {segment.compile_class: 0 for segment in program.segments}
        for segment in program.segments:
            if not counts[segment.compile_class]:
                counts[segment.compile_class] = launches(segment.graph)
        return [counts[segment.compile_class] for segment in program.segments]
    env, found = _env(what, program), []
    for index in range(len(program.segments)):
        _run(program, dict(env), index)  # made ready outside of the count
        found.append(_device_kernels(program, env, index) if cuda else _computing_ops(program, env, index))
    return found


def _device_kernels(program: Program, env: Env, index: int) -> int:
    """What a segment launches on the device, copies and fills included."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        _run(program, env, index)
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in seen.events() or ())


def _computing_ops(program: Program, env: Env, index: int) -> int:
    """Ops of a segment that compute: those that only look at memory in another way are none."""
    counter = _Counter()  # type: ignore[no-untyped-call]
    with counter:
        _run(program, env, index)
    return counter.count


class _Counter(TorchDispatchMode):
    """Counts ops that are no views."""

    count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _lost(program: Program, backend: str, tell: Callable[[str], None]) -> list[int | None]:
    """Fusions lost at the cut behind each segment; None at the end.

    With Inductor: kernels of the two segments beside the cut, less those of both compiled as one. Else a bound: reads
    across the cut that a compiler could have fused.
    """
    found: list[int | None] = []
    alone: dict[str, int] = {}
    known: dict[tuple[str, str], int] = {}
    for one, two in pairwise(program.segments):
        pair = (one.compile_class, two.compile_class)
        if backend != "inductor":
            found.append(fusable_reads(one.graph, two.graph, one.outputs, two.inputs))
            continue
        if pair not in known:
            tell(f"compiling {one.name} and {two.name} as one")
            for segment in (one, two):
                if segment.compile_class not in alone:
                    alone[segment.compile_class] = launches(segment.graph)
            known[pair] = alone[pair[0]] + alone[pair[1]] - joined_launches(one, two)
        found.append(known[pair])
    return [*found, None]


def fusable_reads(one: fx.GraphModule, two: fx.GraphModule, made: Sequence[str], read: Sequence[str]) -> int:
    """Ops behind a cut that read a value from before it, where a compiler could have fused reader and maker.

    Args:
        one: the graph before the cut.
        two: the graph behind it.
        made: environment names of what the first returns.
        read: environment names of what the second takes.
    """
    returned = next(iter(reversed(one.graph.nodes))).args[0]
    assert isinstance(returned, tuple)
    makers = dict(zip(made, returned, strict=True))
    taken = dict(zip(read, (n for n in two.graph.nodes if n.op == "placeholder"), strict=True))
    return sum(
        _fusable(user)
        for name, maker in makers.items()
        if name in taken and _fusable(maker)
        for user in taken[name].users
    )


def _fusable(node: object) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    name = str(node.target).split(".")
    return len(name) > 1 and name[1] not in _OPAQUE
