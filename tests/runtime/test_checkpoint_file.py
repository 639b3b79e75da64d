"""Checkpoint files: whole or absent, and no damaged byte goes unnoticed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import djinn_fx as djinn
from djinn_fx.runtime import checkpoint_file
from djinn_fx.runtime.checkpoint import Checkpoint
from djinn_fx.runtime.checkpoint_file import read_file, write_file
from tests.bits import assert_same_bits

DOCUMENT: dict[str, Any] = {"model": {"dtype": "float32"}, "session": {"tokens": [1, 2, 3], "run": None}}
NOISE = torch.linspace(-1, 1, 24)
TENSORS = {
    "kv.0.k": NOISE.view(2, 3, 4),
    "kv.0.v": torch.zeros(2, 0, 4),
    "bf16": NOISE[:7].bfloat16(),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(float("nan")),
    "int": torch.arange(5),
    "transposed": NOISE.view(4, 6).t(),
    "a view": NOISE[3:9],
    "the same view": NOISE[3:9],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(write_file(tmp_path / "a.safetensors", DOCUMENT, TENSORS))


def test_what_is_read_is_what_was_written(path: Path) -> None:
    document, tensors = read_file(path)
    assert document == DOCUMENT
    assert list(path.parent.iterdir()) == [path]
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert_same_bits(tensors[name], tensor, name)


def test_any_safetensors_reader_opens_it(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert file.metadata()["djinn_format"] == "1"
        assert torch.equal(file.get_tensor("int"), torch.arange(5))


# -- damage ------------------------------------------------------------------------------------


def test_every_truncation_is_noticed(path: Path) -> None:
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    lengths = {*range(0, 24), header - 1, header, header + 1, len(whole) - 1, *range(24, len(whole), 37)}
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(djinn.CheckpointError) as caught:
            Checkpoint.load(path)
        if length >= header:
            assert f"cut off: {length} bytes instead of {len(whole)}" in str(caught.value)
        elif length > 10:
            assert f"cut off after {length} bytes. Restore from another copy" in str(caught.value)


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_every_flipped_byte_is_noticed(path: Path, mask: int) -> None:
    whole = bytearray(path.read_bytes())
    data = len(whole) - sum(tensor.nbytes for tensor in TENSORS.values())
    for place in {*range(8), *range(8, len(whole), 11), *range(data, len(whole), 5)}:
        whole[place] ^= mask
        path.write_bytes(whole)
        whole[place] ^= mask
        with pytest.raises(djinn.CheckpointError) as caught:
            Checkpoint.load(path)
        assert place < data or "does not match its checksum" in str(caught.value)


def test_a_blank_that_becomes_another_blank_is_noticed(tmp_path: Path) -> None:
    for count in range(16):  # until the header's length asks for padding
        path = Path(write_file(tmp_path / "a", {"filler": "x" * count}, TENSORS))
        whole = path.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        if whole[end - 1 : end] == b" ":
            break
    path.write_bytes(whole[: end - 1] + b"\n" + whole[end:])
    with pytest.raises(djinn.CheckpointError, match="header does not match its checksum"):
        Checkpoint.load(path)


def test_bytes_at_the_end_are_noticed(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(djinn.CheckpointError, match="longer than it was written"):
        Checkpoint.load(path)


def test_another_format_is_named(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"djinn_format":"1"', b'"djinn_format":"7"'))
    with pytest.raises(djinn.CheckpointError, match="of format 7; this version of djinn_fx reads format 1"):
        Checkpoint.load(path)


@pytest.mark.parametrize("content", [b"a letter to my aunt, not a session", b"\0" * 64, b"\xff" * 64, b"PK\3\4" * 99])
def test_what_is_no_checkpoint_is_called_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(djinn.CheckpointError, match="not a djinn_fx checkpoint"):
        Checkpoint.load(tmp_path / "x")


def test_weights_are_no_checkpoint(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "w.safetensors", {"format": "pt"})
    with pytest.raises(djinn.CheckpointError, match="not a djinn_fx checkpoint"):
        Checkpoint.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["missing", "."])
def test_what_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(djinn.CheckpointError, match="cannot read the checkpoint"):
        Checkpoint.load(tmp_path / name)


# -- writing -----------------------------------------------------------------------------------


def fail(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    before = path.read_bytes()
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(djinn.CheckpointError, match=r"cannot write .*No space left on device.* Nothing changed"):
        write_file(path, {"other": 1}, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(djinn.CheckpointError, match=r"No such file or directory\. Nothing changed.*the folder exists"):
        write_file(tmp_path / "no" / "a.safetensors", DOCUMENT, TENSORS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(djinn.CheckpointError, match="cannot write"):
        write_file(tmp_path / "a", DOCUMENT, TENSORS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_history_beyond_the_format_is_refused_when_saved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint_file, "LONGEST_HEADER", 500)
    with pytest.raises(djinn.CheckpointError, match="a header holds 500"):
        write_file(path, DOCUMENT, TENSORS)
    assert path.read_bytes() == before


def test_the_file_is_on_the_disk_before_it_has_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(seen, name, getattr(os, name)))
    write_file(path, DOCUMENT, TENSORS)
    assert seen == ["fsync", "replace", "fsync"]


def noted(seen: list[str], name: str, call: Callable[..., None]) -> Callable[..., None]:
    def act(*given: object) -> None:
        seen.append(name)
        call(*given)

    return act


def test_whoever_may_read_other_new_files_may_read_it(path: Path) -> None:
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
