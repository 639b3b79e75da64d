"""Captured graphs as plain data: JSON and constant tensors, from which an equal graph is built.

No code is stored. Ops are stored by name and looked up among the registered ones; weights are looked up in the model;
fake values are built from shape, stride, dtype, device and the number of their storage. Whatever cannot be said so
raises :class:`Unsaid`, and the graph is not kept.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import fx, nn

from djinn_fx.passes.annotate import ABSENT
from djinn_fx.passes.capture import attribute_of
from djinn_fx.passes.fakes import FakeReader, FakeWriter
from djinn_fx.passes.graph import ENV, MODULE, NAMES, NEXT, ORIGIN, WEIGHT, lazy_module
from djinn_fx.passes.roles import KEPT
from djinn_fx.program import NodeInfo, PassRecord

#: Of a graph's nodes and of a graph: what may be known of it beside its fake value.
_NODE_KEYS = frozenset({ENV, MODULE, NAMES, ORIGIN, KEPT, WEIGHT, "val"})
_GRAPH_KEYS = frozenset({ABSENT, NEXT})
_OP = re.compile(r"(\w+)\.(\w+)\.(\w+)")
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"operator.getitem": operator.getitem}
_TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)

#: Constants made by tracing may take so many bytes in all.
MOST_CONSTANTS = 64 << 20

Json = Any


class Unsaid(Exception):
    """A graph that holds something this format has no words for, or a document that says nothing sensible."""


@dataclass(frozen=True)
class Captured:
    """An annotated graph of one shape; never changed, copied before further passes."""

    graph: fx.GraphModule
    records: tuple[PassRecord, ...]


def encode(captured: Captured, clone: nn.Module) -> tuple[dict[str, Json], dict[str, torch.Tensor]]:
    """A captured graph as a JSON document and its constant tensors (on the CPU) by environment name.

    Raises:
        Unsaid: it holds something that cannot be stored.
    """
    gm = captured.graph
    if set(gm.meta) - _GRAPH_KEYS:
        raise Unsaid(f"a graph that knows {sorted(set(gm.meta) - _GRAPH_KEYS)}")
    fakes = FakeWriter()
    numbers = {node: index for index, node in enumerate(gm.graph.nodes)}
    nodes: list[Json] = []
    constants: dict[str, torch.Tensor] = {}
    for node in gm.graph.nodes:
        odd = set(node.meta) - _NODE_KEYS
        if odd or node.type is not None:
            raise Unsaid(f"{node.name} knows {sorted(odd)}, type {node.type}")
        if WEIGHT in node.meta:
            _keep_constant(node.meta[ENV], node.meta[WEIGHT], clone, constants)
        meta = {key: node.meta[key] for key in (ENV, MODULE, ORIGIN, KEPT) if key in node.meta}
        if NAMES in node.meta:
            meta[NAMES] = list(node.meta[NAMES])
        value = [fakes.write(node.meta["val"])] if "val" in node.meta else []
        args = _said((node.args, node.kwargs), numbers)
        nodes.append([node.op, node.name, _target(node), args, meta, value, WEIGHT in node.meta])
    document = {"meta": dict(gm.meta), "nodes": nodes, "fakes": fakes.document(), "records": _records(captured.records)}
    return document, constants


def decode(document: Mapping[str, Json], constants: Mapping[str, torch.Tensor], clone: nn.Module) -> Captured:
    """The captured graph that :func:`encode` was given, over the tensors of ``clone``.

    Raises:
        Unsaid: the document does not describe a graph of this model.
    """
    fakes = FakeReader(document["fakes"])
    tensors = dict([*clone.named_parameters(), *clone.named_buffers()])
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for op, name, target, args, meta, value, is_weight in document["nodes"]:
        positional, named = _meant(args, nodes)
        node = graph.create_node(op, _function(target) if op == "call_function" else target, positional, named, name)
        if node.name != name:
            raise Unsaid(f"{name} came out as {node.name}")
        node.meta.update(meta)
        if NAMES in meta:
            node.meta[NAMES] = tuple(meta[NAMES])
        if value:
            node.meta["val"] = fakes.read(value[0])
        if is_weight:
            node.meta[WEIGHT] = _weight(meta[ENV], tensors, constants, clone)
        nodes.append(node)
    gm = lazy_module(graph)
    gm.meta.update(document["meta"])
    return Captured(gm, _read_records(document["records"]))


# -- weights -------------------------------------------------------------------------------------


def _keep_constant(env: str, tensor: torch.Tensor, clone: nn.Module, constants: dict[str, torch.Tensor]) -> None:
    """Keep a tensor that tracing made; the model's own are looked up."""
    kind, _, name = env.partition(".")
    if kind == "w" or attribute_of(clone, name) is not None:
        return
    constants[env] = tensor.detach().cpu()
    plain = tensor.layout is torch.strided and tensor.is_contiguous() and type(tensor) is torch.Tensor
    if not plain or sum(each.nbytes for each in constants.values()) > MOST_CONSTANTS:
        raise Unsaid(f"the constant {env} is too large or of an odd kind")


def _weight(
    env: str, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor], clone: nn.Module
) -> torch.Tensor:
    kind, _, name = env.partition(".")
    if kind == "w":
        return tensors[name].detach()
    found = attribute_of(clone, name)
    if isinstance(found, torch.Tensor):
        return found.detach()
    return constants[env].to(next(clone.parameters()).device)


# -- ops and their arguments -----------------------------------------------------------------------


def _target(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return str(node.target)
    name = next((name for name, each in _FUNCTIONS.items() if each is node.target), str(node.target))
    if node.op != "call_function" or _function(name) is not node.target:
        raise Unsaid(f"{node.op} of {node.target}")
    return name


def _function(name: str) -> Callable[..., Any]:
    """A registered op, or one of the few functions that graphs call."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    found: Any = torch.ops
    match = _OP.fullmatch(name)
    for part in match.groups() if match else ():
        found = getattr(found, part, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise Unsaid(f"no op {name}")
    return found


def _said(value: Any, numbers: Mapping[fx.Node, int]) -> Json:
    """An argument in JSON: what JSON has as it is, the rest in lists that say what they are."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, fx.Node):
        return ["node", numbers[value]]
    if isinstance(value, list):
        return ["list", *(_said(each, numbers) for each in value)]
    if isinstance(value, torch.Size):
        return ["size", *(_said(each, numbers) for each in value)]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return ["tuple", *(_said(each, numbers) for each in value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _said(each, numbers) for key, each in value.items()}
    if isinstance(value, slice):
        return ["slice", *(_said(each, numbers) for each in (value.start, value.stop, value.step))]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    if isinstance(value, _TORCH_VALUES):
        return ["torch", str(value).removeprefix("torch.")]
    raise Unsaid(f"an argument of type {type(value).__name__}")


def _meant(value: Json, nodes: Sequence[fx.Node]) -> Any:
    if isinstance(value, dict):
        return {key: _meant(each, nodes) for key, each in value.items()}
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "node":
        return nodes[rest[0]]
    if kind == "device":
        return torch.device(rest[0])
    if kind == "torch":
        found = getattr(torch, rest[0])
        if not isinstance(found, _TORCH_VALUES):
            raise Unsaid(f"torch.{rest[0]}")
        return found
    items = [_meant(each, nodes) for each in rest]
    return {"list": list, "tuple": tuple, "size": torch.Size}[kind](items) if kind != "slice" else slice(*items)


# -- records ---------------------------------------------------------------------------------------


def _records(records: Sequence[PassRecord]) -> list[Json]:
    """Each record by the graph after it; the graph before it is the one after the record before."""
    for one, two in itertools.pairwise(records):
        if one.after is not two.before:
            raise Unsaid("records that do not follow one another")
    first = [astuple(info) for info in records[0].before]
    rest = [[r.index, r.name, r.stage, [_flat(info) for info in r.after], r.seconds, r.verdict] for r in records]
    return [first, rest]


def _flat(info: NodeInfo) -> list[Json]:
    return list(vars(info).values())


def _read_records(document: Json) -> tuple[PassRecord, ...]:
    first, rest = document
    before = tuple(NodeInfo(*fields) for fields in first)
    found = []
    for index, name, stage, infos, seconds, verdict in rest:
        after = tuple(NodeInfo(*fields) for fields in infos)
        found.append(PassRecord(index, name, stage, before, after, seconds, verdict))
        before = after
    return tuple(found)
