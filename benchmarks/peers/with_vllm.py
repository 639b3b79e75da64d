"""vLLM: decoding without interventions; what its API lacks is read off the API."""

from __future__ import annotations

import inspect
import tempfile
from typing import Any

import torch

from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import Answer, Work
from djinn_fx.benchmarks.decoder import Decoder
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.peers.roster import not_installed

#: Words of which one would have to be in the name of a field that takes or gives activations.
WORDS = ("hook", "steer", "interven", "activation", "hidden", "edit", "layer", "breakpoint")


def lacking() -> str:
    """What a request of the installed vLLM has no field for."""
    from vllm import SamplingParams

    fields = [name for name in SamplingParams.__struct_fields__ if not name.startswith("_")]
    found = [name for name in fields if any(word in name for word in WORDS)]
    if found:
        return f"SamplingParams has {', '.join(found)}, for which this benchmark has no case yet"
    return f"none of the {len(fields)} fields of SamplingParams takes or gives an activation of a layer"


def pausing() -> str:
    """What the installed vLLM's own pause takes."""
    from vllm.v1.engine.async_llm import AsyncLLM

    pause = getattr(AsyncLLM, "pause_generation", None)
    if pause is None:
        return "AsyncLLM has no pause_generation"
    names = [name for name in inspect.signature(pause).parameters if name != "self"]
    if any("request" in name and "id" in name for name in names):
        return (
            f"AsyncLLM.pause_generation({', '.join(names)}) pauses a request between steps, not inside a forward pass"
        )
    return f"AsyncLLM.pause_generation({', '.join(names)}) pauses the whole engine, and names no request and no layer"


class VLLMDecoder(Decoder):
    """A vLLM engine over the same weights, saved once to a temporary folder."""

    def __init__(self, loaded: Loaded, room: int) -> None:
        super().__init__(loaded)
        from vllm import LLM

        self.folder = tempfile.TemporaryDirectory()
        loaded.model.save_pretrained(self.folder.name)
        self.engine: Any = LLM(
            self.folder.name,
            skip_tokenizer_init=True,
            max_model_len=room,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.4,
            dtype=str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        )
        self.prompts: list[dict[str, Any]] = []

    def start(self, prompts: torch.Tensor, work: Work) -> None:
        """Keep the prompts; each request takes them anew."""
        self.prompts = [{"prompt_token_ids": row} for row in prompts.tolist()]

    def block_seconds(self, count: int) -> float:
        """A request of ``count + 1`` tokens less one of a single token: what the decoding alone takes."""
        one, many = (
            clock.seconds(self.loaded.device, lambda size=size: self._generate(size))  # type: ignore[misc]
            for size in (1, count + 1)
        )
        return many - one

    def answer(self, prompts: torch.Tensor, work: Work, count: int) -> Answer:
        """Tokens; the engine gives log-probabilities at best, no logits."""
        self.start(prompts, work)
        return Answer(torch.tensor([list(out.outputs[0].token_ids) for out in self._generate(count)]), None)

    def close(self) -> None:
        """End the engine."""
        self.engine = None
        self.folder.cleanup()

    def _generate(self, count: int) -> Any:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        return self.engine.generate(self.prompts, greedy, use_tqdm=False)


class VLLMPeer:
    """vLLM."""

    name = "vLLM"
    last = True
    compiles = False
    expected_wrong = False
    no_forward = "a request samples at least one token (max_tokens is 1 or more); see decode"

    def available(self, loaded: Loaded) -> str | None:
        """If it is installed, on CUDA."""
        if loaded.device.type != "cuda":
            return "runs on CUDA only"
        return not_installed("vllm", "install vLLM in this environment")

    def refusal(self, work: Work) -> str | None:
        """Anything but plain decoding; the reason is read off the installed API."""
        if not work.edits and not work.read:
            return None
        return lacking()

    def no_pause(self) -> str:
        """Read off the installed API."""
        return pausing()

    def open(self, loaded: Loaded, room: int) -> Decoder:
        """An engine; takes its start-up time and 40 % of the device's memory."""
        return VLLMDecoder(loaded, room)


PEERS = (VLLMPeer(),)
