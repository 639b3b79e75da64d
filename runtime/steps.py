"""Steps: the journalled unit of a session's history.

A step is one execution of one program for one session: a chunk of a prompt or one decoded token. What it computes is a
function of the KV prefix before it and of the step itself, which is why KV[0:p) and the journal of steps determine
every past state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from djinn_fx.runtime.positions import matching
from djinn_fx.sites import Site
from djinn_fx.specs import Positions, ProgramShape

if TYPE_CHECKING:
    from djinn_fx.runtime.steering import Armed

#: Stands for a token that so far only the device knows, in a step that is launched ahead.
UNKNOWN = -1

#: The edits in force, by canonical site name. Never mutated: a change makes a new mapping.
Steering = Mapping[str, "Armed"]


@dataclass(frozen=True)
class Step:
    """One step of one session.

    Attributes:
        start: absolute position of its first token.
        tokens: its tokens, pads not counted.
        sampled: for each token, whether it was sampled.
        last_prompt: position of the call's last prompt token, -1 if it gave none.
        shape: shape of the program that ran it; a replay uses the same one.
        steering: ``(after, edits)`` pairs: sites whose order is above ``after`` were steered by ``edits``, until the
            next pair takes over. The first pair has ``after = -1``.
        injections: value by site ``[tokens, *feature_shape]``, for every site that the user edited in this step.
    """

    start: int
    tokens: tuple[int, ...]
    sampled: tuple[bool, ...]
    last_prompt: int
    shape: ProgramShape
    steering: tuple[tuple[int, Steering], ...]
    injections: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return self.start + len(self.tokens)

    @property
    def decodes(self) -> bool:
        """Whether this is a decode step: one token through a one-token program."""
        return self.shape.query == 1

    @property
    def positions(self) -> tuple[int, ...]:
        """Absolute positions of its tokens."""
        return tuple(range(self.start, self.stop))

    def tokens_of(self, site: Site) -> range:
        """Indices of the tokens that the value of ``site`` covers: all, or for the head only the kept ones."""
        count = len(self.tokens)
        if site.axis == "kept" and self.shape.keep < self.shape.query:
            return range(count - 1, count)
        return range(count)

    def matching(self, spec: Positions) -> tuple[bool, ...]:
        """For each token, whether ``spec`` speaks of its position."""
        return matching(spec, self.start, self.sampled, self.last_prompt)

    def steering_at(self, order: int) -> Steering:
        """The edits that act at the site of this order."""
        current: Steering = {}
        for after, edits in self.steering:
            if after < order:
                current = edits
        return current

    def onward(self, start: int, token: int) -> Step:
        """A decode step like this one, of another sampled token at another place.

        Made in passing, many times for each launch: a third of what the constructor takes.
        """
        made = object.__new__(Step)
        fields = made.__dict__
        fields.update(self.__dict__)
        fields["start"], fields["tokens"] = start, (token,)
        return made

    def edited(self, site: str, value: torch.Tensor) -> Step:
        """This step with the value of ``site`` replaced by ``value``."""
        return replace(self, injections={**self.injections, site: value})

    def unedited(self, site: str) -> Step:
        """This step without the user's value of ``site``."""
        return replace(self, injections={name: value for name, value in self.injections.items() if name != site})

    def steered(self, after: int, edits: Steering) -> Step:
        """This step with ``edits`` acting at the sites behind order ``after``; itself if they do so already."""
        since, acting = self.steering[-1]
        if acting is edits and since <= after:
            return self
        kept = tuple(pair for pair in self.steering if pair[0] < after)
        return replace(self, steering=(*kept, (after, edits)))

    def until(self, order: int, orders: Mapping[str, int]) -> Step:
        """This step as it was when it reached the site of ``order``: later entries are dropped."""
        return replace(
            self,
            steering=tuple(pair for pair in self.steering if pair[0] < order),
            injections={site: value for site, value in self.injections.items() if orders[site] < order},
        )
