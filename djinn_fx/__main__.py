"""``python -m djinn_fx``: the command line."""

from __future__ import annotations

from djinn_fx.cli import app

if __name__ == "__main__":
    app(prog_name="djinn-fx")
