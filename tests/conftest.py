"""What every test stands on: no network, no chance, and GPU tests that are seen to be skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

# Before transformers is imported: a test that wants the network is a test that fails elsewhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DJINN_CACHE_DIR"] = "off"  # nor do tests write into the user's cache

import pytest
import torch
from hypothesis import Phase, settings

from djinn_fx.runtime.bits import same_bits
from djinn_fx.runtime.doubt import Doubt, Doubts, Verdict

# The number of threads decides how reductions are cut, hence their bits: the same on every machine. One is also the
# fastest for models this small.
torch.set_num_threads(1)

# Same examples in every run, no timing. `HYPOTHESIS_PROFILE=explore` looks for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None, print_blob=True, max_examples=1000)
# A failure is shown as it was found: to make it smaller takes many more runs. `seek` does so with new examples.
settings.register_profile(
    "unshrunk", derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate]
)
settings.register_profile(
    "seek", deadline=None, database=None, print_blob=True, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_configure(config: pytest.Config) -> None:
    # Inductor's advice for fp32 on a GPU; another precision means other bits.
    config.addinivalue_line("filterwarnings", "ignore:TensorFloat32 tensor cores:UserWarning")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Random weights and inputs are the same whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def early_remainders(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA graphs of later parts of a step are made the second time, so that tests come to them."""
    monkeypatch.setattr("djinn_fx.runtime.graphs.REPEATS", 2)


@pytest.fixture(autouse=True)
def late_answers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, too, whether a written value is an edit is told when its step has run."""
    if torch.cuda.is_available() or request.node.get_closest_marker("prompt_answers"):
        return

    def raised(doubts: Doubts, value: torch.Tensor, before: torch.Tensor) -> Doubt:
        known = not same_bits(value, before)
        return Doubt(value.clone(memory_format=torch.contiguous_format), Verdict(None, lambda: known))

    monkeypatch.setattr(Doubts, "raised", raised)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by playwright."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    with sync.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()
