"""Between a decode step's launch and the wait for it: predicates are asked and tokens drawn, many in few launches.

The device is still busy with the step meanwhile, so nobody waits once more for the answers. Predicates are the user's
code: no lock is held while they run, and what they look at are copies, which no other thread's step overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from djinn_fx.runtime import planner
from djinn_fx.runtime.breakpoints import Question
from djinn_fx.runtime.flight import Flight
from djinn_fx.runtime.launch import LaunchValues
from djinn_fx.runtime.modes import without_grad
from djinn_fx.runtime.positions import as_index
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.sampling import sample
from djinn_fx.sites import Site

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine


def ask(engine: Engine, groups: Sequence[Sequence[Run]]) -> None:
    """Ask the predicates of decode steps that were just launched; the caller holds no lock."""
    if engine.loop is None:
        return
    watching = [run for group in groups for run in group if run.breakpoints and not run.silent and run.target is None]
    if not watching:
        return
    with engine.lock:
        asked = [(planner.flight_of(run), _questions(engine, run)) for run in watching]
    for flight, questions in asked:
        if questions is None:
            continue
        flight.answers = {key: answer for question in questions for key, answer in question.ask().items()}


@without_grad
def _questions(engine: Engine, run: Run) -> list[Question] | None:
    """All that has to be asked before it is known where a run stops in the decode step it is in.

    None if that cannot be told ahead: a breakpoint stops without being asked, or a value was not kept.
    """
    flight = planner.flight_of(run)
    if not isinstance(flight.values, LaunchValues):
        return None
    # All of them, also where the run was asked to stop at the next: the answers are those of the whole step.
    sites = [site for site in engine.sites if site.order > flight.passed]
    found: list[Question] = []
    for point in run.breakpoints:
        chosen = [site for site in sites if point.watches(site)]
        if not chosen or not any(flight.step.matching(point.spec.positions)):
            continue
        values = flight.values.gather(chosen) if point.asks(flight.step) else None
        if values is None:
            return None
        found += [Question(point, tuple(site.name for site in members), value) for members, value in values]
    return found


@without_grad
def values_at(engine: Engine, flight: Flight, site: Site, tokens: list[int]) -> torch.Tensor:
    """A copy of a site's value at some tokens, for a predicate to look at while other threads go on."""
    with engine.lock:
        return flight.value(site)[as_index(tokens)].clone()


@without_grad
def draw_together(engine: Engine, groups: Sequence[Sequence[Run]]) -> None:
    """Draw the tokens of decoded rows in few launches, on CUDA, where a row's draw does not depend on its place."""
    if engine.device.type != "cuda":
        return
    for runs in planner.drawn_together([run for group in groups for run in group]):
        flights = [planner.flight_of(run) for run in runs]
        seeds = torch.tensor([run.session.seed for run in runs], dtype=torch.int64)
        places = torch.tensor([flight.step.stop for flight in flights], dtype=torch.int64)
        logits = torch.cat([flight.logits()[-1:] for flight in flights])
        for flight, token in zip(
            flights, sample(logits, runs[0].options.sampling, seeds, places).tolist(), strict=True
        ):
            flight.drawn = token
