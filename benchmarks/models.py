"""Models to measure: built from a configuration with seeded random weights, bundled, or from Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: Spread of the random weights, that of GPT-2 and Llama.
SPREAD = 0.02

#: Models that need no files but the package's.
BUILT_IN = ("gpt2", "llama-8b-shape", "tiny", "storyteller")


@dataclass(frozen=True)
class Loaded:
    """A model ready to measure.

    Attributes:
        name: as it was asked for.
        model: in eval mode, on its device.
        device: where its weights are.
        layers: number of blocks.
        vocab: size of the vocabulary.
        room: positions that it knows.
        blocks: module path of the list of blocks.
    """

    name: str
    model: Any
    device: torch.device
    layers: int
    vocab: int
    room: int
    blocks: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters, shared ones once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that one decode step must read: all but tables of which it takes single rows."""
        head = self.model.get_output_embeddings()
        kept = head.weight if head is not None else None
        tables = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        unread = {id(t): t.numel() * t.element_size() for t in tables if t is not kept}
        return self.weight_bytes - sum(unread.values())

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Heads of keys and values, and their width, by the configuration."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def block(self, layer: int) -> nn.Module:
        """The block of a layer."""
        blocks: Any = self.model.get_submodule(self.blocks)
        found: nn.Module = blocks[layer]
        return found

    def prompts(self, rows: int, length: int, seed: int) -> torch.Tensor:
        """Random tokens ``[rows, length]`` on the device, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.vocab, (rows, length), generator=generator).to(self.device)


def load(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0, layers: int | None = None) -> Loaded:
    """Make or load a model.

    Args:
        name: ``gpt2`` (124M, random), ``llama-8b-shape`` (random), ``tiny`` (random, for tests), ``storyteller`` (in
            the package), or a path or hub id of a causal language model.
        device: where to.
        dtype: of the weights.
        seed: of random weights.
        layers: another number of blocks, for the models with random weights.

    Raises:
        InvalidValue: transformers finds no such model.
        ValueError: ``layers`` for a model that has weights of its own.
    """
    config = configuration(name)
    if config is not None:
        if layers is not None:
            config.num_hidden_layers = layers
        model = _random(config, device, dtype, seed)
    elif layers is not None:
        raise ValueError(f"{name} has weights of its own; another depth needs one of the random models.")
    else:
        model = _pretrained(name, device, dtype)
    model.generation_config.eos_token_id = None  # every run is as long as the others
    count, path = _blocks(model)
    text = model.config.get_text_config()
    room = int(getattr(text, "max_position_embeddings", 4096))
    return Loaded(name, model, device, count, int(text.vocab_size), room, path)


def configuration(name: str) -> Any:
    """The configuration of a model that is built here (``gpt2``, ``llama-8b-shape``, ``tiny``), or None."""
    from transformers import GPT2Config, LlamaConfig

    nothing: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if name == "gpt2":
        return GPT2Config(**nothing)
    if name == "tiny":
        return GPT2Config(
            n_layer=4, n_embd=64, n_head=2, n_positions=128, vocab_size=96, initializer_range=0.1, **nothing
        )
    if name == "llama-8b-shape":
        return LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            **nothing,
        )
    return None


def _random(config: Any, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """A model of this configuration, its weights drawn on the device itself: 8B take seconds, not minutes."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    spread = float(getattr(config, "initializer_range", SPREAD))
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, spread, generator=generator)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
    model.tie_weights()
    return model.eval()


def _pretrained(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from djinn_fx import bundled

    source = str(bundled.PATH) if name == "storyteller" else name
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise bundled.no_model(name, error, BUILT_IN) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.to(device).eval()


def _blocks(model: Any) -> tuple[int, str]:
    """Number of blocks and the path of their list.

    Raises:
        ValueError: no list of modules is as long as the configuration says.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return count, path
    raise ValueError(f"{type(model).__name__} has no list of {count} blocks.")
