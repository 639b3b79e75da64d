"""The model is left as it was found: modes, hooks, configuration, weights, which are shared and not copied."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from tests.bits import assert_same_bits, same_bits
from tests.runtime.tiny import NEW, PROMPT, bits_of, direction, generated, make_dj, make_model, model_of, prompt

V = direction(1)


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_is_the_callers(one: djinn.Dj, enabled: bool) -> None:
    def check(*_: Any) -> None:
        assert torch.is_grad_enabled() == enabled and not torch.is_inference_mode_enabled()

    with torch.set_grad_enabled(enabled), one.session() as s:
        run = s.generate(prompt(4), max_new_tokens=3, breakpoints=["resid_post.0"], on_token=check)
        for stop in run:
            check()
            assert not stop.value.requires_grad and not stop.value.is_inference()
            stop.fork()[0].session.close()
            stop.step()
        run.rewind(2)
        assert not run.result().tokens.requires_grad
        one.run_with_hooks(prompt(3), [("resid_post.0", check)])
        with pytest.raises(djinn.InvalidValue):
            one([])
        check()


def test_what_was_read_can_train_a_probe(one: djinn.Dj) -> None:
    probe = torch.nn.Linear(32, 1)
    _, cache = one.run_with_cache(prompt(9))
    with one.session() as s:
        stop = next(s.forward(prompt(9), breakpoints=["resid_post.0"]))
        assert_same_bits(stop.value, cache["resid_post.0"][0])
        loss = probe(stop.value).sum() + probe(cache["resid_post.0"]).sum()
    loss.backward()
    assert probe.weight.grad is not None and bool(probe.weight.grad.any())


def test_the_model_is_left_as_it_was() -> None:
    model, ids = make_model("gpt2"), prompt(9)[None]

    def state() -> dict[str, Any]:
        modules = dict(model.named_modules())
        return {
            "config": copy.deepcopy(model.config.to_dict()),
            "generation": model.generation_config.to_dict(),
            "attention": model.config._attn_implementation,
            "tensors": {key: (id(t), t.data_ptr(), t._version, t.requires_grad) for key, t in tensors().items()},
            "modules": {path: (id(module), module.training) for path, module in modules.items()},
            "hooks": {path: [len(h) for h in hooks_of(module)] for path, module in modules.items()},
            "attributes": {path: sorted(vars(module)) for path, module in modules.items()},
        }

    def tensors() -> dict[str, torch.Tensor]:
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def say() -> tuple[torch.Tensor, list[int]]:
        with torch.no_grad():
            said = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
            return model(ids).logits, said[0].tolist()

    before, (logits, tokens) = state(), say()
    dj = make_dj(model, verify=True)
    with dj.session() as s:
        s.steer("resid_post.0", ablate=V)
        list(s.generate(ids, max_new_tokens=3, breakpoints=["resid_post.1"]))
    after, (again, said) = state(), say()
    assert before == after
    assert_same_bits(logits, again)
    assert tokens == said
    places = {tensor.data_ptr() for tensor in tensors().values()}
    assert {weight.data_ptr() for weight in dj.program.weights.values()} <= places
    dj.close()


def hooks_of(module: torch.nn.Module) -> list[dict[int, Any]]:
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks]


def test_weights_changed_in_place_are_seen(one: djinn.Dj) -> None:
    weight = model_of("llama").model.layers[1].mlp.down_proj.weight
    plain, kept = one(prompt(9)).logits, weight.detach().clone()
    with one.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True)
        try:
            with torch.no_grad():
                weight.mul_(2)
            changed, result = one(prompt(9)).logits, run.result()
            with torch.no_grad():
                expected = model_of("llama")(prompt(9)[None]).logits
        finally:
            weight.data.copy_(kept)
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)
    assert not same_bits(changed, plain)
    assert not same_bits(bits_of(result), bits_of(generated(one, prompt(PROMPT))))
    assert_same_bits(one(prompt(9)).logits, plain)
