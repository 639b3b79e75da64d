"""A crowd of agents: when each of them comes with its next turn, and how long it then waits.

Turns arrive by a seeded timetable that no server can slow down (an open workload), the same for every server. What is
late is counted from the time at which the agent came, not from when the server got round to it.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: A think time is between so much less and so much more than the mean.
SPREAD = 0.5

#: What an agent says of its absence is so much off at most, as a share of it.
MISJUDGED = 0.2

#: A server that is still behind after so much more than the window has broken down.
GRACE = 0.25

#: Seconds by which a sum of times may be off.
CLOSE = 1e-6


@dataclass(frozen=True)
class Turn:
    """One turn of one agent.

    Attributes:
        agent: whose.
        at: when it comes, in seconds from the start.
        announced: when the agent thought that it would.
    """

    agent: int
    at: float
    announced: float


def timetable(agents: int, think: float, window: float, most: int, seed: int) -> list[Turn]:
    """When every turn comes, in order.

    Args:
        agents: how many.
        think: mean seconds between two turns of one agent.
        window: seconds in which turns come.
        most: turns of one agent.
        seed: of the think times.
    """
    found = []
    for agent in range(agents):
        chance = random.Random(f"{seed} {agent}")
        at = chance.uniform(0.0, think)  # they are not all there at the start
        announced = at * chance.uniform(1 - MISJUDGED, 1 + MISJUDGED)
        for _ in range(most):
            if at >= window:
                break
            found.append(Turn(agent, at, announced))
            away = think * chance.uniform(1 - SPREAD, 1 + SPREAD)
            announced = at + away * chance.uniform(1 - MISJUDGED, 1 + MISJUDGED)
            at += away
    return sorted(found, key=lambda turn: turn.at)


@dataclass
class Visit:
    """A turn that has come, while it is served and afterwards.

    Attributes:
        turn: which.
        first: seconds from the start to its first token.
        last: seconds from the start to its last token.
        tokens: so far.
    """

    turn: Turn
    first: float | None = None
    last: float | None = None
    tokens: list[int] = field(default_factory=list)


@dataclass
class Crowd:
    """Agents and a server between two moments; the server asks who has come and says what became of them.

    Attributes:
        turns: in the order in which they come.
        new: tokens of a turn.
        window: seconds in which turns come.
        now: seconds of some clock.
        sleep: waits so many seconds.
        visits: all that came.
    """

    turns: Sequence[Turn]
    new: int
    window: float
    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], object] = time.sleep
    visits: list[Visit] = field(default_factory=list)
    idle: float = 0.0
    _begun: float = 0.0
    _ahead: deque[Turn] = field(default_factory=deque)
    _behind: deque[Turn] = field(default_factory=deque)
    _busy: set[int] = field(default_factory=set)
    _next: dict[int, deque[Turn]] = field(default_factory=dict)

    def open(self) -> None:
        """The clock starts."""
        self._ahead = deque(self.turns)
        for turn in self.turns:
            self._next.setdefault(turn.agent, deque()).append(turn)
        self._begun = self.now()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.now() - self._begun

    @property
    def over(self) -> bool:
        """Whether all were served, or nobody waits any longer."""
        waiting = self._ahead or self._behind or self._busy
        return not waiting or self.elapsed > self.window * (1 + GRACE)

    def arrived(self, most: int) -> list[Visit]:
        """At most so many of those who have come and were not taken yet; an agent is served one turn at a time."""
        now = self.elapsed + CLOSE
        found: list[Visit] = []
        while self._ahead and self._ahead[0].at <= now:
            self._behind.append(self._ahead.popleft())
        for turn in list(self._behind):
            if len(found) < most and turn.agent not in self._busy:
                self._behind.remove(turn)
                self._busy.add(turn.agent)
                self._next[turn.agent].popleft()
                found.append(Visit(turn))
        self.visits += found
        return found

    def wait(self) -> None:
        """Nobody is being served: wait for whoever comes next."""
        before = self.elapsed
        if self._ahead and not self._behind:
            self.sleep(max(0.0, self._ahead[0].at - before))
        self.idle += self.elapsed - before

    def hear(self, visit: Visit, token: int) -> None:
        """A token of a turn is there."""
        now = self.elapsed
        visit.first = now if visit.first is None else visit.first
        visit.last = now
        visit.tokens.append(token)

    def done(self, visit: Visit) -> None:
        """A turn has all its tokens, and its agent may come again."""
        self._busy.discard(visit.turn.agent)

    def absence(self, agent: int) -> float | None:
        """In how many seconds the agent thinks it will be back; None if it will not."""
        coming = self._next.get(agent)
        return max(0.0, coming[0].announced - self.elapsed) if coming else None

    # -- what became of it ---------------------------------------------------------------------

    @property
    def unserved(self) -> int:
        """Turns that came or were to come and have not all their tokens."""
        return len(self.turns) - sum(len(visit.tokens) == self.new for visit in self.visits)

    @property
    def busy_share(self) -> float:
        """The part of the time in which the server had something to do."""
        return max(0.0, 1 - self.idle / max(self.elapsed, 1e-9))

    def waits(self) -> tuple[list[float], list[float]]:
        """Seconds from each arrival to its first token and to its last; what is not there yet counts up to now."""
        now = self.elapsed
        never = [now - turn.at for turn in (*self._behind, *self._ahead)]
        firsts = [(now if visit.first is None else visit.first) - visit.turn.at for visit in self.visits]
        wholes = [
            (visit.last if visit.last is not None and len(visit.tokens) == self.new else now) - visit.turn.at
            for visit in self.visits
        ]
        return firsts + never, wholes + never

    def tokens(self) -> dict[int, list[int]]:
        """What each agent was given, all its turns together."""
        found: dict[int, list[int]] = {}
        for visit in self.visits:
            found.setdefault(visit.turn.agent, []).extend(visit.tokens)
        return found
