"""Pass 3, roles: which values are the residual, the attention's output and so on, by dataflow alone.

Nothing here knows an architecture. A layer is what an attention op and its arena say it is; its block
is the child of a ``ModuleList`` around that op; the residual is the chain of additions from the block's
input to its output. Where that structure is missing, the role is absent and the reason is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from djinn_fx.passes.annotate import ABSENT
from djinn_fx.passes.context import PassContext
from djinn_fx.passes.graph import (
    CASTS,
    ENV,
    MODULE,
    NAMES,
    RESHAPES,
    ancestors,
    aten,
    descendants,
    is_activation,
    output_of,
    placeholders,
    shape_of,
    tensor_of,
)
from djinn_fx.passes.marks import INPUT
from djinn_fx.program import TOKENS, kv_name

KEPT = "djinn_kept"
ATTENTION = "djinn.attention.default"
KV_WRITE = "djinn.kv_write.default"

#: Weight argument and activation argument of the ops that multiply by a weight.
_LINEARS = {
    aten.linear.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.mm.default: (0, 1),
    aten.matmul.default: (0, 1),
}
_THROUGH = RESHAPES | CASTS
_SELECTS = frozenset({aten.slice.Tensor, aten.index.Tensor})
_MOE = "mixture of experts: there is no single down projection"
_NO_TRUNK = (
    "the block's output is not its input plus what attention and MLP add (the residual itself is normalised or scaled)"
)


@dataclass
class _Names:
    """Role names by node and reasons by role, while they are being found."""

    given: dict[fx.Node, list[str]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def give(self, node: fx.Node, name: str) -> None:
        self.given.setdefault(node, []).append(name)

    def lack(self, roles: str, layer: int, reason: str) -> None:
        self.absent.update({f"{role}.{layer}": reason for role in roles.split()})


def assign_roles(gm: fx.GraphModule, ctx: PassContext, *, clone: nn.Module) -> fx.GraphModule:
    """Name the values of a language model by their role."""
    names = _Names()
    attentions = _by_layer(gm, ATTENTION)
    writes = _by_layer(gm, KV_WRITE)
    _name_ends(gm, names)
    for layer, attention in sorted(attentions.items()):
        _name_attention(names, layer, attention, writes.get(layer))
        _name_block(gm, names, layer, attention, clone)
    for node, given in names.given.items():
        node.meta[NAMES] = tuple(dict.fromkeys([*given, *node.meta[NAMES]]))
    gm.meta[ABSENT] = {**gm.meta.get(ABSENT, {}), **names.absent}
    return gm


def _by_layer(gm: fx.GraphModule, target: str) -> dict[int, fx.Node]:
    """The attention or KV nodes by the layer of the arena they use."""
    inputs = placeholders(gm)
    found: dict[int, fx.Node] = {}
    layers = {inputs[name]: index for index in range(len(inputs)) if (name := kv_name(index, "k")) in inputs}
    for node in gm.graph.nodes:
        if str(node.target) == target:
            for argument in node.all_input_nodes:
                if argument in layers:
                    found[layers[argument]] = node
    return found


def _name_ends(gm: fx.GraphModule, names: _Names) -> None:
    """``embed``, ``final_norm`` and ``logits``; stamps the values behind the head's selection."""
    logits = output_of(gm).all_input_nodes[0]
    names.give(logits, "logits")
    logits.meta[KEPT] = True
    head = _head_linear(logits)
    if head is None:
        names.absent["final_norm"] = "the logits are not the output of one linear layer"
    else:
        below, entry = _activation(head), head
        while below.target in _SELECTS or (below.target in RESHAPES and len(shape_of(below)) != 3):
            entry, below = below, below.all_input_nodes[0]
        names.give(below, "final_norm")
        for node in descendants(entry):
            node.meta[KEPT] = True
    embedding = next(
        (n for n in descendants(placeholders(gm)[TOKENS]) if n.target is aten.embedding.default),
        None,
    )
    if embedding is None:
        names.absent["embed"] = "the tokens do not go through an embedding"
    else:
        path = embedding.meta[MODULE]
        marked = [n for n in descendants(embedding) if path in n.meta.get(NAMES, ())]
        names.give(marked[0] if marked else embedding, "embed")


def _head_linear(logits: fx.Node) -> fx.Node | None:
    """The linear layer that makes the logits, seen through softcaps, scales and casts."""
    node = logits
    while node.target not in _LINEARS:
        sources = [n for n in node.all_input_nodes if is_activation(n)]
        if len(sources) != 1:
            return None
        node = sources[0]
    return node


def _activation(linear: fx.Node) -> fx.Node:
    """The activation that a linear layer multiplies by its weight."""
    argument = linear.args[_LINEARS[linear.target][0]]  # type: ignore[index]
    assert isinstance(argument, fx.Node)
    return argument


def _unflattened(node: fx.Node) -> fx.Node:
    """The ``[rows, query, width]`` value behind a ``[rows * query, width]`` view of it, if any."""
    current = node
    while current.target in RESHAPES and isinstance(current.args[0], fx.Node):
        source = current.args[0]
        if tensor_of(source) is None or shape_of(source)[-1:] != shape_of(node)[-1:]:
            break
        current = source
        if current.meta[NAMES] or len(shape_of(current)) == 3:
            return current
    return node


def _name_attention(names: _Names, layer: int, attention: fx.Node, write: fx.Node | None) -> None:
    """``attn_q``, ``attn_k``, ``attn_v`` and ``attn_z``."""
    parts = [("attn_q", attention.args[0])]
    if write is None:
        names.lack("attn_k attn_v", layer, "the layer reads another layer's keys and values")
    else:
        parts += [("attn_k", write.args[2]), ("attn_v", write.args[3])]
    for role, value in parts:
        assert isinstance(value, fx.Node)
        names.give(value, f"{role}.{layer}")
    projection = _first_linear_after(attention)
    if projection is None:
        names.lack("attn_z", layer, "attention's result does not reach an output projection")
    else:
        names.give(_unflattened(_activation(projection)), f"attn_z.{layer}")


def _first_linear_after(attention: fx.Node) -> fx.Node | None:
    reached = {attention}
    node = attention.next
    while node.op != "root":
        if reached.intersection(node.all_input_nodes):
            reached.add(node)
            if node.target in _LINEARS and _activation(node) in reached:
                return node
        node = node.next
    return None


def _name_block(gm: fx.GraphModule, names: _Names, layer: int, attention: fx.Node, clone: nn.Module) -> None:
    """The residual of the block around ``attention`` and what attention and MLP add to it."""
    roles = "resid_pre attn_out resid_mid mlp_out mlp_act resid_post"
    path = block_of(str(attention.meta[MODULE]), clone)
    if path is None:
        return names.lack(roles, layer, "its attention is not inside a ModuleList of blocks")
    pre, post = _named(gm, path + INPUT), _named(gm, path)
    if pre is None or post is None:
        return names.lack(roles, layer, f"block {path} has no single input and output tensor")
    names.give(pre, f"resid_pre.{layer}")
    names.give(post, f"resid_post.{layer}")
    chain = _trunk(post, pre)
    mlp_out: fx.Node | None = None
    if chain is not None and len(chain) == 2:
        mlp_out = _two_additions(names, layer, chain, attention)
    elif chain is not None and len(chain) == 1:
        mlp_out = _one_addition(names, layer, chain[0][1], attention)
    else:
        names.lack("attn_out resid_mid mlp_out mlp_act", layer, _NO_TRUNK)
        return None
    if mlp_out is not None:
        _name_mlp_act(names, layer, mlp_out)
    return None


def block_of(path: str, clone: nn.Module) -> str | None:
    """The outermost child of a ``ModuleList`` on a module path, or None."""
    parts = path.split(".")
    for length in range(1, len(parts)):
        parent = clone.get_submodule(".".join(parts[:length]))
        if isinstance(parent, nn.ModuleList):
            return ".".join(parts[: length + 1])
    return None


def _named(gm: fx.GraphModule, name: str) -> fx.Node | None:
    return next((node for node in gm.graph.nodes if name in node.meta.get(NAMES, ())), None)


def _peel(node: fx.Node) -> fx.Node:
    """Look through views and casts, not past a computed value."""
    while node.target in _THROUGH and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _trunk(post: fx.Node, pre: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
    """The additions ``(sum, what is added)`` that lead from ``pre`` to ``post``, or None."""
    node, goal = _peel(post), _peel(pre)
    if node is goal:
        return []
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return None
    for trunk, other in (node.args, reversed(node.args)):
        if is_activation(trunk) and is_activation(other):
            assert isinstance(trunk, fx.Node)
            assert isinstance(other, fx.Node)
            below = _trunk(trunk, pre)
            if below is not None:
                return [*below, (node, other)]
    return None


def _two_additions(
    names: _Names, layer: int, chain: list[tuple[fx.Node, fx.Node]], attention: fx.Node
) -> fx.Node | None:
    """``pre + x1 = t1``, ``t1 + x2 = post``: sequential, or parallel where x2 does not see t1."""
    (middle, first), (_, second) = chain
    if attention in ancestors(first) and middle in ancestors(second):
        names.give(first, f"attn_out.{layer}")
        names.give(middle, f"resid_mid.{layer}")
        names.give(second, f"mlp_out.{layer}")
        return second
    return _parallel(names, layer, first, second, attention)


def _one_addition(names: _Names, layer: int, added: fx.Node, attention: fx.Node) -> fx.Node | None:
    """``pre + (a + b)``: parallel attention and MLP."""
    inner = _peel(added)
    leaves = [n for n in inner.args if is_activation(n)] if inner.target is aten.add.Tensor else []
    if len(leaves) != 2:
        names.lack("attn_out resid_mid mlp_out mlp_act", layer, _NO_TRUNK)
        return None
    left, right = leaves
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return _parallel(names, layer, left, right, attention)


def _parallel(names: _Names, layer: int, left: fx.Node, right: fx.Node, attention: fx.Node) -> fx.Node | None:
    sees = [attention in ancestors(node) for node in (left, right)]
    if sees[0] == sees[1]:
        names.lack("attn_out resid_mid mlp_out mlp_act", layer, _NO_TRUNK)
        return None
    attn_out, mlp_out = (left, right) if sees[0] else (right, left)
    names.give(attn_out, f"attn_out.{layer}")
    names.give(mlp_out, f"mlp_out.{layer}")
    names.lack(
        "resid_mid",
        layer,
        "parallel block: attention and MLP both read the block's input, nothing lies between them",
    )
    return mlp_out


_ELEMENTWISE = _THROUGH | {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.sub.Tensor,
    aten.pow.Tensor_Scalar,
    aten.mean.dim,
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.neg.default,
}


def _name_mlp_act(names: _Names, layer: int, mlp_out: fx.Node) -> None:
    """``mlp_act``: the input of the one linear layer behind ``mlp_out``."""
    found: set[fx.Node] = set()
    queue, seen = [mlp_out], set()
    while queue:
        node = queue.pop()
        if node in seen or ENV in node.meta:
            continue
        seen.add(node)
        if node.target in _LINEARS:
            found.add(node)
        elif node.target in _ELEMENTWISE:
            queue += node.all_input_nodes
        elif tensor_of(node) is not None:
            return names.lack("mlp_act", layer, _MOE)
    if len(found) != 1:
        return names.lack("mlp_act", layer, _MOE)
    names.give(_unflattened(_activation(found.pop())), f"mlp_act.{layer}")
    return None
