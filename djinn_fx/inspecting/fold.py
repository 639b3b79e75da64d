"""Lines of a recorded graph, or of what a pass did to it, cut into layers; equal layers are folded.

Layers are told by the paths of modules (``model.layers.6.self_attn`` belongs to layer 6 of ``model.layers``). Two
layers are equal if their lines are, once every number of a layer is replaced by its distance from the layer's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from typing import Literal

from djinn_fx.inspecting.names import substitute
from djinn_fx.program import LiveInfo, NodeInfo, PassRecord, SegmentInfo

Tag = Literal["same", "made", "removed", "changed", "segment", "yield"]
#: A list of blocks and the number of a block in it.
Layer = tuple[str, int]

_LAYER = re.compile(r"(.*?)\.(\d+)(?:\.|$)")
_LITERAL = re.compile(r"'([^']*)'")
_ROLE = re.compile(r"([a-z_]\w*)\.(\d+)((?:[:.]\w+)?)")


@dataclass(frozen=True)
class Line:
    """One line: a node before and after a pass, or where a segment begins or yields.

    Attributes:
        tag: what became of the node; ``"same"`` throughout where a graph is shown alone.
        before: the node in the graph before, or None.
        after: the node in the graph after, or None.
        segment: of a ``"segment"`` or ``"yield"`` line.
    """

    tag: Tag
    before: NodeInfo | None = None
    after: NodeInfo | None = None
    segment: SegmentInfo | None = None

    @property
    def node(self) -> NodeInfo | None:
        """The node, as it is after the pass if it is still there."""
        return self.after or self.before


@dataclass(frozen=True)
class Block:
    """Lines of one layer, or between layers.

    Attributes:
        layer: whose lines; None between layers.
        lines: the lines.
        equals: layers right behind this one whose lines are the same.
    """

    layer: Layer | None
    lines: tuple[Line, ...]
    equals: tuple[Layer, ...] = ()


def layer_of(module: str) -> Layer | None:
    """The layer that a module belongs to, by the first number in its path."""
    match = _LAYER.match(module)
    return (match[1], int(match[2])) if match else None


def graph_lines(infos: Sequence[NodeInfo], segments: Sequence[SegmentInfo] = ()) -> list[Line]:
    """The lines of one graph; inputs are left out."""
    found = (Line("same", after=info) for info in infos if info.op in ("call_function", "call_module", "output"))
    return list(_with_segments(found, segments))


def diff_lines(record: PassRecord) -> list[Line]:
    """The lines of what a pass did, by origin: both graphs merged; inputs are left out."""
    before, after = ([i for i in side if i.op != "placeholder"] for side in (record.before, record.after))
    before = [info for info in before if info.op != "call_module"]
    was = {info.origin: info for info in before}
    is_now = {info.origin for info in after}
    lines: list[Line] = []
    matcher = SequenceMatcher(None, [i.origin for i in before], [i.origin for i in after], autojunk=False)
    for _, i1, i2, j1, j2 in matcher.get_opcodes():
        # What only moved is shown where it went to.
        lines += [Line("removed", before=info) for info in before[i1:i2] if info.origin not in is_now]
        for info in after[j1:j2]:
            old = was.get(info.origin)
            lines.append(Line("made" if old is None else "changed" if differs(old, info) else "same", old, info))
    return list(_with_segments(lines, record.segments))


def differs(one: NodeInfo, two: NodeInfo) -> bool:
    """Whether a node is another after a pass; its own name does not count."""
    return any(
        getattr(one, part) != getattr(two, part) for part in ("target", "args", "module", "site", "shape", "dtype")
    )


def _with_segments(lines: Iterable[Line], segments: Sequence[SegmentInfo]) -> Iterator[Line]:
    """Put a line before the first node of each segment and one behind its last."""
    by_name = {segment.name: segment for segment in segments}
    current: SegmentInfo | None = None
    for line in lines:
        op = line.node.op if line.node is not None else ""
        if op in ("call_module", "output") and current is not None:
            yield Line("yield", segment=current)
            current = None
        if op == "call_module":
            assert line.node is not None
            current = by_name.get(line.node.target)
            if current is not None:
                yield Line("segment", segment=current)
        else:
            yield line


def blocks(
    lines: Sequence[Line], inputs: Mapping[int, str], keep: Iterable[int] | None = None, *, folded: bool = True
) -> list[Block]:
    """Cut lines into layers and fold equal neighbours.

    Args:
        lines: of a graph or of a diff.
        inputs: environment names of the graph's inputs by origin.
        keep: indices of the lines that are wanted; None: all.
        folded: whether to fold.
    """
    layers = _layers(lines)
    places: dict[int, tuple[Layer | None, int]] = {}
    counts: dict[Layer | None, int] = {}
    for line, layer in zip(lines, layers, strict=True):
        if line.node is not None:
            places[line.node.origin] = (layer, counts.get(layer, 0))
            counts[layer] = counts.get(layer, 0) + 1
    chosen = range(len(lines)) if keep is None else sorted(set(keep))
    cut: list[tuple[Layer | None, list[Line]]] = []
    for index in chosen:
        if not cut or cut[-1][0] != layers[index]:
            cut.append((layers[index], []))
        cut[-1][1].append(lines[index])
    found: list[tuple[Block, tuple[object, ...]]] = []
    for layer, own in cut:
        said = partial(_place, places=places, inputs=inputs, layer=layer)
        signature = tuple(_signature(line, layer, said) for line in own)
        last = found[-1] if found else None
        if folded and last is not None and layer is not None and last[1] == signature and _follows(last[0], layer):
            found[-1] = (Block(last[0].layer, last[0].lines, (*last[0].equals, layer)), signature)
        else:
            found.append((Block(layer, tuple(own)), signature))
    return [block for block, _ in found]


def _follows(block: Block, layer: Layer) -> bool:
    last = block.equals[-1] if block.equals else block.layer
    return last is not None and last[0] == layer[0] and last[1] + 1 == layer[1]


def _layers(lines: Sequence[Line]) -> list[Layer | None]:
    """The layer of each line: a segment's first line goes with what follows, a yield with what came before."""
    found: list[Layer | None] = [None] * len(lines)
    for index, line in enumerate(lines):
        if line.node is not None and line.node.op != "output":
            found[index] = layer_of(line.node.module)
        elif line.tag == "yield":
            found[index] = found[index - 1] if index else None
    for index in range(len(lines) - 2, -1, -1):
        if lines[index].tag == "segment":
            found[index] = found[index + 1]
    return found


def relative(name: str, layer: Layer | None) -> str:
    """A name with the number of a layer replaced by its distance from ``layer``'s."""
    if layer is None:
        return name
    prefix, number = layer
    kind = ""
    if name.startswith(("w.", "c.")):
        kind, name = name[:2], name[2:]
    if name.startswith(f"{prefix}."):
        match = re.match(r"(\d+)(.*)", name.removeprefix(f"{prefix}."))
        if match:
            return f"{kind}{prefix}.*{int(match[1]) - number}{match[2]}"
    match = _ROLE.fullmatch(name)
    if match and not kind and match[1] != "v":
        return f"{match[1]}.*{int(match[2]) - number}{match[3]}"
    return kind + name


def _place(
    origin: int, *, places: Mapping[int, tuple[Layer | None, int]], inputs: Mapping[int, str], layer: Layer | None
) -> str:
    """Where a value is made, as seen from ``layer``."""
    if origin not in places:
        return relative(inputs[origin], layer) if origin in inputs else f"%{origin}"
    where, rank = places[origin]
    if where is None or layer is None or where[0] != layer[0]:
        return f"@{origin}"
    return f"#{where[1] - layer[1]}.{rank}"


def _signature(line: Line, layer: Layer | None, said: partial[str]) -> object:
    if line.segment is not None:
        segment = line.segment
        live = () if line.tag == "segment" else tuple(_live(value, layer, said) for value in segment.live)
        return line.tag, relative(segment.site, layer), live, segment.compile_class, segment.weights
    return line.tag, _node(line.before, layer, said), _node(line.after, layer, said)


def _node(info: NodeInfo | None, layer: Layer | None, said: partial[str]) -> object:
    if info is None:
        return None
    names = tuple(relative(name, layer) for name in info.site.split())
    args = _LITERAL.sub(lambda match: repr(relative(match[1], layer)), substitute(info.args, said))
    return info.target, args, relative(info.module, layer), names, info.shape, info.dtype


def _live(value: LiveInfo, layer: Layer | None, said: partial[str]) -> object:
    name = said(value.origin) if value.name.startswith("v.") else relative(value.name, layer)
    alias = None if value.alias_of is None else relative(value.alias_of, layer)
    return name, value.shape, value.dtype, relative(value.made_by, layer), alias
