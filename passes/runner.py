"""The runner: the only place that runs a pass, and so the only place where checking can be forgotten."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import fx

from djinn_fx.errors import DjinnError, InternalError
from djinn_fx.passes.context import PassContext, Stage
from djinn_fx.passes.records import segments_of, snapshot
from djinn_fx.passes.report import report
from djinn_fx.passes.verify import VERIFIERS
from djinn_fx.program import PassRecord


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
        InternalError: a pass failed or broke its stage's invariants; names the folder with the graph
            before it and a script that fails in the same way.
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
            raise report(stage, error, done, before, ctx) from error
        except Exception as error:
            raise report(stage, error, done, before, ctx) from error
        seconds = time.perf_counter() - start
        after = snapshot(gm)
        done.append(PassRecord(len(done), stage.name, stage.stage, before, after, seconds, verdict, segments_of(gm)))
        before = after
    return gm, tuple(done)
