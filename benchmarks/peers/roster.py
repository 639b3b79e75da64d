"""The roster of peers: a peer is a file of this folder that names one or more :class:`Peer` ``PEERS``."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path

from djinn_fx.benchmarks.decoder import Peer


def peers() -> list[Peer]:
    """Every peer: those that compile behind those that do not, and those that change the model last."""
    folder = [str(Path(__file__).parent)]
    found: list[Peer] = []
    for module in pkgutil.iter_modules(folder):
        loaded = importlib.import_module(f"djinn_fx.benchmarks.peers.{module.name}")
        found += getattr(loaded, "PEERS", ())
    return sorted(found, key=lambda peer: (peer.last, peer.compiles))


def not_installed(module: str, extra: str) -> str | None:
    """Why a module cannot be imported, or None if it seems it can.

    Args:
        module: to look for.
        extra: how to get it.
    """
    if importlib.util.find_spec(module) is not None:
        return None
    return f"{module} is not installed ({extra})"
