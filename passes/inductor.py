"""Lowering by Inductor: each structurally different segment is compiled once.

Layers are equal graphs over different weights, so the number of compilations does not grow with depth. Casts between
fused operations are kept (``emulate_precision_casts``): without that a fused bf16 chain would skip roundings that the
same chain cut in two performs, and stopping would change bits.

Inductor keeps what it compiled on disk itself (``TORCHINDUCTOR_CACHE_DIR``), by graph, options and versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V

from djinn_fx.passes.lower import compile_class

Lowered = Callable[..., tuple[torch.Tensor, ...]]

#: Inductor options that exactness rests on; set per compilation, never globally.
#:
#: * ``emulate_precision_casts``: see above.
#: * ``deterministic``: how a reduction is cut follows from its shape, not from what was fastest when it was tried, or
#:   from how many registers its kernel takes; else another process would have other bits, and so would another variant
#:   of the same program.
#: * ``pattern_matcher``: no rewriting of a product and the addition of its bias, or of a residual, into one op or out
#:   of one, which depends on who reads the sum: an edit that is armed behind it would change its rounding.
EXACT: Mapping[str, Any] = {"emulate_precision_casts": True, "deterministic": True, "pattern_matcher": False}

#: Inductor options that cost less time: kernels are compiled by the worker processes, all at once, not one by one here.
QUICK: Mapping[str, Any] = {"triton.autotune_at_compile_time": False}

#: Rows up to which a row is reduced in one piece, and the longest such row. A GPU has more multiprocessors than there
#: are rows, so what counts is how often one of them waits for memory.
FEW_ROWS, WHOLE_ROW = 64, 8192


class WholeRows(InductorChoices):
    """Inductor's choices, but that reductions of few rows hold the whole row: one pass over memory, not two or more.

    The shape of a reduction alone decides how it is summed, not how many tables are fused into it, so plain and armed
    programs keep their bits.
    """

    @staticmethod
    def uuid() -> str:
        """What Inductor's cache tells these choices by."""
        return "djinn_fx.WholeRows.1"

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """Whether a kernel holds whole rows; see :class:`InductorChoices`."""
        known = V.graph.sizevars.statically_known_leq
        if known(features.numel, FEW_ROWS) and known(features.reduction_numel, WHOLE_ROW):
            return not cooperative_reduction
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)


@dataclass
class InductorLowering:
    """Compiles segments with Inductor and keeps one artifact per compile class.

    Attributes:
        options: Inductor configuration patches beside :data:`EXACT` and :data:`QUICK`.
        choices: what decides how kernels are cut.
        compiled: artifact by compile class.
        compilations: how often Inductor was called.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    choices: type[InductorChoices] = WholeRows
    compiled: dict[str, Lowered] = field(default_factory=dict)
    compilations: int = 0

    def __call__(self, graph: fx.GraphModule) -> Lowered:
        """The compiled form of a segment's graph: takes its inputs in order, returns a tuple."""
        key = compile_class(graph)
        if key not in self.compiled:
            # Named in the options too: they are part of Inductor's cache key.
            patches = {**EXACT, **QUICK, "inductor_choices_class": self.choices, **self.options}
            with V.set_choices_handler(self.choices()):
                self.compiled[key] = _compile(graph, patches)
            self.compilations += 1
        return self.compiled[key]


def start_workers() -> None:
    """Start the processes in which Inductor compiles Triton kernels; it would begin when the first kernel is there."""
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


def _compile(graph: fx.GraphModule, patches: Mapping[str, Any]) -> Lowered:
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    if not any(node.op == "call_function" for node in graph.graph.nodes):
        forward: Lowered = graph.forward
        return forward
    with torch.no_grad():
        artifact: Any = torch._inductor.standalone_compile(
            graph,
            inputs,
            dynamic_shapes="from_graph",
            options={"config_patches": dict(patches)},
        )

    def run(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = artifact(*arguments)
        return tuple(results) if isinstance(results, (list, tuple)) else (results,)

    return run
