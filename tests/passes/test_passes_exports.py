"""A graph kept on disk is the graph that was exported, and a cache is never in the way."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from djinn_fx.passes import pipeline
from djinn_fx.passes.codec import Captured, Unsaid, decode, encode
from djinn_fx.passes.context import PassContext
from djinn_fx.passes.exports import VARIABLE, ExportCache
from djinn_fx.passes.fakes import UnknownFake
from djinn_fx.passes.graph import ENV, WEIGHT, aten, propagate, storage_of, tensor_of
from djinn_fx.passes.lower import compile_class
from djinn_fx.passes.pipeline import CaptureStore, build, discover
from djinn_fx.passes.source import prepare
from djinn_fx.passes.tables import site_table
from djinn_fx.program import PassRecord, Program
from djinn_fx.specs import ProgramShape, Variant
from tests.passes.tiny import Machine, same_bits, tiny_model

SHAPE = ProgramShape(2, 6, 2)


def form(value: Any) -> Any:
    """What a fake value is, but for its storage."""
    if isinstance(value, (list, tuple)):
        return [type(value), *map(form, value)]
    if not isinstance(value, torch.Tensor):
        return value
    numbers = (value.shape, value.stride(), value.storage_offset(), value.untyped_storage().nbytes())
    return (*numbers, value.dtype, value.device, value.requires_grad)


def storages(gm: fx.GraphModule) -> list[int]:
    """For each value the first one that shares its storage, so that two graphs can be compared."""
    values: list[torch.Tensor] = []
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        values += [each for each in (value if isinstance(value, (list, tuple)) else [value]) if each is not None]
    first: dict[int, int] = {}
    return [first.setdefault(value.untyped_storage()._cdata, i) for i, value in enumerate(values)]


def said(value: Any) -> Any:
    """Arguments with nodes by their names."""
    return fx.map_arg(value, lambda node: f"%{node.name}")


def assert_same_graph(left: fx.GraphModule, right: fx.GraphModule) -> None:
    pairs = list(zip(left.graph.nodes, right.graph.nodes, strict=True))
    for one, two in pairs:
        assert (one.op, one.name, one.target, one.type) == (two.op, two.name, two.target, two.type)
        assert repr(said((one.args, one.kwargs))) == repr(said((two.args, two.kwargs)))
        assert one.meta.keys() == two.meta.keys()
        for key in one.meta.keys() - {"val", WEIGHT}:
            assert one.meta[key] == two.meta[key], (one, key)
            assert type(one.meta[key]) is type(two.meta[key])
        assert form(one.meta.get("val")) == form(two.meta.get("val")), one
        if WEIGHT in one.meta:
            ours, theirs = one.meta[WEIGHT], two.meta[WEIGHT]
            assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
            own = one.meta[ENV].startswith("w.")
            assert ours.data_ptr() == theirs.data_ptr() if own else torch.equal(ours, theirs)
    assert storages(left) == storages(right)
    assert left.meta == right.meta
    assert compile_class(left) == compile_class(right)


def timeless(records: tuple[PassRecord, ...]) -> list[PassRecord]:
    return [replace(record, seconds=0.0) for record in records]


def captures(machine: Machine, shape: ProgramShape, exports: ExportCache) -> Captured:
    store = CaptureStore()
    build(
        *(machine.source, shape),
        sites=machine.table.select("resid_post"),
        variant="plain",
        rank=0,
        arenas=machine.arenas,
        store=store,
        exports=exports,
    )
    return next(iter(store.captured.values()))


def program(machine: Machine, captured: Captured, variant: Variant, **options: Any) -> Program:
    key = (SHAPE.rows, SHAPE.query, tuple((k.shape, v.shape) for k, v in machine.arenas))
    return build(
        *(machine.source, SHAPE),
        sites=machine.table.select("resid_post"),
        variant=variant,
        rank=2 * (variant == "rank"),
        arenas=machine.arenas,
        store=CaptureStore({key: captured}),
        **options,
    )


@pytest.mark.parametrize(
    "case", ["llama", "llama-tied", "gpt2", "gemma3", "mixtral", "gpt_oss", "deepseek_v3", "opt", "bitnet"]
)
@torch.no_grad()
def test_a_restored_graph_is_the_exported_one(case: str, tmp_path: Path) -> None:
    machine, exports = Machine(tiny_model(case)), ExportCache(tmp_path)
    exported = captures(machine, SHAPE, exports)
    assert len(list(tmp_path.iterdir())) == 1, "it was not kept"
    restored = captures(machine, SHAPE, exports)
    assert restored is not exported
    assert restored.records == exported.records
    assert_same_graph(exported.graph, restored.graph)
    ctx = PassContext("lm", SHAPE, machine.source.dtype)
    assert site_table(exported.graph, ctx) == site_table(restored.graph, ctx)
    for variant, cuts in (("plain", "layers"), ("rank", "sites")):
        one, two = (program(machine, each, variant, cuts=cuts) for each in (exported, restored))  # type: ignore[arg-type]
        assert timeless(one.records) == timeless(two.records)
        for ours, theirs in zip(one.segments, two.segments, strict=True):
            assert replace(ours, run=theirs.run, graph=theirs.graph) == theirs
            assert_same_graph(ours.graph, theirs.graph)
    steps = [(0, 0, [3, 4, 5, 6]), (1, 0, [7, 8, 9, 10, 11, 12])]
    logits = [machine.logits(each, steps) for each in (one, two)]
    assert logits[0].abs().sum() > 0
    assert same_bits(*logits)


def test_a_second_process_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as one process can show it: another copy of the model, prepared anew, finds what the first one left."""
    exports = ExportCache(tmp_path)
    table = discover(prepare(tiny_model("gpt2")), exports=exports)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an export")

    monkeypatch.setattr(pipeline, "_export", refuse)
    assert discover(prepare(tiny_model("gpt2")), exports=exports) == table
    with pytest.raises(AssertionError, match="an export"):
        discover(prepare(tiny_model("gpt2", layer_norm_epsilon=1e-3)), exports=exports)


@torch.no_grad()
def test_a_restored_graph_reads_the_models_own_weights(tmp_path: Path) -> None:
    """Those of the model at hand, not those of the model that was exported; changes in place are seen."""
    exports = ExportCache(tmp_path)
    captures(Machine(tiny_model("llama")), SHAPE, exports)
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.mul_(1.5)
    machine = Machine(model)
    found = program(machine, captures(machine, SHAPE, exports), "plain")
    model.lm_head.weight.mul_(2.0)
    tokens = [3, 4, 5, 6]
    expected = model(torch.tensor([tokens])).logits[0, -2:]
    torch.testing.assert_close(machine.logits(found, [(0, 0, tokens)])[0], expected, atol=1e-5, rtol=0)


class Constant(nn.Module):
    """Stands in for a model whose forward makes tensors of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([1.0, 2.0, 4.0])


def test_constants_made_by_tracing_are_kept() -> None:
    source = prepare(Constant().eval(), (torch.ones(2, 3),))
    store = CaptureStore()
    discover(source, store)
    (captured,) = store.captured.values()
    captured.graph.meta.pop("djinn_rebuild")
    source.clone.register_parameter("device", nn.Parameter(torch.zeros(1)))
    document, constants = encode(captured, source.clone)
    assert [tensor.tolist() for tensor in constants.values()] == [[1.0, 2.0, 4.0]]
    assert_same_graph(captured.graph, decode(document, constants, source.clone).graph)


def test_what_cannot_be_said_is_not_kept(tmp_path: Path) -> None:
    machine = Machine(tiny_model("gpt2"))
    (captured,) = machine.store.captured.values()
    clone, exports = machine.source.clone, ExportCache(tmp_path)
    assert exports.save("right", captured, clone)
    node = next(node for node in captured.graph.graph.nodes if node.target is aten.add.Tensor)
    before = node.args
    node.args = (*before[:2], object())
    with pytest.raises(Unsaid, match="object"):
        encode(captured, clone)
    node.args, node.target = before, len
    with pytest.raises(Unsaid, match="len"):
        encode(captured, clone)
    node.target, node.meta["odd"] = aten.add.Tensor, 1
    with pytest.raises(Unsaid, match="odd"):
        encode(captured, clone)
    value, node.meta["val"] = node.meta.pop("odd") and node.meta["val"], object()
    with pytest.raises(UnknownFake):
        encode(captured, clone)
    assert not exports.save("wrong", captured, clone)
    node.meta["val"] = value
    assert [path.stem for path in tmp_path.iterdir()] == ["right"]


def test_a_document_cannot_name_arbitrary_code() -> None:
    machine = Machine(tiny_model("gpt2"))
    (captured,) = machine.store.captured.values()
    document, constants = encode(captured, machine.source.clone)
    node = next(node for node in document["nodes"] if node[0] == "call_function")
    for name in ("os.system", "builtins.eval", "aten.add", "torch.ops.load_library", "aten.add.Nonsense"):
        node[2] = name
        with pytest.raises(Unsaid, match="no op"):
            decode(document, constants, machine.source.clone)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_file_is_ignored_and_written_again(damage: str, tmp_path: Path) -> None:
    machine, exports = Machine(tiny_model("gpt2")), ExportCache(tmp_path)
    captures(machine, SHAPE, exports)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"cut": content[:middle], "flipped": flipped, "empty": b"", "text": b"no tensors"}[damage])
    assert exports.load(path.stem, machine.source.clone) is None
    captures(machine, SHAPE, exports)
    assert exports.load(path.stem, machine.source.clone) is not None


def test_a_file_under_another_key_is_ignored(tmp_path: Path) -> None:
    """Sound files that were exchanged are no files."""
    machine, exports = Machine(tiny_model("gpt2")), ExportCache(tmp_path)
    (captured,) = machine.store.captured.values()
    clone = machine.source.clone
    for key in ("one", "two"):
        assert exports.save(key, captured, clone)
        assert exports.load(key, clone) is not None
    os.replace(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert exports.load("one", clone) is exports.load("two", clone) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    machine = Machine(tiny_model("gpt2"))
    captured = captures(machine, SHAPE, ExportCache(tmp_path / "file"))
    assert len(captured.graph.graph.nodes) > 10
    assert not ExportCache(tmp_path / "file").save("key", captured, machine.source.clone)


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    machine = Machine(tiny_model("gpt2"))
    (captured,) = machine.store.captured.values()
    exports, clone = ExportCache(tmp_path), machine.source.clone
    for index in range(3):
        exports.save(str(index), captured, clone)
        os.utime(tmp_path / f"{index}.safetensors", (index, index))
    size = (tmp_path / "0.safetensors").stat().st_size
    assert exports.load("0", clone) is not None  # from here on it is the one used last
    draft = tmp_path / ".old.tmp"
    draft.touch()
    os.utime(draft, (0, 0))
    ExportCache(tmp_path, most_bytes=3 * size).save("3", captured, clone)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["0", "2", "3"]


def test_the_environment_says_where(tmp_path: Path) -> None:
    def folder(**environment: str) -> Path | None:
        found = ExportCache.from_environment(environment)
        return None if found is None else found.folder

    assert folder(DJINN_CACHE_DIR="off") is folder(DJINN_CACHE_DIR="") is None
    assert folder(DJINN_CACHE_DIR=str(tmp_path)) == tmp_path
    assert folder(DJINN_CACHE_DIR="~nosuchuser/x") is None
    assert folder(XDG_CACHE_HOME=str(tmp_path)) == tmp_path / "djinn_fx" / "exports"
    assert folder() == Path.home() / ".cache" / "djinn_fx" / "exports"
    assert ExportCache.from_environment() is None, f"tests must not write to the user's cache: set {VARIABLE}"


@pytest.mark.parametrize("case", ["llama", "gpt2", "mixtral", "gemma3", "deepseek_v3", "opt"])
def test_no_fake_value_is_out_of_date(case: str) -> None:
    """Annotate recomputes those that may have changed; recomputing all changes nothing."""
    (captured,) = Machine(tiny_model(case)).store.captured.values()
    nodes = list(captured.graph.graph.nodes)
    before, shared = [form(node.meta.get("val")) for node in nodes], storages(captured.graph)
    mode = next(value.fake_mode for node in nodes if (value := tensor_of(node)) is not None)
    saved = [node.meta.get("val") for node in nodes]
    try:
        for node in nodes:
            if node.op == "call_function":
                propagate(node, mode)
        assert [form(node.meta.get("val")) for node in nodes] == before
        assert storages(captured.graph) == shared
        assert len({storage_of(node) for node in nodes}) > 10
    finally:
        for node, value in zip(nodes, saved, strict=True):
            if "val" in node.meta:
                node.meta["val"] = value
