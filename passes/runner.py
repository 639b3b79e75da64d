"""The runner: the only place that runs a pass, and so the only place where checking can be forgotten."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from djinn_fx.errors import DjinnError, InternalError
from djinn_fx.passes.context import PassContext
from djinn_fx.passes.records import as_text, snapshot
from djinn_fx.passes.verify import VERIFIERS
from djinn_fx.program import NodeInfo, PassRecord

Pass = Callable[[fx.GraphModule, PassContext], fx.GraphModule]


@dataclass(frozen=True)
class Stage:
    """A pass, its name and the stage whose invariants hold after it."""

    name: str
    stage: str
    run: Pass


def run_passes(
    gm: fx.GraphModule,
    stages: Sequence[Stage],
    ctx: PassContext,
    records: Sequence[PassRecord] = (),
) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
    """Run ``stages`` in order: snapshot, pass, recompile, lint, verify, record.

    Returns:
        The resulting graph and ``records`` with one more record per pass.

    Raises:
        InternalError: a pass failed or broke its stage's invariants; names the dump of the graph
            before it.
    """
    done = list(records)
    before = done[-1].after if done else snapshot(gm)
    for stage in stages:
        start = time.perf_counter()
        try:
            gm = stage.run(gm, ctx)
            gm.recompile()
            gm.graph.lint()
            verdict = VERIFIERS[stage.stage](gm, ctx, before)
        except DjinnError as error:
            if not isinstance(error, InternalError):
                raise
            raise _breach(stage, error, before) from error
        except Exception as error:
            raise _breach(stage, error, before) from error
        seconds = time.perf_counter() - start
        after = snapshot(gm)
        done.append(PassRecord(len(done), stage.name, stage.stage, before, after, seconds, verdict))
        before = after
    return gm, tuple(done)


def _breach(stage: Stage, error: Exception, before: tuple[NodeInfo, ...]) -> InternalError:
    """The error for a pass that failed, with the graph before it dumped to a file."""
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"djinn-{stage.name}-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(as_text(before))
    return InternalError(
        f"pass {stage.name!r} broke stage {stage.stage!r}: {error}. This is a bug of djinn_fx. "
        f"The graph before the pass is in {file.name}; please attach it to a report."
    )
