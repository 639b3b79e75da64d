"""What can be captured and what cannot, said in a second and before anything is cloned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from djinn_fx.specs import Support

#: Architectures whose captured form is compared with eager Hugging Face in the tests.
TESTED = frozenset(
    """
    apertus arcee biogpt bitnet cohere cohere2 deepseek_v3 ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4
    gpt2 gpt_bigcode gpt_neox gpt_oss granite granitemoe helium llama mistral mixtral nemotron olmo olmo2 olmo3
    olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2
    """.split()  # noqa: SIM905 - a table to be read, not a list
)

_OWN_ATTENTION = "its attention does not go through transformers' attention interface"
_ALIBI = "it uses ALiBi position biases, which the attention op does not have"

#: Architectures that would decode wrongly, and why.
REFUSED: Mapping[str, str] = {
    "bloom": _ALIBI,
    "mpt": _ALIBI,
    "falcon": "it builds position biases and masks of its own",
    "gptj": _OWN_ATTENTION,
    "codegen": _OWN_ATTENTION,
    "gpt_neo": "its local attention layers mask on their own",
}

_NOT_A_MODULE = "{} is not a torch.nn.Module; load the model first (AutoModelForCausalLM.from_pretrained)"

#: Kinds of layers (``config.layer_types``) whose state is the keys and values of past positions.
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention", "global", "dense", "sparse", "moe"})
_DYNAMIC_ROPE = {
    "dynamic": "dynamic rotary embeddings change with the sequence's length, which a fixed graph cannot do",
    "longrope": "longrope picks its frequencies by the sequence's length, which a fixed graph cannot do",
}
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def kind_of(model: nn.Module, example_inputs: object = None) -> Literal["lm", "module"]:
    """Whether ``model`` is served as a language model or, with ``example_inputs``, as a plain module."""
    return "lm" if example_inputs is None else "module"


def check(model: nn.Module, example_inputs: object = None) -> Support:
    """Say whether ``model`` can be compiled, and why not, without compiling or cloning anything.

    Args:
        model: a causal language model of transformers, or any module.
        example_inputs: given for a plain module.
    """
    if not isinstance(model, nn.Module):
        return Support(
            False,
            (_NOT_A_MODULE.format(type(model).__name__),),
        )
    reasons = [*_module_reasons(model)]
    remarks: list[str] = []
    if kind_of(model, example_inputs) == "lm":
        if not isinstance(model, PreTrainedModel):
            reasons.append(
                f"{type(model).__name__} is not a language model of transformers: pass example_inputs=(...) to "
                "compile it as a plain module"
            )
        else:
            reasons += _lm_reasons(model)
            if model.config.model_type not in TESTED:
                remarks.append(
                    f"{model.config.model_type} is not among the tested architectures: compile verifies it "
                    "against eager"
                )
    return Support(not reasons, tuple(reasons or remarks))


def _module_reasons(model: nn.Module) -> Iterator[str]:
    """Reasons that hold for any module."""
    if type(model).__name__ == "OptimizedModule":
        yield "it is already compiled by torch.compile: pass the original module (model._orig_mod)"
        return
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        yield f"{training[0]} is in training mode: call model.eval()"
    hooked = [name or "the model" for name, module in model.named_modules() if _is_hooked(module)]
    if hooked:
        yield (
            f"{hooked[0]} has hooks, which a captured graph would bake in or lose: remove them and use stops and "
            "edits instead"
        )
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if "meta" in devices:
        yield "it has tensors on the meta device: load the weights first"
    elif len(devices) > 1:
        yield f"it is spread over {', '.join(devices)}: one device is supported"
    yield from _quantised(model, tensors)


def _is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of the user's or of a dispatcher's.

    The hooks that transformers leaves on a model after ``output_hidden_states=True`` do nothing unless asked.
    """
    hooks = [hook for name in _HOOKS for hook in (getattr(module, name, None) or {}).values()]
    own = [hook for hook in hooks if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"]
    return bool(own) or hasattr(module, "_hf_hook")


def _quantised(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None):
        yield "it is quantised: load it in bfloat16, float16 or float32"
        return
    for name, parameter in model.named_parameters():
        plain = type(parameter.data) is torch.Tensor
        if not plain or not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
            kind = str(parameter.dtype).removeprefix("torch.") if plain else type(parameter.data).__name__
            yield f"parameter {name} is {kind}: load it in bfloat16, float16 or float32"
            return


def _lm_reasons(model: PreTrainedModel) -> Iterator[str]:
    """Reasons that hold for language models."""
    config: Any = model.config
    kind = config.model_type
    if config.is_encoder_decoder:
        yield f"{kind} is an encoder-decoder: pass example_inputs to compile it as a plain module"
        return
    if not model.can_generate():
        yield f"{type(model).__name__} has no language-model head: pass example_inputs to compile it as a plain module"
        return
    if kind in REFUSED:
        yield f"{kind} is not supported: {REFUSED[kind]}"
    elif not model._can_set_attn_implementation():
        yield f"{kind} is not supported: {_OWN_ATTENTION}"
    text = config.get_text_config()
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if odd:
        yield f"{kind} has layers of kind {', '.join(odd)}, whose state is not keys and values by position"
    elif getattr(model, "_is_stateful", False):
        yield f"{kind} keeps recurrent state, not only keys and values by position"
    if getattr(text, "alibi", False):
        yield f"{kind}: {_ALIBI}"
    if getattr(text, "num_kv_shared_layers", 0):
        yield f"{kind}: {text.num_kv_shared_layers} layers read the keys and values of other layers"
    yield from (f"{kind}: {_DYNAMIC_ROPE[name]}" for name in sorted(_rope_types(text) & set(_DYNAMIC_ROPE)))


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary embedding of a configuration, over all kinds of layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return {str(entry.get("rope_type")) for entry in [parameters, *nested]}
