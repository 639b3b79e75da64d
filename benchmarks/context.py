"""What a running benchmark is given: options, a log, checks, a budget of seconds."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from djinn_fx.benchmarks import clock, models
from djinn_fx.benchmarks.record import Check, Json
from djinn_fx.benchmarks.stats import summary
from djinn_fx.errors import InvalidValue

#: Dtypes that weights can have.
DTYPES = ("float32", "bfloat16", "float16", "float64")

#: Seeds are below this: torch and numpy take them, and parts add a little.
SEEDS = 2**32


@dataclass(frozen=True)
class Options:
    """How a benchmark is asked to run.

    Attributes:
        model: a name or path for :func:`djinn_fx.benchmarks.models.load`.
        device: ``"cuda"`` or ``"cpu"``; ``"auto"`` takes CUDA where there is one.
        dtype: of the weights; ``"auto"``: bfloat16 on CUDA, float32 on the CPU.
        backend: of ``djinn.compile``.
        quick: less of everything, within a minute or so.
        seed: of weights, prompts and statistics.
        budget_seconds: parts that would begin later than this are left out, visibly.
        peers: whether other systems run too.
        depths: numbers of layers, separated by commas, for benchmarks that vary them; empty: their own choice.
    """

    model: str = "gpt2"
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    quick: bool = False
    seed: int = 0
    budget_seconds: float | None = None
    peers: bool = True
    depths: str = ""

    def resolved(self) -> Options:
        """The same with every ``"auto"`` but the backend's replaced by what it means here.

        Raises:
            InvalidValue: an option that no benchmark can run with.
        """
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        found = replace(self, device=device, dtype=dtype)
        for why in found._refusals():
            raise InvalidValue(why)
        return found

    def _refusals(self) -> Iterator[str]:
        """What is wrong with the options, and what to give instead."""
        if self.device not in ("cuda", "cpu"):
            yield f"--device {self.device}: give cuda, cpu or auto; CUDA_VISIBLE_DEVICES chooses among several."
        if self.device == "cuda" and not torch.cuda.is_available():
            yield "--device cuda: torch finds no CUDA device here; give cpu or auto."
        if self.dtype not in DTYPES:
            yield f"--dtype {self.dtype}: give {', '.join(DTYPES)} or auto."
        if not 0 <= self.seed < SEEDS:
            yield f"--seed {self.seed}: give a whole number from 0 to {SEEDS - 1}."
        budget = self.budget_seconds
        if budget is not None and not (math.isfinite(budget) and budget >= 0):
            yield f"--budget-seconds {budget:g}: give a number of seconds, 0 or more."


@dataclass
class Context:
    """One run of one benchmark, while it goes on.

    Attributes:
        options: resolved.
        listener: told each line of the log.
        keep: given each part's name and what it found as soon as it is done.
        checks: made so far.
        log: so far.
    """

    options: Options
    listener: Callable[[str], object] = print
    keep: Callable[[str, Json], object] = lambda name, found: None
    checks: list[Check] = field(default_factory=list)
    log: list[tuple[float, str]] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> torch.device:
        """Where to run; CUDA with its index."""
        device = torch.device(self.options.device)
        return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        found: torch.dtype = getattr(torch, self.options.dtype)
        return found

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.begun

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        budget = self.options.budget_seconds
        return budget is not None and self.spent > budget

    def size(self, full: int, quick: int) -> int:
        """A number of samples, tokens or rows: ``quick`` for a quick run."""
        return quick if self.options.quick else full

    def say(self, line: str) -> None:
        """Log a line."""
        self.log.append((round(self.spent, 3), line))
        self.listener(line)

    def check(self, name: str, held: bool, detail: str = "", *, expected: bool = True) -> Check:
        """Record a comparison; what it says goes to the log too."""
        found = Check(name, bool(held), detail, expected)
        self.checks.append(found)
        self.say(f"{'right' if held else 'WRONG'}: {name}{f' ({detail})' if detail else ''}")
        return found

    def part(self, name: str, work: Callable[[], Json]) -> Json:
        """Do one part of the benchmark; what goes wrong in it is recorded, and the others go on.

        Returns:
            what ``work`` returns, or ``{"skipped": why}``, or ``{"failed": why}``.
        """
        if self.over:
            self.say(f"{name}: left out, the budget of {self.options.budget_seconds:g} s is spent")
            return {"skipped": f"the budget of {self.options.budget_seconds:g} s was spent"}
        self.say(name)
        began = self.spent
        try:
            found = work()
        except Exception as error:
            self.say(traceback.format_exc().rstrip())
            self.check(name, False, f"{type(error).__name__}: {error}"[:300])
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        clock.clear(self.device)
        self.keep(name, found)
        self.say(f"{name}: {self.spent - began:.1f} s")
        return found

    def speed(self, verdict: Check, take: Callable[[], list[float]], unit: str = "ms") -> dict[str, Json]:
        """A summary of samples, taken only if the answer that they time was right.

        Returns:
            the summary, or ``{"refused": why}``: a wrong result has no speed.
        """
        if not verdict.held:
            return refused(verdict)
        return summary(take(), unit)

    def load(self, layers: int | None = None, name: str | None = None) -> models.Loaded:
        """The model that was asked for, on the device."""
        options = self.options
        return models.load(name or options.model, self.device, self.dtype, options.seed, layers)

    def compile(self, loaded: models.Loaded, **options: Any) -> Any:
        """:func:`djinn_fx.compile` of a model with this run's backend."""
        import djinn_fx as djinn

        return djinn.compile(loaded.model, backend=self.options.backend, **options)


def refused(verdict: Check) -> dict[str, Json]:
    """What stands in place of a speed where the answer was wrong."""
    return {"refused": f"wrong result: {verdict.detail or verdict.name}"}
