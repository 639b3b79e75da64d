"""What a failing pass leaves behind: the graph before it, the message, a trace, and a script that fails alike."""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from djinn_fx.errors import InternalError
from djinn_fx.passes.context import Origin, PassContext, Stage
from djinn_fx.passes.records import as_text
from djinn_fx.passes.trace import Failure, Trace, record_build, versions, write
from djinn_fx.program import NodeInfo, PassRecord
from djinn_fx.specs import ProgramShape

#: A plain module is stored beside the script if its tensors take no more bytes.
MOST_BYTES = 256 << 20


class PassFailed(InternalError):
    """A pass that failed or broke an invariant.

    Attributes:
        trace: the passes up to it and what it left.
    """

    trace: Trace


def report(
    stage: Stage, error: Exception, done: Sequence[PassRecord], before: tuple[NodeInfo, ...], ctx: PassContext
) -> PassFailed:
    """The error for a pass that failed; its folder holds ``before.txt``, ``error.txt``, ``passes.jsonl``, ``repro.py``.

    Args:
        stage: the pass.
        error: what it or its checks raised.
        done: records of the passes before it.
        before: the graph that it was given.
        ctx: its options.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"djinn-{stage.name}-"))
    message = str(error) or type(error).__name__
    shape = (ctx.shape.rows, ctx.shape.query, ctx.shape.keep)
    origin = ctx.origin or Origin("unknown")
    failure = Failure(stage.name, f"{type(error).__name__}: {message}", str(folder))
    trace = Trace(origin.model, shape, ctx.variant, tuple(done), versions(), failure)
    (folder / "before.txt").write_text(as_text(before) + "\n", encoding="utf-8")
    (folder / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    write(trace, folder / "passes.jsonl")
    (folder / "repro.py").write_text(_script(stage, failure.message, ctx, origin, folder), encoding="utf-8")
    record_build(trace)
    found = PassFailed(
        f"pass {stage.name!r} broke stage {stage.stage!r}: {message}. This is a bug of djinn_fx. "
        f"{folder} holds the graph before the pass (before.txt), the traceback (error.txt), the passes up to it "
        f"(passes.jsonl, for djinn-fx inspect) and a script that fails in the same way (repro.py); please attach "
        "them to a report."
    )
    found.trace = trace
    return found


def _script(stage: Stage, message: str, ctx: PassContext, origin: Origin, folder: Path) -> str:
    """The repro script."""
    said = " ".join(message.split())[:200].replace("\\", "/").replace('"', "'")
    model = _language_model(origin, folder) if origin.config else _plain_module(origin, folder)
    shape = (ctx.shape.rows, ctx.shape.query, ctx.shape.keep)
    arenas = _ARENAS.format(rows=origin.arena[0] + 1, positions=origin.arena[1] + 1) if ctx.kind == "lm" else "()"
    return _SCRIPT.format(
        name=stage.name,
        said=said,
        model=model,
        prepare="prepare(model)" if ctx.kind == "lm" else "prepare(model, inputs)",
        sites=[site.name for site in ctx.sites],
        shape=shape if ctx.kind == "lm" else tuple(vars(ProgramShape(0, 0, 0)).values()),
        variant=ctx.variant,
        rank=ctx.rank,
        cuts=ctx.cuts,
        grouped=ctx.grouped,
        arenas=arenas,
    )


_SCRIPT = '''"""Pass {name!r} of djinn_fx failed: {said}"""

import json
from pathlib import Path

import torch

from djinn_fx.passes.pipeline import build, discover
from djinn_fx.passes.source import prepare
from djinn_fx.specs import ProgramShape

here = Path(__file__).parent
{model}
source = {prepare}
table = discover(source)
program = build(
    source,
    ProgramShape(*{shape}),
    sites=[table.get(name) for name in {sites}],
    variant={variant!r},
    rank={rank},
    arenas={arenas},
    cuts={cuts!r},
    grouped={grouped},
)
print("built without an error:", len(program.segments), "segments")
'''

_ARENAS = """[
        tuple(
            torch.empty({rows}, spec.heads, {positions}, dim, dtype=source.dtype, device=source.device)
            for dim in (spec.key_dim, spec.value_dim)
        )
        for spec in source.kv
    ]"""

_LANGUAGE_MODEL = """
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

config = json.loads((here / "config.json").read_text())
with no_init_weights():  # a pass sees shapes, never numbers
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
model.tie_weights()
"""

_MODULE = """
# A pickle: run it only if you trust where it comes from.
model, inputs = torch.load(here / "module.pt", weights_only=False)
"""

_ABSENT = """
# {reason}: make the module ({model}) and its example inputs here.
model, inputs = None, None
"""


def _language_model(origin: Origin, folder: Path) -> str:
    config = json.dumps(dict(origin.config), indent=1, default=lambda value: str(value).removeprefix("torch."))
    (folder / "config.json").write_text(config, encoding="utf-8")
    return _LANGUAGE_MODEL


def _plain_module(origin: Origin, folder: Path) -> str:
    """A plain module is stored whole, where that is possible."""
    if origin.module is None:
        return _ABSENT.format(reason="the build did not say which module", model=origin.model)
    if sum(tensor.nbytes for tensor in origin.module.state_dict().values()) > MOST_BYTES:
        return _ABSENT.format(reason="it is too large to be stored here", model=origin.model)
    try:
        torch.save((origin.module, origin.inputs), folder / "module.pt")
    except Exception as error:  # a lambda, a lock: whatever a module may hold
        (folder / "module.pt").unlink(missing_ok=True)
        return _ABSENT.format(reason=f"it does not pickle ({type(error).__name__})", model=origin.model)
    return _MODULE
