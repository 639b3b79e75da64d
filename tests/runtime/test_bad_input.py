"""Every mistake gets its named error, which says what, where and what to do; the session beside it goes on unharmed."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import djinn_fx as djinn
from djinn_fx.runtime.session import Session
from tests.runtime.mistakes import Case, begin, beside_another, fails
from tests.runtime.tiny import (
    WIDTH,
    another_dj,
    direction,
    make_dj,
    make_model,
)

V = direction(1)


@pytest.fixture
def dj(one: djinn.Dj) -> Iterator[djinn.Dj]:
    yield from beside_another(one)


# -- sites ---------------------------------------------------------------------------------------

SITES: dict[str, Case] = {
    "layer": (
        lambda dj, s: begin(s, "resid_post.7"),
        djinn.UnknownSite,
        r"no site 'resid_post.7': this model's layers are 0 to 1, so resid_post.0 to resid_post.1\.",
    ),
    "spelling": (lambda dj, s: s.steer("resid_pots.0", scale=2.0), djinn.UnknownSite, "nearest: resid_post.0"),
    "nonsense": (
        lambda dj, s: dj.run_with_cache([3], "%"),
        djinn.UnknownSite,
        "no site '%'.*dj.sites.names lists them all",
    ),
    "glob": (lambda dj, s: begin(s, "attn_zz.*"), djinn.UnknownSite, "no site 'attn_zz.*'"),
    "module layer": (lambda dj, s: dj.sites.get("model.layers.2.mlp"), djinn.UnknownSite, "so model.layers.0.mlp to"),
    "lens": (lambda dj, s: dj.sites.get("blocks.9.hook_q"), djinn.UnknownSite, "no site 'blocks.9.hook_q'"),
    "lens spelling": (
        lambda dj, s: s.steer("blocks.1.hook_resid_pots", scale=2.0),
        djinn.UnknownSite,
        r"nearest: blocks.1.hook_resid_post \(resid_post.1\)",
    ),
    "lens layer": (
        lambda dj, s: dj.sites.get("blocks.9.hook_mlp_out"),
        djinn.UnknownSite,
        r"layers are 0 to 1, so blocks.0.hook_mlp_out to blocks.1.hook_mlp_out",
    ),
    "lens glob": (
        lambda dj, s: dj.run_with_cache([3], "blocks.*.hook_mlpout"),
        djinn.UnknownSite,
        r"nearest: blocks.\*.hook_mlp_out \(mlp_out.\*\)",
    ),
    "lens top": (
        lambda dj, s: dj.run_with_cache([3], "ln_final.hook_normalised"),
        djinn.UnknownSite,
        r"nearest: ln_final.hook_normalized \(final_norm\)",
    ),
    "lens pattern": (
        lambda dj, s: dj.run_with_cache([3], "blocks.0.attn.hook_pattern"),
        djinn.UnknownSite,
        "is reserved and not available yet.*attn_q/attn_k",
    ),
    "hook": (lambda dj, s: dj.run_with_hooks([3], [("nope", print)]), djinn.UnknownSite, "no site 'nope'"),
    "reserved": (
        lambda dj, s: dj.run_with_cache([3], "attn_pattern.0"),
        djinn.UnknownSite,
        "'attn_pattern.0' is reserved and not available yet.*attn_q/attn_k",
    ),
    "reserved glob": (lambda dj, s: begin(s, "router.*"), djinn.UnknownSite, "'router.*' is reserved"),
    "breakpoint": (
        lambda dj, s: begin(s, "attn_out.1"),
        djinn.SiteNotCompiled,
        r"'attn_out.1' exists but was not compiled in.*dj.add_sites\('attn_out.1'\)",
    ),
    "steer": (lambda dj, s: s.steer("attn_out.1"), djinn.SiteNotCompiled, r"dj.add_sites\('attn_out.1'\)"),
    "capture": (lambda dj, s: s.forward([3], capture=["*"]), djinn.SiteNotCompiled, r"dj.add_sites\('embed'\)"),
    "rewind": (
        lambda dj, s: next(begin(s, "resid_post.0")).run.rewind(0, "embed"),
        djinn.SiteNotCompiled,
        r"dj.add_sites\('embed'\)",
    ),
    "add_sites": (lambda dj, s: dj.add_sites("resid_posts"), djinn.UnknownSite, "no site 'resid_posts'"),
    "stop_after": (lambda dj, s: dj.run_with_cache([3], stop_after="end"), djinn.UnknownSite, "no site 'end'"),
}


@pytest.mark.parametrize("name", SITES)
def test_sites(dj: djinn.Dj, name: str) -> None:
    fails(dj, SITES[name])


def test_parallel_blocks_have_no_middle() -> None:
    config = GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    dj = make_dj(GPTNeoXForCausalLM(config).eval(), "resid_post")
    with pytest.raises(djinn.UnknownSite, match=r"this model has no site 'resid_mid.0': .*parallel"):
        dj.run_with_cache([3], "resid_mid.0")


# -- values and edits ----------------------------------------------------------------------------


def assign(value: Any) -> Callable[[djinn.Dj, Session], object]:
    def act(dj: djinn.Dj, s: Session) -> None:
        next(begin(s, "resid_post.0")).value = value

    return act


def new_data(value: Tensor) -> Callable[[djinn.Dj, Session], object]:
    def act(dj: djinn.Dj, s: Session) -> None:
        run = begin(s, "resid_post.0")
        next(run).value.data = value
        run.result()

    return act


HERE = r"stop.value at 'resid_post.0' is \(4, 32\) float32 on cpu; cannot assign "
MADE = r"stop.value at 'resid_post.0' is \(4, 32\) float32 on cpu, but through .data or in place it was made "
VALUES: dict[str, Case] = {
    "shape": (assign(torch.zeros(4, 31)), djinn.InvalidValue, HERE + r"\(4, 31\) float32 on cpu.*must be equal"),
    "broadcast": (assign(torch.zeros(WIDTH)), djinn.InvalidValue, HERE + r"\(32,\).*stop.value\[i\] = new"),
    "dtype": (
        assign(torch.zeros(4, WIDTH).double()),
        djinn.InvalidValue,
        HERE + r"\(4, 32\) float64 on cpu.*Assign new.to\(stop.value\)",
    ),
    "device": (assign(torch.zeros(4, WIDTH, device="meta")), djinn.InvalidValue, HERE + r".* on meta"),
    "layout": (
        assign(torch.zeros(4, WIDTH).to_sparse()),
        djinn.InvalidValue,
        HERE + r"\(4, 32\) sparse_coo float32 on cpu.*Assign new.to_dense\(\)",
    ),
    "grad": (
        assign(torch.zeros(4, WIDTH, requires_grad=True)),
        djinn.InvalidValue,
        r"requires grad.*tensor.detach\(\)",
    ),
    "no tensor": (assign(3.0), djinn.InvalidValue, "must be a tensor, got float.*torch.as_tensor"),
    "restore": (
        lambda dj, s: dj.restore(s),
        djinn.InvalidValue,
        r"dj.restore takes a Checkpoint.*got Session.*stop.checkpoint\(\)",
    ),
    "data of another shape": (new_data(torch.zeros(2, WIDTH)), djinn.InvalidValue, MADE + r"\(2, 32\)"),
    "data of another dtype": (new_data(torch.zeros(4, WIDTH).double()), djinn.InvalidValue, MADE + r".*float64"),
    "scale": (
        lambda dj, s: s.steer("resid_post.0", scale=torch.ones(3)),
        djinn.InvalidValue,
        r"edit of 'resid_post.0': scale has shape \(3,\), but one position of this site is \(32,\)",
    ),
    "add": (lambda dj, s: s.steer("attn_q.0", add=torch.ones(3)), djinn.InvalidValue, r"add .*\(3,\).*is \(4, 8\)"),
    "ablate": (
        lambda dj, s: s.steer("resid_post.0", ablate=torch.ones(2, 3)),
        djinn.InvalidValue,
        r"ablate has shape \(2, 3\), but directions of this site are \[32\] or \[k, 32\]",
    ),
    "no direction": (lambda dj, s: s.steer("resid_post.0", ablate=V * 0), djinn.InvalidValue, "direction of length 0"),
    "NaN direction": (lambda dj, s: s.steer("resid_post.0", ablate=V / 0), djinn.InvalidValue, "NaN or Inf"),
    "rank": (
        lambda dj, s: s.steer("resid_post.0", ablate=direction(2, 4, WIDTH)),
        djinn.InvalidValue,
        "uses 4 directions, but .* edit_rank=3. Compile with edit_rank=4 or use fewer",
    ),
    "edit with grad": (
        lambda dj, s: s.steer("resid_post.0", add=V.clone().requires_grad_()),
        djinn.InvalidValue,
        r"Edit\('resid_post.0'\): a tensor requires grad.*tensor.detach\(\)",
    ),
    "two ways": (
        lambda dj, s: s.steer(djinn.Edit("resid_post.0"), scale=2.0),
        djinn.InvalidValue,
        "put every field into the Edit itself",
    ),
    "kv": (
        lambda dj, s: s.steer("resid_post.0", kv="maybe"),  # type: ignore[arg-type]
        djinn.InvalidValue,
        "choose 'keep' or 'recompute'",
    ),
    "act": (
        lambda dj, s: djinn.Feature(V, V, act="gelu", set=1.0),  # type: ignore[arg-type]
        djinn.InvalidValue,
        r"Feature\(act='gelu'\): choose one of linear, relu, jumprelu",
    ),
    "read and write": (lambda dj, s: djinn.Feature(V, V[:3], set=1.0), djinn.InvalidValue, r"write \(3,\); both must"),
    "no target": (lambda dj, s: djinn.Feature(V, V), djinn.InvalidValue, "nothing to do; give set=, min= or max="),
    "set and min": (lambda dj, s: djinn.Feature(V, V, set=1.0, min=0.0), djinn.InvalidValue, "no meaning beside it"),
    "min over max": (
        lambda dj, s: djinn.Feature(V, V, min=2.0, max=1.0),
        djinn.InvalidValue,
        "min=2.0 is above max=1.0",
    ),
    "add NaN": (
        lambda dj, s: s.steer("resid_post.0", add=torch.full((WIDTH,), torch.nan)),
        djinn.InvalidValue,
        r"edit of 'resid_post.0': add \(in 32 of 32 numbers\) is NaN, infinite or too large.*write it into stop.value",
    ),
    "scale inf": (
        lambda dj, s: s.steer("resid_post.0", scale=float("inf")),
        djinn.InvalidValue,
        "edit of 'resid_post.0': scale=inf is NaN, infinite or too large",
    ),
    "scale that overflows": (
        lambda dj, s: s.steer("resid_post.0", scale=1e300),
        djinn.InvalidValue,
        r"edit of 'resid_post.0': scale=1e\+300 is NaN, infinite or too large",
    ),
    "strength NaN": (
        lambda dj, s: s.steer("resid_post.0", add=V, strength=float("nan")),
        djinn.InvalidValue,
        "strength=nan is NaN, infinite or too large",
    ),
    "feature bias": (
        lambda dj, s: s.steer("resid_post.0", feature=djinn.Feature(V, V, bias=float("-inf"), set=1.0)),
        djinn.InvalidValue,
        "feature.bias=-inf is NaN, infinite or too large",
    ),
    "hook's arguments": (
        lambda dj, s: dj.run_with_hooks([3, 4], [("resid_post.0", lambda a, b, c: a)]),
        djinn.InvalidValue,
        r"the hook at 'resid_post.0' has the signature \(a, b, c\); it is called as hook\(value, hook=point\)",
    ),
    "hook": (
        lambda dj, s: dj.run_with_hooks([3, 4], [("resid_post.0", lambda value: value[0])]),
        djinn.InvalidValue,
        r"the hook at 'resid_post.0' returned \(2, 32\) torch.float32; expected \(1, 2, 32\)",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_and_edits(dj: djinn.Dj, name: str) -> None:
    fails(dj, VALUES[name])


ODD: list[Any] = [
    "prompts",
    -1,
    True,
    1.5,
    None,
    slice(0, 9, 2),
    slice(-3, None),
    [1, -2],
    ("prompt", 3),
    ["all", 1.0],
]


@pytest.mark.parametrize("positions", ODD, ids=str)
def test_positions(dj: djinn.Dj, positions: Any) -> None:
    message = r"positions=.*: expected one of 'all', 'prompt', 'generated', 'last_prompt', a tuple of these, an int"
    fails(dj, (lambda dj, s: s.steer("resid_post.0", positions=positions), djinn.InvalidValue, message))
    fails(dj, (lambda dj, s: djinn.break_at("resid_post.0", positions=positions), djinn.InvalidValue, message))


# -- the compiled model --------------------------------------------------------------------------


def test_compile_says_what_is_wrong_with_its_arguments() -> None:
    model = make_model("llama")
    for options, message in (
        ({"backend": "tpu"}, r"backend='tpu': choose 'auto'"),
        ({"max_sessions": 0}, "max_sessions=0: give 1 or more"),
        ({"max_length": -1}, "max_length=-1: give 1 or more"),
        ({"prefill_chunk": 0}, "prefill_chunk=0: give 1 or more"),
        ({"edit_rank": 0}, "edit_rank=0: give 1 or more"),
        ({"max_sessions": 2.5}, "max_sessions=2.5: give 1 or more"),
        ({"row_wait": "long"}, "row_wait='long': give seconds"),
        ({"pinned_bytes": -1}, "pinned_bytes=-1: give a number of bytes, 0 or more"),
        ({"pinned_bytes": "4GB"}, "pinned_bytes='4GB': give a number of bytes, 0 or more"),
        ({"disk_bytes": float("inf")}, "disk_bytes=inf: give a number of bytes, 0 or more"),
        ({"weights_bytes": "6GB"}, "weights_bytes='6GB': give a number of bytes, 1 or more"),
    ):
        with pytest.raises(djinn.InvalidValue, match=message):
            djinn.compile(model, **options)
    with pytest.raises(djinn.UnknownSite, match="nearest: resid_post"):
        djinn.compile(model, sites="resid_pots", verify=False)
    with pytest.raises(djinn.CaptureError, match=r"LlamaForCausalLM cannot be compiled.*training mode.*model.eval\(\)"):
        djinn.compile(model.train())
    handle = model.eval().model.norm.register_forward_hook(print)
    with pytest.raises(djinn.CaptureError, match=r"model.norm has hooks.*remove them"):
        djinn.compile(model)
    handle.remove()


def test_nothing_pickles(dj: djinn.Dj) -> None:
    with dj.session() as s:
        stop = next(begin(s, "resid_post.0"))
        for thing, message in ((dj, "compile it again"), (stop.run, "checkpoint"), (stop, "checkpoint"), (s, None)):
            with pytest.raises(TypeError, match=message):
                pickle.dumps(thing)


def test_a_closed_model_says_so() -> None:
    with another_dj("llama") as dj:
        s = dj.session()
        run = begin(s, "resid_post.0")
        next(run)
    dj.close()
    assert s.closed
    model: list[Callable[[], object]] = [
        lambda: dj([3]),
        dj.session,
        lambda: dj.add_sites("embed"),
        lambda: dj.unembed(V),
    ]
    session: list[Callable[[], object]] = [
        lambda: next(run),
        lambda: s.forward([3]),
        lambda: list(dj.as_stopped([run])),
    ]
    for acts, what in ((model, "compiled model was closed; compile it again"), (session, "session was closed")):
        for act in acts:
            with pytest.raises(djinn.SessionClosed, match=what):
                act()
