"""Sites: the names of activations, and how users' names resolve to them.

A site is the key of everything: breakpoints, edits, captures and checkpoints name activations by site, never by
an fx node. Canonical names are ``role.N`` (``resid_post.6``), ``embed``, ``final_norm``, ``logits`` and a module's own
path (``model.layers.6.mlp``, with ``:in`` for its input). TransformerLens names are aliases; globs select many sites.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from djinn_fx.errors import InvalidValue, SiteNotCompiled, UnknownSite

#: The role of each TransformerLens hook name (TransformerLens 4, ``HookedTransformer`` hook points).
TRANSFORMER_LENS: Mapping[str, str] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_q": "attn_q",
    "attn.hook_rot_q": "attn_q",
    "attn.hook_k": "attn_k",
    "attn.hook_rot_k": "attn_k",
    "attn.hook_v": "attn_v",
    "attn.hook_z": "attn_z",
    "mlp.hook_post": "mlp_act",
}
#: Stars of a glob; matching one takes time that grows with each.
_MOST_STARS = 8

_LENS_BLOCK = re.compile(r"^blocks\.(?P<layer>[^.]+)\.(?P<hook>.+)$")
_LENS_TOP: Mapping[str, str] = {"hook_embed": "embed", "ln_final.hook_normalized": "final_norm"}

RESERVED = ("attn_pattern", "router")
_LENS_RESERVED: Mapping[str, str] = {"attn.hook_pattern": "attn_pattern", "attn.hook_attn_scores": "attn_pattern"}


@dataclass(frozen=True)
class Site:
    """One addressable activation.

    Attributes:
        name: the canonical name, e.g. ``"resid_post.6"``.
        order: rank in execution order among all sites of the model.
        feature_shape: shape of one position's value, e.g. ``(768,)`` or ``(heads, d_head)``; for plain modules the
            whole shape of the value.
        axis: ``"query"``: the value is ``[rows, query, *feature_shape]``; ``"kept"``: ``[rows, kept, *feature_shape]``,
            only the positions whose logits were asked for; ``"whole"``: the module's own shape (plain modules).
        layer: index of the block, or None.
        role: the role in a transformer block (``"resid_post"``), or None for a plain module path.
        aliases: other names of the same activation.
        module: path of the module that makes it.
        dtype: the value's dtype where it is not the model's (a router in fp32), else None.
        layout: how the model's own graph holds the value, for the compiler: ``"rows"`` as said above, ``"flat"``
            ``[rows * query, *feature_shape]``, ``"heads"`` ``[rows, heads, query, dim]``. Users never see it.
    """

    name: str
    order: int
    feature_shape: tuple[int, ...]
    axis: Literal["query", "kept", "whole"] = "query"
    layer: int | None = None
    role: str | None = None
    aliases: tuple[str, ...] = ()
    module: str = ""
    dtype: torch.dtype | None = None
    layout: Literal["rows", "flat", "heads"] = "rows"

    @property
    def width(self) -> int:
        """Number of elements of one position's value."""
        return math.prod(self.feature_shape)


def from_transformer_lens(name: str) -> str:
    """Translate a TransformerLens hook name to a site name; other names come back unchanged."""
    if name in _LENS_TOP:
        return _LENS_TOP[name]
    match = _LENS_BLOCK.match(name)
    role = match and (TRANSFORMER_LENS.get(match["hook"]) or _LENS_RESERVED.get(match["hook"]))
    if match and role:
        return f"{role}.{match['layer']}"
    return name


@dataclass(frozen=True)
class SiteTable:
    """All sites of one model, and the rules by which names resolve to them.

    Attributes:
        sites: every site, in execution order.
        absent: reason by name, for the sites that this model cannot have (``resid_mid.3`` in a parallel block);
            a key without a dot speaks for the whole role.
    """

    sites: tuple[Site, ...]
    absent: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        index: dict[str, Site] = {}
        for site in self.sites:
            for name in (site.name, *site.aliases):
                index.setdefault(name, site)
        object.__setattr__(self, "_index", index)

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names in execution order."""
        return tuple(site.name for site in self.sites)

    def get(self, name: str) -> Site:
        """The site that ``name`` (canonical, alias or TransformerLens name) stands for.

        Raises:
            UnknownSite: with the reason if the model cannot have it, else with the nearest names.
            InvalidValue: something else than a name.
        """
        index: dict[str, Site] = self._index  # type: ignore[attr-defined]
        wanted = from_transformer_lens(_name(name))
        if wanted in index:
            return index[wanted]
        raise UnknownSite(self._why_unknown(name, wanted))

    def single(self, name: str) -> Site:
        """As :meth:`get`, for calls that take one site: a glob or a role that stands for several is told so.

        Raises:
            UnknownSite: no such site, or several.
        """
        try:
            return self.get(name)
        except UnknownSite:
            several = self.select(name)
            if len(several) == 1:
                return several[0]
            raise UnknownSite(
                f"{name!r} stands for {len(several)} sites, but this takes one. Give one per layer: "
                f"{several[0].name!r}, {several[1].name!r}..."
            ) from None

    def select(self, patterns: str | Iterable[str]) -> tuple[Site, ...]:
        """All sites that the names or globs stand for, in execution order, each once.

        A bare role (``"resid_post"``) means the role at every layer. In a glob ``*`` stands for one part between dots
        and ``**`` for any number of them; ``"*"`` alone means every site with a role, or, where a model has no
        roles, every module's output.

        Raises:
            UnknownSite: a name or a glob that stands for nothing.
            InvalidValue: something else than names.
        """
        chosen: dict[str, Site] = {}
        if not isinstance(patterns, Iterable):
            raise InvalidValue(f"sites are named by a str or a list of them, such as 'resid_post.*', not {patterns!r}.")
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            for site in self._expand(pattern):
                chosen[site.name] = site
        return tuple(sorted(chosen.values(), key=lambda site: site.order))

    def _expand(self, pattern: str) -> Sequence[Site]:
        index: dict[str, Site] = self._index  # type: ignore[attr-defined]
        wanted = re.sub(r"\*{3,}", "**", from_transformer_lens(_name(pattern)))
        if wanted in index:
            return (index[wanted],)
        if wanted == "*":
            roles = [site for site in self.sites if site.role is not None]
            return roles or [site for site in self.sites if not site.name.endswith(":in")]
        if len(re.findall(r"\*+", wanted)) > _MOST_STARS:
            raise UnknownSite(f"{pattern[:40]!r}...: a glob takes up to {_MOST_STARS} stars.")
        rule = _glob(wanted) if "*" in wanted or "?" in wanted else rf"{re.escape(wanted)}\.\d+"
        found = [site for name, site in index.items() if re.fullmatch(rule, name)]
        if found:
            return found
        raise UnknownSite(self._why_unknown(pattern, wanted))

    def _why_unknown(self, name: str, wanted: str) -> str:
        role = wanted.split(".")[0]
        if role in RESERVED:
            return (
                f"site {name!r} is reserved and not available yet: attention patterns and router weights are computed "
                "inside one opaque operation. Use attn_q/attn_k to recompute a pattern, or mlp_out for a mixture's sum."
            )
        reason = self.absent.get(wanted) or self.absent.get(role)
        if reason:
            return f"this model has no site {name!r}: {reason}."
        layers = [site.layer for site in self.sites if site.layer is not None]
        last = max(layers, default=0)
        ends = [re.sub(r"(?<=\.)\d+(?=\.|$)", str(layer), name, count=1) for layer in (0, last)]
        if layers and ends[0] != ends[1] and self._knows(ends[1]):
            first = ends[0] if self._knows(ends[0]) else ""
            there = f"{first} to {ends[1]}" if first else f"up to {ends[1]}"
            return f"no site {name!r}: this model's layers are 0 to {last}, so {there}."
        near = self._near(name, wanted)
        hint = f"nearest: {', '.join(near)}" if near else "dj.sites.names lists them all"
        span = f" (layers are 0 to {last})" if layers else ""
        return f"no site {name!r} in this model{span}; {hint}."

    def _knows(self, name: str) -> bool:
        return from_transformer_lens(name) in self._index  # type: ignore[attr-defined]

    def _near(self, name: str, wanted: str) -> list[str]:
        """Names like an unknown one; where it looks like one of TransformerLens, those first, with what they mean."""
        index: dict[str, Site] = self._index  # type: ignore[attr-defined]
        if "hook" in name or name.startswith("block"):
            layers = {str(site.layer) for site in self.sites if site.layer is not None} | {"*"}
            hooks = [hook for hook, role in TRANSFORMER_LENS.items() if any(site.role == role for site in self.sites)]
            known = [f"blocks.{layer}.{hook}" for layer in layers for hook in hooks if layer != "*" or "*" in name]
            found = difflib.get_close_matches(name, sorted([*known, *_LENS_TOP]), n=3, cutoff=0.75)
            if found:
                return [f"{lens} ({from_transformer_lens(lens)})" for lens in found]
        return difflib.get_close_matches(wanted, list(index), n=4, cutoff=0.5)


def _name(given: Any) -> str:
    if isinstance(given, str):
        return given
    raise InvalidValue(f"a site is named by a str, such as 'resid_post.1', not by {given!r}.")


def _glob(pattern: str) -> str:
    """The regular expression of a glob whose ``*`` does not cross dots."""
    parts = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return "".join(parts.get(token, re.escape(token)) for token in re.findall(r"\*\*|.", pattern))


def require_compiled(site: Site, compiled: Iterable[str]) -> Site:
    """Return ``site`` if it is among the compiled ones.

    Raises:
        SiteNotCompiled: naming the call that compiles it.
    """
    if site.name not in set(compiled):
        raise SiteNotCompiled(
            f"site {site.name!r} exists but was not compiled in, so a run cannot stop or be steered there. "
            f"Call dj.add_sites({site.name!r}), or compile with sites=[..., {site.name!r}]."
        )
    return site
