"""The logit lens at a stop: likeliest tokens at each layer, and how the last layer's moved over the layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from djinn_fx.dj import Dj
from djinn_fx.errors import DjinnError
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.wording import word
from djinn_fx.views import Share

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Moved:
    """One token over the layers.

    Attributes:
        text: the token.
        probabilities: by layer.
        ranks: by layer, 1 the likeliest; 0 where the layer is not finite.
    """

    text: str
    probabilities: tuple[float, ...]
    ranks: tuple[int, ...]

    def spark(self, most: float) -> str:
        """Its probabilities as bars, ``most`` a full one; NaN is ``!``."""
        return "".join(_BARS[min(7, int(p / most * 7.999))] if p == p else "!" for p in self.probabilities)


@dataclass(frozen=True)
class Lens:
    """What the residual after each layer would say.

    Attributes:
        sites: the layers' sites.
        words: likeliest tokens of each, the likeliest first.
        moved: the tokens that the last layer (the last finite one) finds likeliest, over the layers.
        here: the site of the stop, where it is one of ``sites``.
        value: the stopped value itself, where it is a residual between them.
    """

    sites: tuple[str, ...]
    words: tuple[tuple[Share, ...], ...]
    moved: tuple[Moved, ...]
    here: str | None
    value: tuple[Share, ...] = ()

    @property
    def most(self) -> float:
        """The largest probability of the tokens that moved."""
        return max([p for moved in self.moved for p in moved.probabilities if p == p] + [1e-9])

    def text(self) -> str:
        """All layers, a line each; then the tokens that moved."""
        lines = [f"{'>' if site == self.here else ' '} {site:<14} {row(words)}" for site, words in self.named()]
        width = max((len(moved.text) for moved in self.moved), default=0)
        for moved in self.moved:
            ranks = " ".join(str(rank or "?") for rank in moved.ranks)
            lines.append(f"  {moved.text:<{width}}  {moved.spark(self.most)}  rank {ranks}")
        return "\n".join(lines)

    def named(self) -> list[tuple[str, tuple[Share, ...]]]:
        """Sites with their words, the value itself last."""
        found = list(zip(self.sites, self.words, strict=True))
        return [*found, ("here", self.value)] if self.value else found


def row(words: tuple[Share, ...]) -> str:
    """Words with their probabilities."""
    return "  ".join(f"{said.text} {said.share:.0%}" for said in words) if words else "not finite"


def lens_at(dj: Dj, stop: Stop, count: int = 3) -> Lens:
    """The lens at the last position of a stop, with the value as it is there now.

    Raises:
        StaleStop, DjinnError: the stop went stale, or the model's residual cannot be unembedded.
    """
    cache = dj.run_with_cache(stop, "resid_post", positions=-1, logits=False)[1]
    if not len(cache):
        raise DjinnError("this model has no resid_post sites, so there is no logit lens.")
    logits = dj.unembed(cache.stack("resid_post", -1)[:, 0]).float()
    chances = logits.softmax(-1)
    sound = torch.isfinite(chances).all(-1)
    last = int(sound.nonzero()[-1]) if bool(sound.any()) else 0
    best = chances[last].nan_to_num(0).topk(min(count, chances.shape[-1])).indices.tolist() if sound.any() else []
    moved = tuple(
        Moved(
            word(dj.engine, token),
            tuple(chances[:, token].tolist()),
            tuple(((1 + (logits > logits[:, token, None]).sum(-1)) * sound).tolist()),
        )
        for token in best
    )
    between = stop.place.role in ("resid_pre", "resid_mid")
    value = _words(dj, dj.unembed(stop.value[-1]).float().softmax(-1), count) if between else ()
    here = stop.site if stop.site in cache else None
    return Lens(tuple(cache), tuple(_words(dj, p, count) for p in chances), moved, here, value)


def _words(dj: Dj, chances: torch.Tensor, count: int) -> tuple[Share, ...]:
    if not torch.isfinite(chances).all():
        return ()
    best = chances.topk(min(count, chances.shape[-1]))
    return tuple(
        Share(word(dj.engine, token), p) for token, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
