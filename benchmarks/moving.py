"""What sessions on the move cost one that decodes: a second thread moves others out and in while the first decodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import same_bits
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.serving import Bench
from djinn_fx.benchmarks.stats import overhead, rotated

#: Sessions that are moved in turns.
GUESTS = 3

#: The share of the bus's bandwidth that is asked for at most.
HARD = 0.8

#: How much slower steps may become, as asked.
ALLOWED = 0.03


class Mover:
    """Moves sessions out and in at a steady rate, on a thread of its own, whenever it is let.

    Args:
        sessions: whose KV lies on the device.
        size: bytes of each one's.
        rate: bytes per second, out and in together.
    """

    def __init__(self, sessions: list[Any], size: int, rate: float) -> None:
        self.sessions, self.size, self.rate = sessions, size, rate
        self.nbytes = 0  # moved so far
        self.seconds = 0.0  # in which it was let
        self.error: BaseException | None = None
        self._let, self._ended, self._moving = threading.Event(), threading.Event(), threading.Lock()
        self._begun = self._due = 0.0
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        try:
            while not self._ended.is_set():
                if self._let.wait(0.05):
                    with self._moving:
                        if self._let.is_set():
                            self._move()
                    time.sleep(max(0.0, self._due - time.perf_counter()))
        except BaseException as error:
            self.error = error

    def _move(self) -> None:
        """Move one session out and in again."""
        session = self.sessions.pop(0)
        self.sessions.append(session)
        session.offload()
        session.pin()  # begins to bring it back
        session.pin(False)
        self.nbytes += 2 * self.size
        self._due += 2 * self.size / self.rate

    @contextmanager
    def alive(self) -> Iterator[Mover]:
        """The thread runs as long as this is entered."""
        self._thread.start()
        try:
            yield self
        finally:
            self._let.clear()
            self._ended.set()
            self._thread.join()

    def let(self, moving: bool) -> None:
        """Let it move, or see that it does not."""
        now = time.perf_counter()
        if moving and not self._let.is_set():
            self._begun = self._due = now
            self._let.set()
        elif not moving and self._let.is_set():
            self._let.clear()
            self.seconds += now - self._begun
            with self._moving:
                pass  # the move that it is at is begun
        if self.error is not None:
            raise self.error


def others(bench: Bench, bandwidth: float) -> Json:
    """Milliseconds of a decode step of one session, alone and while others stream, in turns; by rate of moving.

    Args:
        bench: with a free row for each guest and the worker.
        bandwidth: of the bus, in bytes per second.
    """
    guests = [bench.dj.session() for _ in range(GUESTS)]
    try:
        for guest, prompt in zip(guests, bench.prompts, strict=False):
            guest.generate(prompt, max_new_tokens=1).run_to_end()
        (size,) = {place.nbytes for place in bench.dj.memory().sessions if place.session in guests}
        crowd = 2 * size * bench.sizes.target / bench.sizes.think
        rates = {"as the agents move": min(crowd, HARD * bandwidth), "as hard as the bus allows": HARD * bandwidth}
        return {
            "nbytes": size,
            "bus_bytes_per_second": bandwidth,
            "rates": {name: _at(bench, guests, size, rate) for name, rate in rates.items()},
        }
    finally:
        for guest in guests:
            guest.close()


def _at(bench: Bench, guests: list[Any], size: int, rate: float) -> Json:
    """The two arms in turns, at one rate."""
    steps: dict[bool, list[float]] = {False: [], True: []}
    gaps: dict[bool, list[float]] = {False: [], True: []}
    worker = Worker(bench)
    try:
        with Mover(guests, size, rate).alive() as mover:
            for turn in range(bench.sizes.pairs + 1):
                for moving in rotated([False, True], turn):
                    mover.let(moving)
                    times = worker.block()
                    mover.let(False)
                    if turn:  # the first round is not counted
                        steps[moving].append(1e3 * (times[-1] - times[0]) / (len(times) - 1))
                        gaps[moving] += [1e3 * gap for gap in np.diff(times)]
        return {
            **overhead(steps[False], steps[True], seed=bench.context.options.seed),
            "allowed": ALLOWED,
            "asked_bytes_per_second": rate,
            "moved_bytes_per_second": mover.nbytes / mover.seconds,
            "moves": round(mover.nbytes / size),
            "alone_ms": float(np.median(steps[False])),
            "moving_ms": float(np.median(steps[True])),
            "alone_p99_ms": float(np.quantile(gaps[False], 0.99)),
            "moving_p99_ms": float(np.quantile(gaps[True], 0.99)),
            "samples": {"alone": steps[False], "moving": steps[True]},
        }
    finally:
        worker.close()


class Worker:
    """A session that decodes in blocks; a new one takes its place when it is full."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.session: Any = None

    def block(self) -> list[float]:
        """Decode a block alone; returns when each of its tokens was there."""
        device, count = self.bench.loaded.device, self.bench.sizes.block
        if self.session is None or self.session.length + count + 2 > self.bench.sizes.room:
            self.close()
            self.session = self.bench.dj.session()
            self.session.pin()
            self.session.generate(self.bench.prompts[-1][:16], max_new_tokens=4).run_to_end()
        clock.synchronize(device)
        times: list[float] = []
        self.session.generate(
            None, max_new_tokens=count, on_token=lambda token: times.append(time.perf_counter())
        ).run_to_end()
        return times

    def close(self) -> None:
        """Close the session."""
        if self.session is not None:
            self.session.close()
            self.session = None


def same_when_moved(bench: Bench, turns: int = 3) -> tuple[bool, str]:
    """Whether a session that leaves the device after each turn gives the bits of one that stays."""
    logits: dict[bool, list[Any]] = {}
    for away in (False, True):
        with bench.dj.session() as session:
            inputs: list[int] | None = bench.prompts[0]
            logits[away] = []
            for _ in range(turns):
                run = session.generate(inputs, max_new_tokens=bench.sizes.new, output_logits=True)
                logits[away].append(run.result().logits)
                inputs = None
                if away:
                    session.offload()
    same = all(same_bits(moved, stayed) for moved, stayed in zip(logits[True], logits[False], strict=True))
    return same, f"logits of {turns} turns of {bench.sizes.new} tokens, bit for bit"
