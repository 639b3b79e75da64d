"""Captured equals eager, and the residual's identities hold, for every supported architecture."""

from __future__ import annotations

import pytest
import torch

from djinn_fx.passes.support import TESTED, check
from tests.passes.tiny import ARCHITECTURES, WINDOW, Machine, run, tiny_model, value_of

PARALLEL = {"cohere", "cohere2", "gpt_neox", "phi", "stablelm-parallel"}
POST_NORM = {"opt-350m"}
MIXTURES = {
    "deepseek_v3": [1],
    "gpt_oss": [0, 1],
    "granitemoe": [0, 1],
    "mixtral": [0, 1],
    "olmoe": [0, 1],
    "phimoe": [0, 1],
    "qwen2_moe": [1],
    "qwen3_moe": [1],
}
ROLES = "embed resid_pre attn_q attn_k attn_v attn_z attn_out resid_mid mlp_act mlp_out resid_post"
TOLERANCE = 5e-6
#: Architectures that share every construct with another one: run with the slow tests.
TWINS = {
    *("apertus", "arcee", "biogpt", "bitnet", "ernie4_5", "gemma", "glm", "gpt_bigcode", "helium", "llama-tied"),
    *("olmo", "olmoe", "persimmon", "phimoe", "qwen3_moe", "seed_oss", "stablelm-parallel", "granitemoe", "olmo2"),
}
CASES = [pytest.param(case, marks=pytest.mark.slow) if case in TWINS else case for case in ARCHITECTURES]


def expected_absent(case: str) -> set[str]:
    absent = {f"mlp_act.{layer}" for layer in MIXTURES.get(case, [])}
    if case in PARALLEL:
        absent |= {"resid_mid.0", "resid_mid.1"}
    if case in POST_NORM:
        absent |= {f"{r}.{n}" for r in ("attn_out", "resid_mid", "mlp_out", "mlp_act") for n in (0, 1)}
    return absent


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # gpt_bigcode
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_captured_equals_eager(case: str) -> None:
    model = tiny_model(case)
    assert check(model).ok
    machine = Machine(model)
    tokens = torch.randint(3, 250, (2, 30))
    expected = model(tokens, use_cache=False).logits

    # Prompts in chunks, padded; the second chunk of row 0 crosses the sliding window.
    prefill = machine.build((1, 12, 1), "*")
    assert WINDOW < 12 + 10
    for row, first, last in ((0, 0, 12), (0, 12, 22), (1, 0, 7)):
        env = run(prefill, machine.env(prefill, [(row, first, tokens[row, first:last].tolist())]))
        torch.testing.assert_close(env["logits"][0, 0], expected[row, last - 1], atol=TOLERANCE, rtol=0)

    # Both rows decode together, at different positions, in swapped arena order.
    decode = machine.build((2, 1, 1), "resid_post", "armed")
    for step in range(3):
        places = [(1, 7 + step), (0, 22 + step)]
        steps = [(row, at, [int(tokens[row, at])]) for row, at in places]
        logits = machine.logits(decode, steps)
        for index, (row, at) in enumerate(places):
            torch.testing.assert_close(logits[index, 0], expected[row, at], atol=TOLERANCE, rtol=0)

    _check_roles(case, machine)
    _check_identities(machine, env)


def _check_roles(case: str, machine: Machine) -> None:
    """Every role is a site at every layer, except those that the architecture cannot have."""
    known = {name for site in machine.table.sites for name in (site.name, *site.aliases)}
    wanted = {f"{role}.{layer}" for role in ROLES.split()[1:] for layer in (0, 1)} | {"embed", "final_norm", "logits"}
    missing = wanted - known
    assert missing == expected_absent(case)
    assert missing <= set(machine.table.absent)
    q = machine.table.get("attn_q.1")
    kv = machine.source.kv[1]
    assert machine.table.get("attn_k.1").feature_shape == (kv.heads, kv.key_dim)
    assert machine.table.get("attn_v.1").feature_shape == (kv.heads, kv.value_dim)
    assert q.feature_shape[1] == kv.key_dim
    hidden = machine.model.config.get_text_config().hidden_size
    assert machine.table.get("resid_post.1").feature_shape == (hidden,)
    assert machine.table.get("logits").axis == "kept"
    if case not in POST_NORM:
        assert machine.table.get("resid_pre.1").name == "resid_post.0"


def _check_identities(machine: Machine, env: dict[str, torch.Tensor]) -> None:
    """What attention and MLP add is what the residual gains, to the last bit of an addition."""
    known = {name for site in machine.table.sites for name in (site.name, *site.aliases)}
    for layer in range(2):
        parts = {role: f"{role}.{layer}" for role in ROLES.split()[1:]}
        if parts["attn_out"] not in known:
            continue
        value = {role: value_of(env, machine, name) for role, name in parts.items() if name in known}
        if "resid_mid" in value:
            assert torch.equal(value["resid_pre"] + value["attn_out"], value["resid_mid"])
            assert torch.equal(value["resid_mid"] + value["mlp_out"], value["resid_post"])
        else:
            total = value["resid_pre"] + value["attn_out"] + value["mlp_out"]
            torch.testing.assert_close(total, value["resid_post"], atol=1e-6, rtol=1e-6)


def test_every_tested_architecture_is_tested() -> None:
    assert {kind for kind, _ in ARCHITECTURES.values()} == TESTED


@torch.no_grad()
def test_a_wrong_window_is_seen() -> None:
    """The comparison above can fail: without its window a sliding model gives other logits."""
    model = tiny_model("mistral")
    tokens = torch.randint(3, 250, (1, 30))
    expected = model(tokens, use_cache=False).logits
    model.config.sliding_window = None
    machine = Machine(model)
    program = machine.build((1, 30, 30), "resid_post")
    logits = machine.logits(program, [(0, 0, tokens[0].tolist())])
    assert torch.allclose(logits[0, :WINDOW], expected[0, :WINDOW], atol=TOLERANCE)
    assert not torch.allclose(logits[0, WINDOW:], expected[0, WINDOW:], atol=TOLERANCE)
