"""Serving a crowd with djinn_fx: sessions that stay, and a stateless server that takes the whole history each turn.

One thread serves. Turns that are under way decode together in slices of a few tokens; who came meanwhile joins at the
next slice, and a session that is away begins to come back as soon as its agent is seen (at the next token of the
others).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from djinn_fx.benchmarks.context import Context
from djinn_fx.benchmarks.crowd import Crowd, Visit
from djinn_fx.benchmarks.models import Loaded


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run.

    Attributes:
        counts: numbers of agents.
        target: the number of agents that the issue asks about.
        rows: KV rows of the budget.
        batch: turns that are served at a time.
        slice: tokens between two looks at who joins.
        prompt: tokens of each agent's prompt.
        new: tokens of a turn.
        think: mean seconds between two turns of an agent.
        window: seconds in which turns come.
        room: positions of a session.
        judged: agents whose tokens are compared.
        pairs: samples with and without moves.
        block: tokens of such a sample.
    """

    counts: tuple[int, ...]
    target: int
    rows: int
    batch: int
    slice: int
    prompt: int
    new: int
    think: float
    window: float
    room: int
    judged: int = 6
    pairs: int = 30
    block: int = 32

    @property
    def turns(self) -> int:
        """Turns of an agent that its session has room for, its first one apart."""
        return (self.room - self.prompt) // self.new - 1


@dataclass
class Bench:
    """What all servers share.

    Attributes:
        context: the run.
        loaded: the model.
        dj: compiled, with ``seats`` rows.
        seats: rows of the device.
        sizes: of the run.
        prompts: of each agent.
        openings: what each agent was given in its first turn, which is not timed.
    """

    context: Context
    loaded: Loaded
    dj: Any
    seats: int
    sizes: Sizes
    prompts: list[list[int]]
    openings: dict[int, list[int]] = field(default_factory=dict)


class Ours:
    """A session for each agent; ``rows`` of them on the device at a time, ``hints`` says for how long the others go.

    The other rows of the device are held by empty sessions that are pinned, so that every way runs the same programs.
    """

    def __init__(self, bench: Bench, agents: int, rows: int, hints: bool) -> None:
        self.bench, self.sizes, self.hints = bench, bench.sizes, hints
        self.held: list[Any] = []
        self.sessions: list[Any] = []
        self.live: list[Visit] = []
        self.runs: dict[int, Any] = {}
        try:
            for _ in range(bench.seats - rows):
                self.held.append(bench.dj.session())
                self.held[-1].pin()
            self.sessions = [bench.dj.session() for _ in range(agents)]
            self.prepare()
        except BaseException:
            self.close()
            raise

    def prepare(self) -> None:
        """Every agent's first turn, its prompt: not timed."""
        for start in range(0, len(self.sessions), self.sizes.batch):
            group = range(start, min(start + self.sizes.batch, len(self.sessions)))
            runs = [
                self.sessions[agent].generate(self.bench.prompts[agent], max_new_tokens=self.sizes.new)
                for agent in group
            ]
            for agent, result in zip(group, self.bench.dj.results(runs), strict=True):
                self.bench.openings[agent] = result.tokens[self.sizes.prompt :].tolist()

    def serve(self, crowd: Crowd) -> None:
        """Serve until the crowd is over."""
        crowd.open()
        while not crowd.over:
            self.look(crowd)
            if not self.live:
                crowd.wait()
                continue
            self.bench.dj.results([self.runs[visit.turn.agent] for visit in self.live])
            self.live = [visit for visit in self.live if not self.ends(crowd, visit)]

    def ends(self, crowd: Crowd, visit: Visit) -> bool:
        """Whether a turn is done, after a slice; if not, its next slice begins."""
        left = self.sizes.new - len(visit.tokens)
        if not left:
            self.leave(crowd, visit)
            crowd.done(visit)
        elif self.runs[visit.turn.agent].finished:  # else it came while the others were at theirs
            self.go_on(crowd, visit, min(self.sizes.slice, left))
        return not left

    def look(self, crowd: Crowd) -> None:
        """Take those who have come, as far as there are places: their sessions begin to come back."""
        for visit in crowd.arrived(self.sizes.batch - len(self.live)):
            self.come(crowd, visit)
            self.live.append(visit)

    def come(self, crowd: Crowd, visit: Visit) -> None:
        """An agent is back."""
        self.sessions[visit.turn.agent].idle_hint = None
        self.go_on(crowd, visit, min(self.sizes.slice, self.sizes.new))

    def go_on(self, crowd: Crowd, visit: Visit, count: int, inputs: list[int] | None = None) -> None:
        """The next slice of a turn."""
        agent = visit.turn.agent
        self.runs[agent] = self.session(agent).generate(
            inputs, max_new_tokens=count, on_token=partial(self.hear, crowd, visit)
        )

    def hear(self, crowd: Crowd, visit: Visit, token: int) -> None:
        """A token is there; whoever came meanwhile is seen."""
        crowd.hear(visit, token)
        self.look(crowd)

    def leave(self, crowd: Crowd, visit: Visit) -> None:
        """A turn is done; the agent says how long it will be away."""
        if self.hints:
            self.sessions[visit.turn.agent].idle_hint = crowd.absence(visit.turn.agent)

    def session(self, agent: int) -> Any:
        """The session in which an agent's turn runs."""
        return self.sessions[agent]

    def close(self) -> None:
        """Close the sessions."""
        for session in (*self.sessions, *self.held):
            session.close()


class Recomputing(Ours):
    """A stateless server: every turn takes the whole history as its prompt, on a session of its own."""

    def __init__(self, bench: Bench, agents: int, rows: int, hints: bool) -> None:
        self.agents, self.guests = agents, dict[int, Any]()
        super().__init__(bench, 0, rows, hints)

    def prepare(self) -> None:
        """The histories: the first turns are those of the sessions that stay."""
        openings = self.bench.openings
        self.histories = [self.bench.prompts[agent] + openings[agent] for agent in range(self.agents)]

    def come(self, crowd: Crowd, visit: Visit) -> None:
        """A fresh session takes the history; its first slice ends with its first token."""
        agent = visit.turn.agent
        self.guests[agent] = self.bench.dj.session()
        self.go_on(crowd, visit, 1, self.histories[agent])

    def leave(self, crowd: Crowd, visit: Visit) -> None:
        """Nothing is kept but the tokens."""
        self.guests.pop(visit.turn.agent).close()
        self.histories[visit.turn.agent] += visit.tokens

    def session(self, agent: int) -> Any:
        """See :meth:`Ours.session`."""
        return self.guests[agent]

    def close(self) -> None:
        """Close the sessions."""
        for session in self.guests.values():
            session.close()
        super().close()
