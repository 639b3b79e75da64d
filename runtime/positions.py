"""Which positions of a step an edit or a breakpoint speaks of."""

from __future__ import annotations

from collections.abc import Sequence

from djinn_fx.specs import Positions


def matching(spec: Positions, start: int, sampled: Sequence[bool], last_prompt: int) -> tuple[bool, ...]:
    """For each position from ``start`` on, whether ``spec`` speaks of it.

    Args:
        spec: the user's ``positions=`` argument, already checked.
        start: absolute position of the first token.
        sampled: for each token, whether it was sampled (``"generated"``) or given (``"prompt"``).
        last_prompt: absolute position of the call's last prompt token, -1 if the call gave none.
    """
    if spec == "all":  # almost always
        return (True,) * len(sampled)
    if spec == "generated":
        return tuple(sampled)
    words = spec if isinstance(spec, (tuple, list)) and spec and isinstance(spec[0], str) else (spec,)
    return tuple(
        any(_speaks_of(word, start + offset, drawn, last_prompt) for word in words)
        for offset, drawn in enumerate(sampled)
    )


def as_index(chosen: Sequence[int]) -> slice | list[int]:
    """Ascending indices as a slice, if they are a stretch: a list would have to be sent to the device."""
    if len(chosen) == chosen[-1] - chosen[0] + 1:
        return slice(chosen[0], chosen[-1] + 1)
    return list(chosen)


def _speaks_of(spec: Positions, position: int, sampled: bool, last_prompt: int) -> bool:
    if isinstance(spec, str):
        return {
            "all": True,
            "prompt": not sampled,
            "generated": sampled,
            "last_prompt": position == last_prompt,
        }[spec]
    if isinstance(spec, int):
        return position == spec
    if isinstance(spec, slice):
        return (spec.start or 0) <= position and (spec.stop is None or position < spec.stop)
    return position in spec
