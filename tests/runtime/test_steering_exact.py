"""Steering is the edit at the stop is the hook, bit for bit; what is neutral changes no bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import djinn_fx as djinn
from tests.bits import assert_same_bits, same_bits
from tests.runtime.tiny import BLOCKS, NEW, WIDTH, bits_of, compiled, direction, generated, logits_of, model_of, prompt

A, B, C = direction(1), direction(2), direction(3)
Hook = Callable[[Tensor], Tensor]


def rowwise(change: Hook) -> Hook:
    """A function of ``[..., width]`` in fp32, as a hook on a value of any dtype with or without heads."""

    def hook(value: Tensor) -> Tensor:
        flat = value.reshape(*value.shape[: value.dim() - (2 if value.shape[-1] < WIDTH else 1)], WIDTH)
        return change(flat.float()).to(value.dtype).reshape(value.shape)

    return hook


def read(h: Tensor, direction: Tensor) -> Tensor:
    total: Tensor = (h * direction).sum(-1, keepdim=True)
    return total


def unit(direction: Tensor) -> Tensor:
    wide = direction.double()
    return torch.div(wide, wide.norm(2)).float()


def without_span(h: Tensor) -> Tensor:
    """What is left beside A, -2 A, A + 0.1 B and B, which span two dimensions."""
    basis: Tensor = torch.linalg.svd(torch.stack([A, B]).double(), full_matrices=False).Vh
    return torch.sub(h.double(), h.double() @ basis.T @ basis).float()


def feature(**options: Any) -> dict[str, Any]:
    return {"feature": djinn.Feature(A / 6, B, **options)}


def jumped(h: Tensor) -> Tensor:
    p = read(h, A / 6) + 0.1
    return torch.where(p > 0.3, p, 0.0)


#: What is said to ``steer``, the same as a function, and whether the bits must agree.
EDITS: dict[str, tuple[dict[str, Any], Hook, bool]] = {
    "scale": ({"scale": 0.9}, lambda h: h * 0.9, True),
    "scale by a tensor": ({"scale": torch.tensor(0.9)}, lambda h: h * torch.tensor(0.9), True),
    "scale by a vector": ({"scale": A}, lambda h: h * A, True),
    "add": ({"add": A}, lambda h: h + A, True),
    "half of an add": ({"add": A, "strength": 0.5}, lambda h: h + A * 0.5, True),
    "a quarter of a scale": ({"scale": 3.0, "strength": 0.25}, lambda h: h * 1.5, True),
    "ablate": ({"ablate": A}, lambda h: h + (0 - read(h, unit(A))) * unit(A), True),
    "ablate several": ({"ablate": torch.stack([A, -2 * A, A + 0.1 * B, B])}, without_span, False),
    "half of an ablation": ({"ablate": A, "strength": 0.5}, lambda h: h + -read(h, unit(A)) * 0.5 * unit(A), True),
    "set": (feature(set=2.0), lambda h: h + (2.0 - read(h, A / 6)) * B, True),
    "set with a bias": (feature(set=2.0, bias=0.5), lambda h: h + (2.0 - (read(h, A / 6) + 0.5)) * B, True),
    "min": (feature(min=0.5), lambda h: h + (read(h, A / 6).clamp(min=0.5) - read(h, A / 6)) * B, True),
    "max": (feature(max=0.2), lambda h: h + (read(h, A / 6).clamp(max=0.2) - read(h, A / 6)) * B, True),
    "both": (
        feature(min=-0.1, max=0.2),
        lambda h: h + (read(h, A / 6).clamp(-0.1, 0.2) - read(h, A / 6)) * B,
        True,
    ),
    "relu": (feature(act="relu", set=1.0), lambda h: h + (1.0 - read(h, A / 6).relu()) * B, True),
    "jumprelu": (
        feature(act="jumprelu", threshold=0.3, bias=0.1, set=1.0),
        lambda h: h + (1.0 - jumped(h)) * B,
        True,
    ),
}
EACH = pytest.mark.parametrize("name", EDITS)


def close(a: Tensor | None, b: Tensor | None, exact: bool, dtype: torch.dtype) -> None:
    assert a is not None and b is not None
    if exact:
        assert_same_bits(a, b)
    size = float(b.float().abs().max())
    torch.testing.assert_close(a, b, rtol=0, atol=size * (2e-6 if dtype == torch.float32 else 0.03))


@EACH
def test_steering_is_a_hook(dj: djinn.Dj, name: str) -> None:
    options, change, exact = EDITS[name]
    for site in ("resid_post.0", "attn_q.0"):
        hooked = dj.run_with_hooks(prompt(14), [(site, rowwise(change))])
        with dj.session() as s:
            s.steer(site, **options)
            steered = logits_of(s, prompt(14))
        assert hooked is not None and not same_bits(steered, dj(prompt(14)).logits[0])
        close(steered, hooked[0], exact, dj.engine.dtype)


@EACH
def test_steering_is_the_edit_at_each_stop(dj: djinn.Dj, name: str) -> None:
    options, change, exact = EDITS[name]
    with dj.session() as s:
        s.steer("mlp_out.1", **options)
        steered = s.generate(prompt(18), max_new_tokens=NEW, output_logits=True).result()
    with dj.session() as s:
        run = s.generate(prompt(18), max_new_tokens=NEW, output_logits=True, breakpoints=["mlp_out.1"])
        for stop in run:
            stop.value = rowwise(change)(stop.value)
        edited = run.result()
    assert not same_bits(bits_of(generated(dj, prompt(18))), bits_of(steered))
    close(steered.logits, edited.logits, exact, dj.engine.dtype)


@EACH
@pytest.mark.parametrize("arch", ["gpt2", "llama", "llama-bf16"])
def test_steering_is_a_forward_hook_on_the_model(request: pytest.FixtureRequest, arch: str, name: str) -> None:
    options, change, _ = EDITS[name]
    model, hook = model_of(arch), rowwise(change)

    def forward_hook(module: object, inputs: object, output: Any) -> Any:
        return (hook(output[0]), *output[1:]) if isinstance(output, tuple) else hook(output)

    with torch.no_grad():
        plain = model(prompt(14)[None]).logits[0]
        handle = model.get_submodule(BLOCKS[arch.partition("-")[0]] + ".0").register_forward_hook(forward_hook)
        try:
            hooked = model(prompt(14)[None]).logits[0]
        finally:
            handle.remove()
    with compiled(arch).session() as s:
        s.steer("resid_post.0", **options)
        steered = logits_of(s, prompt(14))
    assert float((hooked - plain).abs().max()) > 0.05
    close(steered, hooked, False, steered.dtype)
