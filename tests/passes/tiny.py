"""Tiny models of every architecture, and an executor of programs that knows nothing of the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from djinn_fx.passes.pipeline import CaptureStore, build, discover
from djinn_fx.passes.source import prepare
from djinn_fx.program import KEEP, LENGTHS, LOGITS, POSITIONS, ROWS, TOKENS, Program, kv_name
from djinn_fx.sites import Site
from djinn_fx.specs import ProgramShape, Variant, edit_tables

WINDOW = 16
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

#: Name of the case: model type and what its configuration has beyond the base.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "biogpt": ("biogpt", {}),
    "bitnet": ("bitnet", {}),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", MIXED),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 16,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "exaone4": ("exaone4", MIXED),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {**GEMMA, **MIXED}),
    "gemma3": ("gemma3_text", {**GEMMA, **MIXED}),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "gpt2": ("gpt2", GPT2),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, **MIXED}),
    "granite": (
        "granite",
        {
            "residual_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "logits_scaling": 3.0,
            "attention_multiplier": 0.3,
        },
    ),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": ("helium", {"head_dim": 16}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "nemotron": ("nemotron", {}),
    "olmo": ("olmo", {"clip_qkv": 8.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", MIXED),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "opt-350m": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "persimmon": ("persimmon", {"num_key_value_heads": 4}),
    "phi": ("phi", {"qk_layernorm": True}),
    "phi3": ("phi3", {}),
    "phimoe": ("phimoe", {"num_local_experts": 4}),
    "qwen2": ("qwen2", {**MIXED, "use_sliding_window": True}),
    "qwen2_moe": (
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16, "mlp_only_layers": [0]}),
    "seed_oss": ("seed_oss", {"head_dim": 16}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "stablelm": ("stablelm", {}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
}


def tiny_model(case: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with random weights, on the CPU, in evaluation mode."""
    kind, extra = ARCHITECTURES[case]
    config = AutoConfig.for_model(kind, **{**BASE, **extra, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


class Machine:
    """A model with arenas, its sites, and programs run by hand, one segment after the other."""

    def __init__(self, model: Any, *, rows: int = 2, positions: int = 48) -> None:
        self.model = model
        self.source = prepare(model)
        self.store = CaptureStore()
        self.table = discover(self.source, self.store)
        self.rows = rows
        self.arenas = [
            (self._arena(spec.heads, positions, spec.key_dim), self._arena(spec.heads, positions, spec.value_dim))
            for spec in self.source.kv
        ]

    def _arena(self, heads: int, positions: int, width: int) -> torch.Tensor:
        shape = (self.rows + 1, heads, positions + 1, width)
        return torch.zeros(shape, dtype=self.source.dtype, device=self.source.device)

    def build(
        self,
        shape: tuple[int, int, int],
        sites: str | Sequence[str] = "resid_post",
        variant: Variant = "plain",
        rank: int = 0,
        **options: Any,
    ) -> Program:
        return build(
            self.source,
            ProgramShape(*shape),
            sites=self.table.select(sites),
            variant=variant,
            rank=rank,
            arenas=self.arenas,
            store=self.store,
            **options,
        )

    def env(self, program: Program, steps: Sequence[tuple[int, int, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """The inputs of a step; each entry of ``steps`` is arena row, first position and tokens."""
        shape = program.shape
        tokens = torch.zeros(shape.rows, shape.query, dtype=torch.long)
        positions = torch.zeros_like(tokens)
        rows = torch.full((shape.rows,), self.rows)
        lengths = torch.zeros(shape.rows, dtype=torch.long)
        keep = torch.zeros(shape.rows, shape.keep, dtype=torch.long)
        for index, (row, first, given) in enumerate(steps):
            count = len(given)
            tokens[index, :count] = torch.tensor(given)
            positions[index, :count] = torch.arange(first, first + count)
            rows[index], lengths[index] = row, first + count
            keep[index] = torch.arange(shape.keep) + count - shape.keep
        made = {TOKENS: tokens, POSITIONS: positions, ROWS: rows, LENGTHS: lengths}
        if shape.keep < shape.query:
            made[KEEP] = keep
        made |= neutral_tables(program, self.source.dtype)
        made = {name: tensor.to(self.source.device) for name, tensor in made.items()}
        for layer, (keys, values) in enumerate(self.arenas):
            made[kv_name(layer, "k")], made[kv_name(layer, "v")] = keys, values
        return made

    def logits(self, program: Program, steps: Sequence[tuple[int, int, Sequence[int]]]) -> torch.Tensor:
        return run(program, self.env(program, steps))[LOGITS]


def neutral_tables(program: Program, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tables of every site of a program, doing nothing."""
    tables: dict[str, torch.Tensor] = {}
    ranks = [spec.shape[1] for spec in program.inputs if spec.name.endswith(":slot")]
    for site in program.sites:
        for spec in edit_tables(site, program.shape, program.variant, dtype, ranks[0] if ranks else 0):
            tables[spec.name] = torch.full(spec.shape, spec.neutral).to(spec.dtype)
    return tables


def run(
    program: Program, inputs: Mapping[str, torch.Tensor], *, start: int = 0, stop: int | None = None
) -> dict[str, torch.Tensor]:
    """Run segments ``start`` to ``stop`` (excluded) and return the whole environment."""
    env = {**program.weights, **inputs}
    for segment in program.segments[start:stop]:
        made = segment.run(*[env[name] for name in segment.inputs])
        env.update(zip(segment.outputs, made, strict=True))
    return env


def value_of(env: Mapping[str, torch.Tensor], machine: Machine, name: str) -> torch.Tensor:
    """A site's value in an environment, by any of the site's names."""
    return env[machine.table.get(name).name]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two floating point tensors agree bit for bit, NaNs and signs of zeros included."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.dtype.itemsize]
    return left.shape == right.shape and torch.equal(left.contiguous().view(integer), right.contiguous().view(integer))


def site_named(program: Program, name: str) -> Site:
    return next(site for site in program.sites if site.name == name)
