"""Tokens, positions, tensors and norms in words and curves, for what a notebook shows.

Values are reduced where they lie; only norms come to the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from djinn_fx.specs import Edit
from djinn_fx.views import Curve

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine

#: Points of a curve at most; where there are more values, the largest of neighbours is drawn.
POINTS = 200


def word(engine: Engine, token: int) -> str:
    """One token as a reader sees it: its text in quotes, or its number where there is no tokenizer."""
    text = engine.decode_text([token])
    return str(token) if text is None else repr(text)


def kind_of(value: torch.Tensor) -> str:
    """Shape, dtype and device in a few words."""
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"


def nbytes(count: int) -> str:
    """Bytes in the unit that suits."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def tail(engine: Engine, tokens: list[int], count: int = 12) -> str:
    """The last tokens, the current one last."""
    shown = tokens[-count:]
    before = "… " if len(tokens) > len(shown) else ""
    text = engine.decode_text(shown)
    return before + (" ".join(map(str, shown)) if text is None else text)


def span(positions: Sequence[int]) -> str:
    """Positions in a few words."""
    if len(positions) == 1:
        return f"position {positions[0]}"
    if len(positions) > 2 and list(positions) == list(range(positions[0], positions[-1] + 1)):
        return f"positions {positions[0]} to {positions[-1]}"
    shown = ", ".join(map(str, positions[:8]))
    return f"positions {shown}{f' and {len(positions) - 8} more' if len(positions) > 8 else ''}"


def short(number: float) -> str:
    """A norm with two digits behind the point; a huge one, an infinity or NaN as it comes."""
    return f"{number:.2f}" if math.isfinite(number) and abs(number) < 1e5 else f"{number:.3g}"


def numbers(value: torch.Tensor) -> str:
    """Norm, mean, extremes and how many are not finite."""
    if not value.numel():
        return "empty"
    if not value.is_floating_point():
        return f"{int(value.amin())} to {int(value.amax())}"
    wide = torch.promote_types(value.dtype, torch.float32)
    mean, low, high = value.mean(dtype=wide), value.amin().to(wide), value.amax().to(wide)
    norm = torch.linalg.vector_norm(value, dtype=wide)
    bad = [value.isnan().sum().to(wide), value.isinf().sum().to(wide)]
    found = torch.stack([norm, mean, low, high, *bad]).tolist()
    lost = nonfinite(int(found[4]), int(found[5]))
    return "norm {:.4g}, mean {:+.3g}, min {:+.3g}, max {:+.3g}".format(*found[:4]) + (f", {lost}" if lost else "")


def nonfinite(nans: int, infs: int) -> str:
    """How many values are NaN or infinite; nothing where none is."""
    return ", ".join(f"{count} {name}" for count, name in ((nans, "NaN"), (infs, "Inf")) if count)


def edit(what: Edit) -> str:
    """An edit in a few words, as the keywords that made it."""
    parts = []
    if isinstance(what.scale, torch.Tensor):
        parts.append(f"scale={tuple(what.scale.shape)}")
    elif what.scale != 1:
        parts.append(f"scale={what.scale:g}")
    if what.add is not None:
        parts.append(f"add (norm {short(float(what.add.float().norm()))})")
    parts += [name for name in ("ablate", "feature") if getattr(what, name) is not None]
    if what.strength != 1:
        parts.append(f"strength={what.strength:g}")
    if what.positions != "all":
        parts.append(f"positions={what.positions!r}")
    return f"{what.site}: {', '.join(parts) or 'no change'}"


def row_norms(value: torch.Tensor, axes: int) -> torch.Tensor:
    """Norm of each position's value ``[T]`` behind one or two axes; with none, of the whole, ``[1]``.

    Of many prompts it is the mean of those that are not all zero there.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    norms: torch.Tensor = torch.linalg.vector_norm(value.reshape(*value.shape[:axes], -1), dim=axes, dtype=wide)
    if axes == 2:
        norms = norms.sum(0) / (norms != 0).sum(0).clamp_min(1)
    return norms.reshape(-1)


def norms_of(value: torch.Tensor) -> list[float]:
    """The norm at each of a stop's positions, in fp32 or wider."""
    return row_norms(value, 1).tolist()


def pooled(norms: torch.Tensor, points: int = POINTS) -> list[float]:
    """Norms ``[T]`` on the host, the largest of neighbours where there are more than ``points``."""
    each = math.ceil(norms.numel() / points)
    if each > 1:
        norms = torch.nn.functional.pad(norms, (0, -norms.numel() % each)).view(-1, each).amax(1)
    return norms.tolist()


def curve(norms: Sequence[float], first: int, last: int, marks: Sequence[int] = ()) -> Curve:
    """Norms as a curve, the largest of neighbours where there are more than ``POINTS``."""
    each = math.ceil(len(norms) / POINTS)
    kept = tuple(sorted({mark // each for mark in marks})) if len(marks) < len(norms) else ()
    return Curve(tuple(pooled(torch.tensor(norms))), str(first), str(last), kept)
