"""Decode steps without Python in the way: the programs of a compiled model, and its graph compiled whole, replayed.

No public call runs a decode step without the work that follows it on the host, and none compiles the same captured
graph without cuts. So this file and :mod:`djinn_fx.benchmarks.steps` see the compiler and the runtime from within.
Everything runs over the engine's own static buffers and arena; sessions stay where they are, since what a replay
writes lies behind their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import djinn_fx as djinn
from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import Answer
from djinn_fx.errors import InternalError
from djinn_fx.making import Making
from djinn_fx.passes.pipeline import build
from djinn_fx.program import Program
from djinn_fx.runtime.graphs import Replayed, capture
from djinn_fx.runtime.lanes import Lanes
from djinn_fx.runtime.loop import DecodeLoop
from djinn_fx.runtime.programs import bucket
from djinn_fx.runtime.steps import Step
from djinn_fx.runtime.tables import BatchRow
from djinn_fx.specs import ProgramShape, Variant


def loop_of(dj: djinn.Dj) -> DecodeLoop:
    """The decode loop of a compiled model; on the eager backend, which has none, one made for it."""
    engine = dj.engine
    found = engine.executor.loop
    if found is not None:
        return found
    count = max(bucket(engine.options.max_sessions), 2)
    rank, spare = engine.options.edit_rank, engine.arena.spare_row
    lanes = Lanes(engine.sites, count, engine.dtype, engine.device, rank, spare)
    return DecodeLoop(engine.programs, engine.arena, lanes)


def whole_program(dj: djinn.Dj, like: Program) -> Program:
    """The graph that ``like`` was made of, without sites and without cuts, lowered with the same settings.

    Args:
        dj: the compiled model.
        like: one of its decode programs; the capture is taken from the same store.
    """
    engine = dj.engine
    builder: Any = engine.programs.build
    making = getattr(getattr(builder, "func", None), "__self__", None)
    if not isinstance(making, Making):
        raise InternalError("programs are not built by a Making any more")
    (lowering,) = builder.args
    return build(
        making.source,
        like.shape,
        sites=(),
        variant="plain",
        rank=engine.options.edit_rank,
        arenas=engine.arena.layers,
        lower=lowering,
        store=making.store,
        cuts="none",
        grouped=any(record.name == "projections" for record in like.records),
    )


class Replays:
    """Decode programs of one number of rows over one set of static buffers.

    Attributes:
        dj: the compiled model.
        rows: how many rows.

    Args:
        dj: the compiled model.
        sessions: a row each; their prompts are taken, and one token is drawn. They must not go on meanwhile.
    """

    def __init__(self, dj: djinn.Dj, sessions: Sequence[djinn.Session]) -> None:
        self.dj, self.rows = dj, len(sessions)
        self._loop = loop_of(dj)
        self._shape = ProgramShape(self.rows, 1, 1)
        steering = sessions[0].steering  # the same for all: it is never mutated
        self._batch = {
            lane: BatchRow(
                session.row,
                Step(
                    start=session.length,
                    tokens=(session.token_list[-1],),
                    sampled=(True,),
                    last_prompt=-1,
                    shape=self._shape,
                    steering=((-1, steering),),
                ),
            )
            for lane, session in enumerate(sessions)
        }

    def ours(self, variant: Variant) -> Replayed:
        """The engine's own program of a variant, made if need be; a richer one where the two differ in their bits."""
        return self._loop.prepare(self.rows, variant)

    def whole(self) -> Replayed:
        """The same captured graph compiled whole, as one CUDA graph over the same buffers."""
        lanes, device = self._loop.lanes, self.dj.engine.device
        program = whole_program(self.dj, self.ours("plain").program)
        self._loop.retire()
        env = {**lanes.env(self._shape, "plain"), **self.dj.engine.arena.env}
        lanes.upload({}, self.rows, 0)  # dead lanes: warming up writes nowhere
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        return capture(program, env, lanes.slot, lanes.ring, stream)

    def arm(self) -> None:
        """Write the sessions' edits into the lanes' tables; the programs of every variant must have been made."""
        lanes = self._loop.lanes
        self._loop.retire()
        for lane, row in self._batch.items():
            lanes.write(lane, row, lanes.plan(lane, row))
        lanes.change({}, self.rows, 0)

    def begin(self) -> None:
        """Put every lane back to where its session stands."""
        self._loop.retire()
        numbers = {
            lane: (row.step.tokens[0], row.step.start, row.arena_row, row.step.stop)
            for lane, row in self._batch.items()
        }
        self._loop.lanes.upload(numbers, self.rows, 0)

    def answer(self, replayed: Replayed, count: int) -> Answer:
        """Tokens and logits of so many replays from where the sessions stand."""
        self.begin()
        logits = []
        for _ in range(count):
            replayed.step.run()
            logits.append(replayed.logits()[:, 0].clone())
        stacked = torch.stack(logits, 1).cpu()
        return Answer(stacked.float().argmax(-1), stacked)

    def seconds(self, replayed: Replayed, count: int, warm: int) -> float:
        """Seconds of device time of one replay: so many back to back, behind a few that are not counted."""

        def repeat(times: int) -> None:
            for _ in range(times):
                replayed.step.run()

        self.begin()
        whole = clock.device_seconds(self.dj.engine.device, lambda: repeat(count), lambda: repeat(warm))
        return whole / count
