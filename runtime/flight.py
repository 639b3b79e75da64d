"""A step in the air: begun, perhaps executed, not yet part of the session's history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from djinn_fx.errors import InternalError
from djinn_fx.runtime.breakpoints import Answer
from djinn_fx.runtime.doubt import Doubt
from djinn_fx.runtime.executor import RowValues, StepValues
from djinn_fx.runtime.stages import Chunk
from djinn_fx.runtime.steps import Steering, Step
from djinn_fx.runtime.tables import acting, site_row
from djinn_fx.sites import Site


@dataclass
class Flight:
    """The step a run is in.

    A decode step is speculative: it ran to its end and ``values`` hold what it left at every site; a change makes
    ``values`` None, and the step runs again with the change injected. A prompt chunk stops for real: ``chunk`` holds
    its environment between two segments.

    Attributes:
        step: the step, with what the user changed in it so far.
        passed: order of the last site that was delivered or passed; -1 at the start.
        values: a decode step's values, once executed.
        chunk: a prompt chunk's execution, once begun.
        drawn: the token that a decode step's logits come to, where it was drawn ahead.
        answers: what predicates said of a decode step's values, by breakpoint (its identity) and site, where every
            breakpoint that could stop the step was asked; None where not.
        doubt: a site and the edit there of which it is not known yet whether it is one.
    """

    step: Step
    passed: int = -1
    values: RowValues | None = None
    chunk: Chunk | None = None
    drawn: int | None = None
    answers: dict[tuple[int, str], Answer] | None = None
    doubt: tuple[str, Doubt] | None = None

    @property
    def passes(self) -> bool:
        """Whether every predicate was asked and none holds, so that the step stops nowhere; waits for the device."""
        return self.answers is not None and not any(answer.read() for answer in self.answers.values())

    def sites(self, compiled: tuple[Site, ...]) -> tuple[Site, ...]:
        """The sites at which this step can stop: a chunk keeps those it began with."""
        return compiled if self.chunk is None else self.chunk.program.sites

    def value(self, site: Site) -> torch.Tensor:
        """Value of a site that the step has reached: ``[tokens, *feature_shape]``, a view."""
        if self.chunk is not None:
            return site_row(site, self.chunk.env, 0, self.step)
        if self.values is None:
            raise InternalError(f"the value of {site.name!r} was asked for before its step ran")
        return self.values.value(site)

    def memory(self, site: Site) -> torch.Tensor:
        """:meth:`value`, perhaps with what lies behind it: to cut that off takes longer than to look at a value."""
        if self.chunk is not None:
            whole = self.chunk.env[site.name]
            if whole.is_contiguous() and whole.shape[0] == 1:
                return whole
        return self.value(site)

    def own(self, sites: Sequence[Site], part: float) -> Mapping[str, torch.Tensor]:
        """Values of sites, ``part`` of all there are, to be handed out: nobody else writes or reads them."""
        if self.chunk is None and self.values is not None:
            return self.values.own(sites, part)
        return {site.name: self.value(site).clone() for site in sites}

    def logits(self) -> torch.Tensor:
        """Logits of the kept positions of a complete step, ``[kept, vocab]``, a view."""
        if self.chunk is not None:
            return StepValues(self.step, 0, self.chunk.env).logits
        if self.values is None:
            raise InternalError("logits were asked for before their step ran")
        return self.values.logits

    @property
    def token(self) -> int | None:
        """The most likely next token, if the step found it already."""
        return None if self.values is None else self.values.token

    def replace(self, site: Site, doubt: Doubt) -> None:
        """Put the user's value in the place of a site's value; what follows is computed from it."""
        self.settle()
        self.step, self.doubt = self.step.edited(site.name, doubt.own), (site.name, doubt)
        if self.chunk is None:
            self.values = None
            return
        whole = self.chunk.env[site.name].clone()
        whole[0, : doubt.own.shape[0]] = doubt.own
        self.chunk.put({site.name: whole})

    def settle(self) -> None:
        """Forget the last edit if it turns out to have changed nothing: what was computed since is the same without it.

        It waits until the device has looked; the step that runs meanwhile is not waited for.
        """
        if self.doubt is not None:
            site, doubt = self.doubt
            if not doubt.holds():
                self.step = self.step.unedited(site)
            self.doubt = None

    @property
    def reached(self) -> int:
        """Order of the last site that is behind the step already: new edits act at later ones."""
        if self.chunk is None or not self.chunk.next_segment:
            return self.passed
        last = self.chunk.program.segments[self.chunk.next_segment - 1].site
        return max(self.passed, last.order if last is not None else self.passed)

    def steer(self, steering: Steering, sites: tuple[Site, ...]) -> None:
        """Let new edits act at the sites behind the one just passed."""
        before, reached = self.step, self.reached
        self.step = before.steered(reached, steering)
        if self.step is before:
            return
        later = [site for site in sites if site.order > reached]
        if any(acting(before, site) is not acting(self.step, site) for site in later):
            self.values = None
