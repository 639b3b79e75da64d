"""Calls on whole prompts: forward, caches, hooks, the logit lens and the first NaN, in the layout given."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

import djinn_fx as djinn
from djinn_fx.runtime.kept import Kept
from tests.bits import assert_same_bits, same_bits
from tests.runtime.tiny import CHUNK, WIDTH, logits_of, make_model, model_of, prompt

LENGTHS = (5, 21, 1, 16)
PROMPTS = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
SITES = ["embed", "attn_z.0", "resid_post.*", "mlp_act.1", "final_norm", "logits"]


def padded(side: str) -> dict[str, Tensor]:
    """The prompts as a tokenizer pads them, with ids at the pads that must not matter."""
    ids, mask = torch.full((4, 21), 63), torch.zeros(4, 21, dtype=torch.int64)
    for row, tokens in enumerate(PROMPTS):
        where = slice(0, len(tokens)) if side == "right" else slice(21 - len(tokens), 21)
        ids[row, where], mask[row, where] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


def rows_of(layout: dict[str, Tensor], value: Tensor) -> list[Tensor]:
    """Each prompt's part of a value ``[4, 21, ...]``; the rest must be zeros."""
    mask = layout["attention_mask"].bool()
    assert not bool(value[~mask].any()), "something stands at the pads"
    return [row[seen] for row, seen in zip(value, mask, strict=True)]


def near(a: Tensor, b: Tensor) -> None:
    """Equal but for what another batch's matrix kernels round otherwise."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_and_cache_of_padded_prompts(one: djinn.Dj, side: str) -> None:
    layout = padded(side)
    logits, cache = one.run_with_cache(BatchEncoding(layout), SITES)
    assert logits is not None
    assert_same_bits(one(layout).logits, logits)
    for index, tokens in enumerate(PROMPTS):
        alone, alone_cache = one.run_with_cache(tokens, SITES)
        assert alone is not None
        near(rows_of(layout, logits)[index], alone[0])
        for name in cache:
            near(rows_of(layout, cache[name])[index], alone_cache[name][0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_is_that_of_transformers(both: djinn.Dj, side: str) -> None:
    model = model_of("gpt2" if "transformer.wpe" in both.sites.names else "llama")
    layout = padded(side)
    positions = (layout["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(**layout, position_ids=positions).logits
    expected[layout["attention_mask"] == 0] = 0
    near(both(layout).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_hooks_see_and_change_the_layout_given(one: djinn.Dj, side: str) -> None:
    layout, seen = padded(side), []

    def hook(value: Tensor, hook: Any) -> Tensor:
        seen.append((hook.name, hook.layer, value.clone()))
        return torch.where(value == 0, 77.0, value) + 1  # what is put at the pads goes nowhere

    logits = one.run_with_hooks(layout, [("resid_post.0", hook)])
    assert logits is not None
    ((name, layer, value),) = seen
    assert (name, layer, value.shape) == ("resid_post.0", 0, (4, 21, WIDTH))
    rows_of(layout, value)
    for index, tokens in enumerate(PROMPTS):
        alone = one.run_with_hooks(tokens, [("blocks.0.hook_resid_post", lambda value: value + 1)])
        assert alone is not None
        near(rows_of(layout, logits)[index], alone[0])


def test_a_hook_may_call_its_arguments_what_it_likes(one: djinn.Dj) -> None:
    hooks: list[Any] = [
        lambda value, hook: value * 2 if hook.name == "resid_post.0" else None,
        lambda value: value * 2,
        lambda v, h: v * 2 if h.layer == 0 else None,
        lambda v, h=3: v * 2 if h == 3 else None,
    ]
    found = [one.run_with_hooks([3, 4, 5], [("resid_post.0", hook)]) for hook in hooks]
    for logits in found:
        assert logits is not None and found[0] is not None
        assert_same_bits(logits, found[0])


def test_lists_tensors_and_mappings_are_the_same_prompt(one: djinn.Dj) -> None:
    ids = prompt(9)
    expected = one(ids).logits
    assert expected.shape == (1, 9, 64)
    mapping = {"input_ids": ids[None], "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    for inputs in (ids.tolist(), ids[None], ids.int(), [ids.tolist()], mapping, BatchEncoding(mapping), [mapping]):
        assert_same_bits(one(inputs).logits, expected)
        with one.session() as s:
            assert_same_bits(s.forward(inputs).result().logits, expected[0])
    assert one([ids.tolist(), ids.tolist()[:3]]).logits.shape == (2, 9, 64)


def test_a_forward_call_is_a_session_bit_for_bit(dj: djinn.Dj) -> None:
    for length in (1, CHUNK, 2 * CHUNK + 3):
        with dj.session() as s:
            assert_same_bits(logits_of(s, prompt(length)), dj(prompt(length)).logits[0])


# -- caches --------------------------------------------------------------------------------------


def test_positions_of_a_cache(one: djinn.Dj) -> None:
    layout = padded("left")
    whole = rows_of(layout, one.run_with_cache(layout)[1]["resid_post.0"])

    def kept(positions: Any) -> Tensor:
        return one.run_with_cache(layout, "resid_post.0", positions=positions, logits=False)[1]["resid_post.0"]

    assert_same_bits(kept(0), torch.stack([row[:1] for row in whole]))
    assert_same_bits(kept(-1), torch.stack([row[-1:] for row in whole]))
    assert_same_bits(kept("last_prompt"), kept(-1))
    assert_same_bits(kept([0, -1]), torch.stack([row[[0, -1]] for row in whole]))
    assert_same_bits(kept(slice(-1, None)), kept(-1))
    assert_same_bits(kept("prompt"), kept(None))
    for positions, why in ((1, "position 1 is outside a prompt of 1 tokens"), ([-2], "-2 is outside")):
        with pytest.raises(djinn.InvalidValue, match=why):
            kept(positions)
    with pytest.raises(djinn.InvalidValue, match="different numbers of positions"):
        kept(slice(0, 4))


def test_logits_may_be_left_out_or_only_the_last(one: djinn.Dj) -> None:
    layout = padded("right")
    whole = rows_of(layout, one(layout).logits)
    for count in (1, True, False):
        logits, cache = one.run_with_cache(layout, "resid_post", logits=count)
        assert set(cache) == {"resid_post.0", "resid_post.1"}
        if count is False:
            assert logits is None
        elif count is True:
            assert logits is not None and logits.shape == (4, 21, 64)
        else:
            assert logits is not None
            near(logits, torch.stack([row[-1:] for row in whole]))
    last = one.run_with_hooks(PROMPTS[1], logits=3)
    assert last is not None
    near(last[0], whole[1][-3:])
    assert one.run_with_hooks(PROMPTS[1], logits=False) is None
    for count in (2, -1):
        with pytest.raises(djinn.InvalidValue, match=rf"logits={count}"):
            one.run_with_cache(layout, logits=count)
        with pytest.raises(djinn.InvalidValue, match=rf"logits={count}"):
            one.run_with_hooks(layout, logits=count)


def test_stop_after_ends_the_pass(one: djinn.Dj) -> None:
    logits, cache = one.run_with_cache(prompt(20), "*", stop_after="blocks.0.hook_resid_post")
    order = one.sites.names
    assert logits is None and list(cache) == [
        name for name in order if order.index(name) <= order.index("resid_post.0") and one.sites.get(name).role
    ]
    assert_same_bits(cache["resid_post.0"], one.run_with_cache(prompt(20))[1]["resid_post.0"])
    logits, cache = one.run_with_cache(prompt(3), [], stop_after="resid_post.0")
    assert logits is None and len(cache) == 0


def test_device_and_dtype_of_a_cache(dj: djinn.Dj) -> None:
    _, cache = dj.run_with_cache(prompt(3), dtype=torch.float64, device="cpu")
    _, plain = dj.run_with_cache(prompt(3))
    assert cache["resid_post.0"].dtype == torch.float64 and plain["resid_post.0"].dtype == dj.engine.dtype
    assert_same_bits(cache["resid_post.0"], plain["resid_post.0"].double())


def test_names_aliases_and_stacks(both: djinn.Dj) -> None:
    _, cache = both.run_with_cache(prompt(7), ["resid_post.*", "attn_z.0"])
    assert list(cache) == ["attn_z.0", "resid_post.0", "resid_post.1"] and len(cache) == 3
    module = both.sites.get("resid_post.0").module
    for alias in ("blocks.0.hook_resid_post", "resid_pre.1", "blocks.1.hook_resid_pre", module):
        assert alias in cache
        assert_same_bits(cache[alias], cache["resid_post.0"])
    for pair in (("resid_post", 0), ("resid_post", -2), ("resid_pre", 1)):
        assert_same_bits(cache[pair], cache["resid_post.0"])
    assert_same_bits(cache["resid_post", -1], cache["resid_post.1"])
    assert_same_bits(cache["z", 0], cache["attn_z.0"])
    with pytest.raises(djinn.UnknownSite, match=r"resid_post.7"):
        cache["resid_post", 7]
    assert "resid_mid.0" not in cache and "nothing" not in cache
    stacked = cache.stack("resid_post")
    assert stacked.shape == (2, 1, 7, WIDTH)
    assert_same_bits(cache.stack("resid_post", position=-1), stacked[:, :, -1])
    with pytest.raises(djinn.UnknownSite, match=r"'resid_mid.0' was not captured in this call; it captured attn_z"):
        cache["resid_mid.0"]
    with pytest.raises(djinn.UnknownSite, match="no site of 'mlp_out' was captured"):
        cache.stack("mlp_out")
    with both.session() as s:
        inside = s.forward(prompt(7), capture=["resid_post"]).result().cache
        assert_same_bits(inside.stack("resid_post", position=-1), stacked[:, 0, -1])


def test_unembed_is_the_tail(dj: djinn.Dj) -> None:
    logits, cache = dj.run_with_cache(prompt(CHUNK + 3))
    assert logits is not None
    assert_same_bits(dj.unembed(cache["resid_post.1"]), logits)
    assert dj.unembed(cache["resid_post.0"][0, 0]).shape == (64,)
    lens = dj.unembed(cache.stack("resid_post", position=-1))
    assert lens.shape == (2, 1, 64) and not same_bits(lens[0], lens[1])
    for wrong in (torch.zeros(3), torch.tensor(1.0), torch.zeros(2, WIDTH + 1)):
        with pytest.raises(djinn.InvalidValue, match=r"unembed: expected \[..., 32\]"):
            dj.unembed(wrong)


# -- the first NaN -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_first_nonfinite_finds_the_weight(one: djinn.Dj, value: float) -> None:
    model, ids = model_of("llama"), prompt(20)
    assert one.first_nonfinite(ids) is None
    with planted(model.model.layers[1].mlp.up_proj.weight, (3, 4), value):
        assert one.first_nonfinite(ids) == ("mlp_act.1", tuple(range(20)))
        assert one.first_nonfinite(ids, "resid_post") == ("resid_post.1", tuple(range(20)))
        assert one.first_nonfinite(ids, "**") == ("model.layers.1.mlp.up_proj", tuple(range(20)))
    token = int(ids[17])
    where = tuple(i for i in range(20) if int(ids[i]) == token)
    with planted(model.model.embed_tokens.weight, (token, 0), value):
        assert one.first_nonfinite(ids) == ("embed", where)
        assert one.first_nonfinite([prompt(3, 1).tolist(), ids.tolist()], "embed") == (
            "embed",
            tuple((1, position) for position in where),
        )
    assert one.first_nonfinite(ids) is None


class planted:
    """One element of a weight is another number while entered."""

    def __init__(self, weight: Tensor, index: tuple[int, int], value: float) -> None:
        self.weight, self.index, self.value = weight.data, index, value

    def __enter__(self) -> None:
        self.kept = self.weight[self.index].clone()
        self.weight[self.index] = self.value

    def __exit__(self, *_: object) -> None:
        self.weight[self.index] = self.kept


def test_each_value_of_a_cache_has_memory_of_its_own(one: djinn.Dj) -> None:
    """Values that fill a pass's tensors are handed out as they are: writing to one must reach nothing else."""
    whole = torch.stack([prompt(16, seed) for seed in range(4)])
    names = ["resid_post.*", "attn_q.0", "attn_k.0", "mlp_out.1", "resid_mid.1"]
    _, first = one.run_with_cache(whole, names, logits=False)
    _, second = one.run_with_cache(whole, names, logits=False)
    for name, value in first.items():
        assert value.is_contiguous() and value.shape[:2] == (4, 16)
        value.fill_(float("nan"))
        for other, left in first.items():
            assert other == name or bool(left.isnan().all()) == (list(first).index(other) < list(first).index(name))
    _, third = one.run_with_cache(whole, names, logits=False)
    for name in second:
        assert_same_bits(third[name], second[name])


def test_a_table_that_a_module_hands_out_is_copied() -> None:
    table = torch.zeros(2, 3, 4)
    kept, taken = Kept([(table, [3, 3])]), {table.untyped_storage().data_ptr()}
    assert kept.whole(taken) is None
    assert kept.whole(set()) is table
    one, two = Kept([(table, [3, 3])]), set[int]()
    assert one.whole(two) is table and one.whole(two) is None  # the second site of the same memory
    assert Kept([(table, [3, 2])]).whole(set()) is None and Kept([(table, [2, 2])]).whole(set()) is None
    assert Kept([(table[:, ::2], [2, 2])]).whole(set()) is None and Kept([(table, [3, 3])] * 2).whole(set()) is None


def test_what_a_pass_left_in_scratch_memory_reaches_no_other(one: djinn.Dj) -> None:
    rows = [prompt(16, seed).tolist() for seed in range(4)]
    _, right = one.run_with_cache(rows, "resid_post", logits=False)
    for arena in one.observer.scratch._spare:
        for pair in arena.layers:
            for tensor in pair:
                tensor.fill_(float("nan"))
    assert len(one.observer.scratch._spare) == 1
    _, again = one.run_with_cache(rows, "resid_post", logits=False)
    for name in right:
        assert_same_bits(again[name], right[name])


def test_passes_on_many_threads_share_no_scratch_memory(one: djinn.Dj) -> None:
    batches = [[prompt(16, seed + 10 * thread).tolist() for seed in range(4)] for thread in range(3)]
    right = [one.run_with_cache(rows, "resid_post.1", logits=False)[1]["resid_post.1"] for rows in batches]
    with ThreadPoolExecutor(3) as threads:
        found = list(
            threads.map(lambda i: one.run_with_cache(batches[i % 3], "resid_post.1", logits=False)[1], range(9))
        )
    for index, cache in enumerate(found):
        assert_same_bits(cache["resid_post.1"], right[index % 3])


@pytest.mark.gpu
def test_values_sent_to_the_host_are_those_on_the_device() -> None:
    dj = djinn.compile(make_model("llama").to("cuda"), max_length=32, verify=False)
    whole = torch.stack([prompt(16, seed) for seed in range(4)])
    for dtype in (None, torch.float16):
        for positions in (None, -1):
            chosen: dict[str, Any] = {"positions": positions, "dtype": dtype, "logits": False}
            _, here = dj.run_with_cache(whole, "resid_post", **chosen)
            _, there = dj.run_with_cache(whole, "resid_post", device="cpu", **chosen)
            for name in here:
                assert there[name].is_cpu
                assert_same_bits(there[name], here[name].cpu())
