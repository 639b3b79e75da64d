"""Fingerprints: equal for equal bits only, and what an environment is compared by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from djinn_fx.runtime import fingerprint as module
from djinn_fx.runtime.fingerprint import digest, environment_differences, fingerprint, model_differences

MASK = (1 << 64) - 1


def by_hand(data: bytes) -> int:
    """The hash as SplitMix64's finalizer defines it, in Python's integers."""
    data += b"\0" * (-len(data) % 8)
    total = 0
    for index in range(len(data) // 8):
        z = int.from_bytes(data[8 * index : 8 * index + 8], "little")
        z = (z + (index + 1) * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        total += z ^ (z >> 31)
    return total & MASK


def mark(tensor: torch.Tensor) -> str:
    return fingerprint({"w": tensor})["w"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (40, 33)])
def test_it_is_the_hash_of_the_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert mark(tensor).split()[-1] == f"{by_hand(data):016x}"


def test_chunks_and_layout_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(91, 7)
    expected = mark(tensor)
    assert mark(tensor.t().contiguous().t()) == expected
    assert mark(torch.cat([tensor[:1], tensor])[1:]) == expected, "an unaligned view"
    monkeypatch.setattr(module, "CPU_CHUNK", 16)
    assert mark(tensor) == expected


def test_every_bit_place_shape_dtype_and_name_matters() -> None:
    tensor = torch.randn(6, 4)
    bits = tensor.view(torch.int32)
    others = [tensor.flip(0), tensor.view(4, 6), bits, -tensor, tensor[[1, 0, 2, 3, 4, 5]]]
    others += [(bits ^ (1 << bit)).view(torch.float32) for bit in range(31)]
    assert len({mark(other) for other in [tensor, *others]}) == len(others) + 1
    assert mark(torch.tensor([0.0, -0.0])) != mark(torch.tensor([-0.0, 0.0]))
    assert digest({"a": "x", "b": "y"}) == digest({"b": "y", "a": "x"}) != digest({"a": "y", "b": "x"})


SAVED: dict[str, Any] = {"torch": "2", "compiled sites": ["a", "b"], "batch_invariant": False, "max_sessions": 8}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"torch": "3"}, ["torch: '2' in the checkpoint, '3' here"]),
        ({"threads": 2}, ["threads: None in the checkpoint, 2 here"]),
        ({"compiled sites": ["b", "c"]}, ["sites not compiled here: a", "sites only compiled here: c"]),
        ({"max_sessions": 4}, []),
        ({"batch_invariant": True, "max_sessions": 4}, ["batch_invariant: False in the checkpoint, True here"]),
    ],
)
def test_environments(change: dict[str, Any], expected: list[str]) -> None:
    assert environment_differences(SAVED, {**SAVED, **change}) == expected


def test_rows_matter_where_every_step_has_them() -> None:
    then = {**SAVED, "batch_invariant": True}
    found = environment_differences(then, {**then, "max_sessions": 4})
    assert found == ["max_sessions: 8 in the checkpoint, 4 here"]


def test_models() -> None:
    saved = {"model_type": "a", "dtype": "x", "kv": [[1, 2, 2]], "config": {"depth": 3, "nested": {"width": 1}}}
    here = {**saved, "config": {"depth": 3, "nested": {"width": 2}, "new": None}}
    assert model_differences(saved, saved) == []
    assert model_differences(saved, here) == ["config.nested: {'width': 1} in the checkpoint, {'width': 2} here"]
    assert model_differences(saved, {**saved, "dtype": "y"}) == ["dtype: 'x' in the checkpoint, 'y' here"]
