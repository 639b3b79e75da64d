"""Pass 1, capture: the clone becomes one flat graph whose weights are inputs."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from djinn_fx.errors import CaptureError
from djinn_fx.passes import hf
from djinn_fx.passes.context import PassContext
from djinn_fx.passes.graph import ENV, MODULE, NAMES, ORIGIN, REBUILD, WEIGHT, compute_nodes, placeholders, unwritten
from djinn_fx.passes.inline import flatten_graph
from djinn_fx.passes.marks import marking
from djinn_fx.passes.source import Inputs, Source, flatten_inputs
from djinn_fx.program import LENGTHS, POSITIONS, ROWS, TOKENS, kv_name

_WRAPPED = "model"

#: Ops that check or annotate and compute nothing.
_ASSERTS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)


#: Where frames of a traceback are not the model's own code.
_NOT_THE_MODELS = tuple(os.path.dirname(os.path.realpath(file)) + os.sep for file in (torch.__file__, __file__))


class _Step(nn.Module):
    """One step of a language model as a function of tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        lengths: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        arenas = list(zip(keys, values, strict=True))
        with hf.stepping(hf.Step(rows, positions, lengths, arenas)), _GradSwitches():
            output = self.model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=hf.arena_cache(len(arenas)),
                use_cache=True,
            )
        logits: torch.Tensor = output.logits
        return logits


def capture_step(
    gm: fx.GraphModule,
    ctx: PassContext,
    *,
    source: Source,
    arenas: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> fx.GraphModule:
    """Capture one step of a language model at ``ctx.shape``. The incoming graph is empty.

    Raises:
        CaptureError: the model cannot be exported; says where and why.
    """
    rows, query = ctx.shape.rows, ctx.shape.query
    device = source.device
    example = (
        torch.zeros(rows, query, dtype=torch.long, device=device),
        torch.arange(query, device=device).expand(rows, query).contiguous(),
        torch.zeros(rows, dtype=torch.long, device=device),
        torch.full((rows,), query, dtype=torch.long, device=device),
        [k for k, _ in arenas],
        [v for _, v in arenas],
    )
    exported = _export(_Step(source.clone), source.clone, example, {})
    names = [TOKENS, POSITIONS, ROWS, LENGTHS]
    names += [kv_name(layer, "k") for layer in range(len(arenas))]
    names += [kv_name(layer, "v") for layer in range(len(arenas))]
    gm = _lift(exported, source.clone, names, prefix=f"{_WRAPPED}.")
    if all(str(user.target).startswith("djinn.") for user in placeholders(gm)[POSITIONS].users):
        raise CaptureError(
            f"{type(source.clone).__name__} ignores position_ids, so it would number the tokens of a cached sequence "
            "from 0 again at every step. Such models are not supported."
        )
    return gm


def capture_module(gm: fx.GraphModule, ctx: PassContext, *, source: Source, inputs: Inputs) -> fx.GraphModule:
    """Capture a plain module on ``inputs``. The incoming graph is empty.

    Raises:
        CaptureError: the module cannot be exported; says where and why.
    """
    exported = _export(source.clone, source.clone, *inputs)
    tensors, _ = flatten_inputs(inputs)
    lifted = _lift(exported, source.clone, list(tensors), prefix="")
    lifted.meta[REBUILD] = _rebuilder(exported)
    return lifted


def _export(module: nn.Module, clone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in {tensor.device.type for tensor in clone.parameters()}:
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            stack.enter_context(unwritten())
            stack.enter_context(marking(clone))
            return torch.export.export(module, args, kwargs, strict=False)
        except Exception as error:
            raise _capture_error(clone, error) from error


class _GradSwitches(TorchFunctionMode):
    """Switches of gradient mode act, and are not traced.

    Each would become a region of its own, taken apart and put together again by copying the graph, only to be
    inlined by :func:`djinn_fx.passes.inline.flatten_graph`: a program computes no gradients.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            with torch._C.DisableTorchFunction():
                return func(*args)
        return func(*args, **(kwargs or {}))


def _capture_error(clone: nn.Module, error: BaseException) -> CaptureError:
    """The reason of a failed export: our own if there is one, else the innermost line of model code."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CaptureError):
            return cause
        cause = cause.__cause__ or cause.__context__
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.line and not os.path.realpath(frame.filename).startswith(_NOT_THE_MODELS):
            place = f" at `{frame.line.strip()}` (line {frame.lineno} of {frame.filename})"
    lines = [line.strip() for line in str(error).splitlines()]
    reason = next((line for line in lines if line), "no message")
    remedy = (
        "Control flow that depends on tensor values, .item() and .tolist() cannot be captured: rewrite that line, "
        "or compile a submodule that does not contain it."
    )
    if "not a known type" in reason:
        reason = reason.partition("If this type")[0].strip()
        remedy = "Let the module return tensors only (for a cache: use_cache=False in example_inputs)."
    return CaptureError(
        f"{type(clone).__name__} cannot be captured as one static graph: {type(error).__name__}{place}: {reason} "
        f"{remedy}"
    )


def _lift(exported: ExportedProgram, clone: nn.Module, inputs: Sequence[str], *, prefix: str) -> fx.GraphModule:
    """Turn an exported program into a graph whose placeholders carry environment names."""
    gm = flatten_graph(exported.graph_module)
    known = {id(t): name for name, t in [*clone.named_parameters(), *clone.named_buffers()]}
    users = iter(inputs)
    first: dict[str, fx.Node] = {}
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(nodes, exported.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                gm.graph.erase_node(node)
                continue
            env = next(users)
        else:
            tensor = _weight(exported, clone, str(spec.target), prefix)
            fqn = known.get(id(tensor))
            env = f"w.{fqn}" if fqn else f"c.{str(spec.target).removeprefix(prefix)}"
            node.meta[WEIGHT] = tensor.detach()
        node.meta = {key: value for key, value in node.meta.items() if key in ("val", WEIGHT)}
        if isinstance(value := node.meta.get("val"), torch.Tensor) and value.requires_grad:
            node.meta["val"] = value.detach()  # nor do views of it ask for a gradient then
        if env in first:
            for user in node.users:
                user.meta.pop("val", None)  # its storage was another
            node.replace_all_uses_with(first[env])
            gm.graph.erase_node(node)
            continue
        first[env] = node
        node.meta.update({ENV: env, NAMES: (), MODULE: "", ORIGIN: len(first)})
    _clean(gm)
    for origin, node in enumerate(compute_nodes(gm), start=len(first) + 1):
        # What else tracing noted is dropped: a graph must be the same whether it was exported or restored.
        node.meta = {"val": node.meta.get("val"), ORIGIN: origin, NAMES: (), MODULE: _module_of(node, prefix)}
    _keep_tensor_outputs(gm, exported)
    return gm


def attribute_of(clone: nn.Module, name: str) -> Any:
    """What the clone holds under a dotted name; None if nothing."""
    path, _, last = name.rpartition(".")
    try:
        return getattr(clone.get_submodule(path), last)
    except AttributeError:
        return None


def _weight(exported: ExportedProgram, clone: nn.Module, target: str, prefix: str) -> torch.Tensor:
    """The model's own tensor behind a lifted input, or the constant that tracing made."""
    found = attribute_of(clone, target.removeprefix(prefix))
    if found is None:
        found = exported.constants[target]
    if not isinstance(found, torch.Tensor):
        raise CaptureError(f"{type(clone).__name__} uses {target!r}, a {type(found).__name__} that is not a tensor.")
    return found


def _clean(gm: fx.GraphModule) -> None:
    """Drop assertions and whatever only they used."""
    for node in reversed(list(compute_nodes(gm))):
        name = getattr(node.target, "__name__", "").split(".")[0]
        if name in _ASSERTS and not node.users:
            gm.graph.erase_node(node)


def _module_of(node: fx.Node, prefix: str) -> str:
    """Path of the module whose forward made a node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return re.sub(r"@\d+", "", path).removeprefix(prefix.rstrip(".")).lstrip(".")


def _keep_tensor_outputs(gm: fx.GraphModule, exported: ExportedProgram) -> None:
    """Let the graph return a flat tuple of the user's tensor outputs."""
    output = next(iter(reversed(gm.graph.nodes)))
    specs = exported.graph_signature.output_specs
    kept = [
        node
        for node, spec in zip(output.args[0], specs, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT and isinstance(spec.arg, TensorArgument)
    ]
    output.args = (tuple(kept),)


def _rebuilder(exported: ExportedProgram) -> Callable[[tuple[torch.Tensor, ...]], Any]:
    """A function that makes the module's own return value from the graph's results."""
    spec = exported.call_spec.out_spec
    constants = [
        (isinstance(item.arg, TensorArgument), getattr(item.arg, "value", None))
        for item in exported.graph_signature.output_specs
        if item.kind is OutputKind.USER_OUTPUT
    ]

    def rebuild(values: tuple[torch.Tensor, ...]) -> Any:
        flat = iter(values)
        leaves = [next(flat) if is_tensor else constant for is_tensor, constant in constants]
        return pytree.tree_unflatten(leaves, spec)

    return rebuild
