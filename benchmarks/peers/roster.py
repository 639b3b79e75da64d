"""The roster of peers: a peer is a file of this folder that names one or more :class:`Peer` ``PEERS``."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path

from djinn_fx.benchmarks.answers import Work
from djinn_fx.benchmarks.decoder import Decoder, Peer
from djinn_fx.benchmarks.models import Loaded


def peers() -> list[Peer]:
    """Every peer: those that compile behind those that do not, and those that change the model last.

    A file that cannot be imported is a peer that is absent, with the reason.
    """
    folder = [str(Path(__file__).parent)]
    found: list[Peer] = []
    for module in pkgutil.iter_modules(folder):
        try:
            loaded = importlib.import_module(f"djinn_fx.benchmarks.peers.{module.name}")
        except Exception as error:
            found.append(Broken(module.name, error))
            continue
        found += getattr(loaded, "PEERS", ())
    return sorted(found, key=lambda peer: (peer.last, peer.compiles))


class Broken:
    """A peer whose file cannot be imported."""

    last = compiles = expected_wrong = False
    no_forward: str | None = None

    def __init__(self, name: str, error: Exception) -> None:
        self.name = name
        self.why = f"benchmarks/peers/{name}.py cannot be imported ({type(error).__name__}: {error})"

    def available(self, loaded: Loaded) -> str | None:
        """Never."""
        return self.why

    def refusal(self, work: Work) -> str | None:
        """Everything."""
        return self.why

    def no_pause(self) -> str:
        """As it cannot do anything."""
        return self.why

    def open(self, loaded: Loaded, room: int) -> Decoder:
        """It has none.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(self.why)


def why_not(peer: Peer, loaded: Loaded, *, quick: bool) -> str | None:
    """Why a peer is not measured here, or None; one that fails to say whether it can run cannot."""
    try:
        why = peer.available(loaded)
    except Exception as error:
        return f"it failed to say whether it can run ({type(error).__name__}: {error})"
    if why is None and quick and peer.compiles:
        return "left out of a --quick run: compiling takes longer than the rest"
    return why


def not_installed(module: str, extra: str) -> str | None:
    """Why a module cannot be imported, or None if it seems it can.

    Args:
        module: to look for.
        extra: how to get it.
    """
    if importlib.util.find_spec(module) is not None:
        return None
    return f"{module} is not installed ({extra})"
