"""The main promises on a GPU: every site, three dtypes, prompt and decode, bit for bit. Skipped without one.

On one with many cores, compiling side by side:

    python -m pytest tests/test_cuda.py -n 12 --dist loadscope
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import djinn_fx as djinn
from tests.bits import assert_same_bits
from tests.cuda_models import (
    DEVICE,
    DTYPES,
    NEW,
    PROMPT,
    TEXTS,
    Largest,
    assert_same,
    between,
    compiled,
    direction,
    generated,
    places,
)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


class Case:
    """One model in one dtype. A class is what pytest-xdist keeps in one process, so each model is compiled once."""

    name: ClassVar[str]
    dtype: ClassVar[str]

    def compiled(self, kind: str) -> djinn.Dj:
        """The model, compiled; see ``KINDS``."""
        return compiled(self.name, self.dtype, kind)


class Every(Case):
    """What holds for each model in each dtype, at every site."""

    def test_stop_and_resume_at_every_site(self) -> None:
        dj = self.compiled("every")
        whole = generated(dj)
        with dj.session() as s:
            run = s.generate(PROMPT, max_new_tokens=NEW, output_logits=True, breakpoints=["*"])
            sites = [stop.site for stop in run]
            assert len(sites) == len(dj.compiled_sites) * (2 + NEW - 1)
            assert_same(run.result(), whole)

    def test_an_edited_stop_equals_steering_equals_a_hook(self) -> None:
        site, short = "resid_post.1", PROMPT[:12]

        def steered(dj: djinn.Dj) -> Tensor | None:
            with dj.session() as s:
                s.steer(site, scale=-0.9)
                return s.forward(short).result().logits

        def edited(dj: djinn.Dj) -> Tensor | None:
            with dj.session() as s:
                run = s.forward(short, breakpoints=[site])
                for stop in run:
                    stop.value.mul_(-0.9)
                return run.result().logits

        def looked(dj: djinn.Dj, factor: float) -> Tensor:
            logits = dj.run_with_hooks(short, fwd_hooks=[(site, lambda value: value * factor)])
            assert logits is not None
            return logits[0]

        dj, eager = self.compiled("every"), self.compiled("eager")
        ours, plain, hooked = steered(dj), looked(eager, 1.0), looked(eager, -0.9)
        assert_same_bits(edited(dj), ours)
        # Hooks run op by op: the same bits as there, and nearly those of compiled code.
        assert_same_bits(steered(eager), hooked)
        assert_same_bits(edited(eager), hooked)
        if self.name != "mixtral":  # where two experts are as good as equal, a rounding decides
            assert ours is not None
            gap, most = (ours.float() - hooked.float()).abs().max(), hooked.float().abs().max()
            assert gap <= 64 * torch.finfo(DTYPES[self.dtype]).eps * most
            assert gap < (plain.float() - hooked.float()).abs().max()

    def test_fork_rewind_offload_and_restore(self, tmp_path: Path) -> None:
        dj = self.compiled("every")
        with dj.session() as s:
            whole = s.generate(PROMPT, max_new_tokens=NEW, output_logits=True).result()
            run = s.run
            assert run is not None
            run.rewind(position=18, site="attn_out.1")
            assert_same(run.result(), whole)
            stop = run.rewind(position=22, site="attn_k.2")
            (fork,) = stop.fork()
            stop.checkpoint().wait().save(tmp_path / "a.safetensors")
            s.offload()
            assert not s.resident
            assert_same(run.result(), whole)
            assert_same(fork.run.result(), whole)
        with dj.restore(tmp_path / "a.safetensors") as s:
            assert s.run is not None
            assert s.run.stop is not None
            assert s.run.stop.site == "attn_k.2"
            assert_same(s.run.result(), whole)

    def test_bits_depend_neither_on_company_nor_on_the_row(self) -> None:
        # Six prompts on four rows: sessions join as others leave, half of them are steered, all have another length.
        dj = self.compiled("together")
        edits = [[], [djinn.Edit("mlp_out.1", scale=0.5)], [], [djinn.Edit("attn_z.0", scale=-1.0)], [], []]
        options: dict[str, Any] = {"max_new_tokens": NEW, "output_logits": True}
        alone = [dj.generate([text], edits=[own], **options)[0] for text, own in zip(TEXTS, edits, strict=True)]
        together = dj.generate(TEXTS, edits=edits, **options)
        turned = dj.generate(TEXTS[::-1], edits=edits[::-1], **options)[::-1]
        for index, whole in enumerate(alone):
            assert_same(together[index], whole, f"prompt {index} in company")
            assert_same(turned[index], whole, f"prompt {index} on another row")

    def test_decode_edits_resume_in_the_batch(self) -> None:
        # The first session stops every step; its edited row rides in the next step of the others, which end before it.
        dj = self.compiled("together")
        point = djinn.break_at("mlp_out.1", positions="generated")
        alone = [generated(dj, text, NEW + index) for index, text in enumerate(TEXTS[1:4])]
        with dj.session() as s:
            s.steer("mlp_out.1", scale=0.5, positions="generated")
            steered = s.generate(PROMPT, max_new_tokens=NEW, output_logits=True).result()
        sessions = [dj.session() for _ in range(4)]
        first = sessions[0].generate(PROMPT, max_new_tokens=NEW, output_logits=True, breakpoints=[point])
        others = [
            session.generate(text, max_new_tokens=NEW + index, output_logits=True)
            for index, (session, text) in enumerate(zip(sessions[1:], TEXTS[1:4], strict=True))
        ]
        stops = 0
        for stop in dj.as_stopped([first, *others]):
            stop.value.mul_(0.5)
            stops += 1
        assert stops == NEW - 1
        assert_same(first.result(), steered, "edited at stops")
        for index, whole in enumerate(alone):
            assert_same(others[index].result(), whole, f"companion {index}")
        for session in sessions:
            session.close()

    def test_every_site_in_company(self) -> None:
        dj = self.compiled("together")
        wholes = [generated(dj, text, 3) for text in TEXTS[:2]]
        with dj.session() as a, dj.session() as b:
            runs = [
                s.generate(text, max_new_tokens=3, output_logits=True, breakpoints=points)
                for s, text, points in ((a, TEXTS[0], [djinn.break_at("*", positions="generated")]), (b, TEXTS[1], []))
            ]
            assert [stop.site for stop in dj.as_stopped(runs)] == list(dj.compiled_sites) * 2
            for run, whole in zip(runs, wholes, strict=True):
                assert_same(run.result(), whole)

    def test_receipts_are_exact(self) -> None:
        for kind in ("every", "together"):
            receipt = self.compiled(kind).receipt
            assert receipt is not None
            assert receipt.exact, str(receipt)


class Few(Case):
    """What takes further programs: edits along directions, predicates, complete receipts."""

    def test_edits_along_directions_and_draws_in_company(self) -> None:
        dj = self.compiled("few")
        feature = djinn.Feature(direction(3, 128) / 8, direction(4, 128) / 8, act="relu", set=0.5)
        edits = [
            [],
            [djinn.Edit("resid_post.0", ablate=direction(1, 2, 128))],
            [djinn.Edit("attn_q.1", scale=0.5)],
            [djinn.Edit("mlp_out.1", feature=feature, add=direction(5, 128) / 8, positions="generated")],
            [djinn.Edit("resid_post.0", ablate=direction(2, 128), strength=0.5)],
            [],
        ]
        for drawn in (False, True):
            options: dict[str, Any] = {"max_new_tokens": NEW, "output_logits": True, "do_sample": drawn}
            seeds = list(range(7, 7 + len(TEXTS)))
            together = dj.generate(TEXTS, edits=edits, seeds=seeds, **options)
            for index, (text, own, seed) in enumerate(zip(TEXTS, edits, seeds, strict=True)):
                (whole,) = dj.generate([text], edits=[own], seeds=[seed], **options)
                assert_same(together[index], whole, f"prompt {index}")
        plain, ablated = (dj.generate([TEXTS[1]], edits=[own], **options)[0] for own in ([], edits[1]))
        assert plain.logits is not None
        assert ablated.logits is not None
        assert not torch.equal(plain.logits[0], ablated.logits[0])

    def test_predicates_fire_where_they_hold(self) -> None:
        dj = self.compiled("few")
        whole = generated(dj)
        with dj.session() as s:
            run = s.generate(PROMPT, max_new_tokens=NEW, breakpoints=["resid_post.1", "logits"])
            seen = [(stop.site, stop.positions, stop.value.clone(), stop.tokens.tolist()) for stop in run]
        rows = {
            site: torch.cat([value for at, _, value, _ in seen if at == site]) for site in ("resid_post.1", "logits")
        }
        toward = direction(6, 128).to(DEVICE)
        entropy = torch.distributions.Categorical(logits=rows["logits"].double()).entropy()
        cosine = torch.cosine_similarity(rows["resid_post.1"].double(), toward.double()[None])
        predicates: list[tuple[str, Callable[[Tensor], Tensor]]] = [
            ("resid_post.1", djinn.when.norm_above(between(rows["resid_post.1"].double().norm(dim=-1)))),
            ("resid_post.1", djinn.when.probe(toward, b=-between(rows["resid_post.1"].double() @ toward.double()))),
            ("resid_post.1", djinn.when.cosine_above(toward, between(cosine))),
            ("resid_post.1", djinn.when.nonfinite()),
            ("resid_post.1", djinn.when.token(int(whole.tokens[1]))),
            ("logits", djinn.when.entropy_below(between(entropy))),
            ("resid_post.1", Largest(between(rows["resid_post.1"].double().amax(-1)))),
        ]
        expected = [places(when, site, seen) for site, when in predicates]
        assert not expected[3]
        assert all(places for index, places in enumerate(expected) if index != 3)
        for (site, when), wanted in zip(predicates, expected, strict=True):
            with dj.session() as s:
                run = s.generate(
                    PROMPT, max_new_tokens=NEW, output_logits=True, breakpoints=[djinn.break_at(site, when)]
                )
                assert [(stop.site, stop.fired) for stop in run] == wanted, when
                assert_same(run.result(), whole, str(when))
        # Four at a time: each run has its own, and nobody is disturbed.
        sessions = [dj.session() for _ in range(4)]
        chosen = [0, 2, 5, 6]
        runs = [
            s.generate(PROMPT, max_new_tokens=NEW, output_logits=True, breakpoints=[djinn.break_at(*predicates[index])])
            for s, index in zip(sessions, chosen, strict=True)
        ]
        fired: dict[int, list[tuple[str, tuple[int, ...]]]] = {id(run): [] for run in runs}
        for stop in dj.as_stopped(runs):
            fired[id(stop.run)].append((stop.site, stop.fired))
        for run, index in zip(runs, chosen, strict=True):
            assert fired[id(run)] == expected[index]
            assert_same(run.result(), whole)
        for session in sessions:
            session.close()

    def test_the_receipt_is_complete(self) -> None:
        dj = self.compiled("few")
        dj.warmup([4])
        kinds: list[dict[str, Any]] = [{}, {"scale": 0.5}, {"ablate": direction(1, 128)}]
        for kind in kinds:
            with dj.session() as s:
                if kind:
                    s.steer("resid_post.1", **kind)
                s.forward(PROMPT).result()
                s.generate(max_new_tokens=3).result()
                s.generate(PROMPT, max_new_tokens=1).result()
        receipt = dj.receipt
        assert receipt is not None
        assert receipt.exact, str(receipt)
        assert not receipt.pending, str(receipt)
        said = str(receipt)
        for shape in ("decode of 4 rows", "prompt chunk of 16", "prompt chunk of 16 with all logits"):
            for what in ("compiled = op by op", "plain = armed", "armed = rank", "plain = rank"):
                assert f"{shape}: {what}: " in said, said
        for what in ("rows permuted", "stopped and resumed = uninterrupted"):
            assert f"decode of 4 rows: {what}: bitwise" in said, said


class TestGPT2Fp32(Every):
    name, dtype = "gpt2", "fp32"


class TestGPT2Fp16(Every):
    name, dtype = "gpt2", "fp16"


class TestGPT2Bf16(Every):
    name, dtype = "gpt2", "bf16"


class TestLlamaFp32(Every):
    name, dtype = "llama", "fp32"


class TestLlamaFp16(Every):
    name, dtype = "llama", "fp16"


class TestLlamaBf16(Every):
    name, dtype = "llama", "bf16"


class TestMixtralFp32(Every):
    name, dtype = "mixtral", "fp32"


class TestMixtralFp16(Every):
    name, dtype = "mixtral", "fp16"


class TestMixtralBf16(Every):
    name, dtype = "mixtral", "bf16"


class TestFewGPT2Fp16(Few):
    name, dtype = "gpt2", "fp16"


class TestFewMixtralFp32(Few):
    name, dtype = "mixtral", "fp32"


class TestFewLlamaBf16(Few):
    name, dtype = "llama", "bf16"
