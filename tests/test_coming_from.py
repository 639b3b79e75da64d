"""The table of hook names in docs/coming_from.md is what the names resolve to, and has all of them."""

from __future__ import annotations

import re
from pathlib import Path

from djinn_fx.sites import TRANSFORMER_LENS, from_transformer_lens

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coming_from.md"


def test_every_hook_name_is_in_the_table_with_its_site() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| `([^`.]+(?:\.N)?)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    table = {name: site for name, site in rows if from_transformer_lens(name) != name}
    assert {name: from_transformer_lens(name) for name in table} == table
    assert set(table) >= {f"blocks.N.{hook}" for hook in TRANSFORMER_LENS} | {"hook_embed", "ln_final.hook_normalized"}
