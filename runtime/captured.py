"""What decode steps captured: copies of whole buffers, shared by the rows of a step, and views of them by site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Snapshot:
    """Copies of what one launch left, for one lane or for all.

    Attributes:
        first: the lane that index 0 stands for.
        logits: ``[lanes, 1, vocab]``.
        taps: copies of :attr:`djinn_fx.runtime.lanes.Lanes.taps`, ``[sites, lanes, ...]``; empty where there are none.
        wanted: what part of its lanes somebody asked for.
    """

    first: int
    logits: torch.Tensor
    taps: tuple[torch.Tensor, ...]
    wanted: float = 1.0


class KeptSites(Mapping[str, torch.Tensor]):
    """Values of one lane at some sites, ``[1, *feature_shape]``: views of a snapshot, made when asked for.

    Args:
        snapshot: what holds them.
        lane: whose.
        names: the sites' names.
        places: where the taps hold a site, by name: which buffer, and at which index.
    """

    def __init__(
        self, snapshot: Snapshot, lane: int, names: tuple[str, ...], places: Mapping[str, tuple[int, int]]
    ) -> None:
        self._snapshot, self._index = snapshot, lane - snapshot.first
        self._names, self._places = names, places

    @staticmethod
    def joined(several: Sequence[KeptSites]) -> dict[str, torch.Tensor]:
        """Values of many steps of one run, ``[steps, *feature_shape]`` by site, in few launches.

        Args:
            several: those of each step, all of the same sites.
        """
        names, places = several[0]._names, several[0]._places
        whole = {
            buffer: torch.stack([each._snapshot.taps[buffer][:, each._index] for each in several], dim=1)
            for buffer in {places[name][0] for name in names}
        }
        every = sum(values.shape[0] for values in whole.values()) == len(names)
        found = {name: whole[places[name][0]][places[name][1]] for name in names}
        return found if every else {name: value.clone() for name, value in found.items()}

    def alike(self, other: KeptSites) -> bool:
        """Whether they can be :meth:`joined`."""
        return self._names == other._names and self._places is other._places

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        buffer, rank = self._places[name]
        return self._snapshot.taps[buffer][rank, self._index : self._index + 1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def joined(captured: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[Mapping[str, torch.Tensor]]:
    """What the steps of one run captured, in order; steps whose values lie in snapshots come together."""
    stretch: list[KeptSites] = []
    for values in captured:
        kept = isinstance(values, KeptSites) and (not stretch or stretch[0].alike(values))
        if not kept and stretch:
            yield KeptSites.joined(stretch)
            stretch = []
        if isinstance(values, KeptSites):
            stretch.append(values)
        else:
            yield values
    if stretch:
        yield KeptSites.joined(stretch)
