"""Philox4x32-10 against the published vectors and a second writing of it in Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from djinn_fx.kernels.philox import philox, uniform

INT64 = st.integers(-(2**63), 2**63 - 1)

# github.com/DEShawResearch/random123, tests/kat_vectors: counter, key, block.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def block(counter: list[int], key: list[int]) -> list[int]:
    """The paper's round function, word by word."""
    (c0, c1, c2, c3), (k0, k1), mask = counter, key, 0xFFFFFFFF
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & mask, first >> 32 ^ c3 ^ k1, first & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def number(seed: int, position: int) -> float:
    counter, key = ([value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF] for value in (position, seed))
    first, second, _, _ = block([*counter, 0, 0], key)
    return ((first >> 5) * 2**26 + (second >> 6)) / 2**53


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
@pytest.mark.parametrize("batch", [(), (1,), (37,)])  # scalar and vector code of the CPU
def test_known_answers(counter: str, key: str, expected: str, batch: tuple[int, ...], device: str) -> None:
    def spread(text: str) -> torch.Tensor:
        values = torch.tensor(words(text), device=device)
        return values.view(-1, *(1,) * len(batch)).expand(-1, *batch)

    assert torch.equal(philox(spread(counter), spread(key)), spread(expected))
    assert block(words(counter), words(key)) == words(expected)


@given(st.lists(st.tuples(INT64, INT64), min_size=1, max_size=9))
def test_uniform_is_a_function_of_seed_and_position(pairs: list[tuple[int, int]]) -> None:
    seeds, positions = torch.tensor(pairs).unbind(1)
    found = uniform(seeds, positions)
    assert found.dtype == torch.float64
    assert found.tolist() == [number(*pair) for pair in pairs]
    assert all(0 <= draw < 1 for draw in found.tolist())


@pytest.mark.gpu
def test_devices_draw_the_same() -> None:
    seeds, positions = torch.randint(-(2**62), 2**62, (2, 1000))
    assert torch.equal(uniform(seeds.cuda(), positions.cuda()).cpu(), uniform(seeds, positions))


def test_draws_are_uniform_along_seeds_and_positions() -> None:
    bins, count = 64, 8_000
    index, zero = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    for draws in (uniform(index, zero + 5), uniform(zero + 7, index)):
        hits = torch.bincount((draws * bins).long(), minlength=bins)
        chi_square = ((hits - count / bins) ** 2 / (count / bins)).sum().item()
        assert chi_square < 120  # 63 degrees of freedom: exceeded once in 50,000
        neighbours = torch.corrcoef(torch.stack((draws[:-1], draws[1:])))[0, 1].item()
        assert abs(neighbours) < 5 / count**0.5
