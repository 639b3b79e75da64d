"""Lanes: the static buffers of decode, one lane for each batch row of the largest decode program.

A program of ``B`` rows reads and writes the first ``B`` lanes, so all decode programs share one set of buffers, and so
do their variants. A session keeps its lane from step to step: its tables are written when its steering changes, not
again each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from djinn_fx.kernels.triton_taking import Taken
from djinn_fx.kernels.words import words
from djinn_fx.program import LENGTHS, POSITIONS, ROWS, TOKENS
from djinn_fx.runtime.copies import copy_all
from djinn_fx.runtime.outbox import SLOTS, Outbox
from djinn_fx.runtime.steering import Armed, RankPart
from djinn_fx.runtime.steps import Steering, Step
from djinn_fx.runtime.tables import BatchRow, acting
from djinn_fx.sites import Site
from djinn_fx.specs import ProgramShape, TableSpec, Variant, edit_tables

#: Flags of a lane at a site, rows of one packed buffer.
FLAGS = ("act", "rank_act", "inject")

#: Lanes are counted in multiples of this, so that every view of a packed buffer is aligned to 16 bytes.
ALIGNMENT = 16

_INTS = (TOKENS, POSITIONS, ROWS, LENGTHS)


@dataclass(frozen=True)
class Written:
    """What a lane's tables hold: the edits at each site, and of which steering they were made.

    Attributes:
        source: the session's steering, by identity.
        place: what else they depend on: whether the token was sampled, its position where an edit speaks of positions.
        edits: the edit that acts at a site, by site index.
        injected: indices of the sites where a value is injected.
    """

    source: Steering | None = None
    place: tuple[object, ...] = ()
    edits: Mapping[int, Armed] | None = None
    injected: tuple[int, ...] = ()

    def with_injected(self, *indices: int) -> Written:
        """The same, and a value injected at some sites."""
        return replace(self, injected=tuple(sorted({*self.injected, *indices})))

    @cached_property
    def variant(self) -> Variant:
        """The cheapest program variant that does what is written."""
        if self.edits and any(armed.rank is not None for armed in self.edits.values()):
            return "rank"
        return "armed" if self.edits or self.injected else "plain"


NOTHING = Written()

#: What a lane holds whose writing was cut short by an error.
STALE = Written(place=("stale",))


class Lanes:
    """The static inputs and taps of decode programs.

    Attributes:
        taps: what programs leave at the sites, ``[sites, lanes, *feature_shape]``, a buffer for all sites alike.
        tap_of: a site's place by name: which of ``taps``, and at which index.
        ints: tokens, positions, arena rows and lengths, and the number of the next step, int64 ``[5, lanes]``.
        ring: each step's most likely next tokens, int64 ``[SLOTS, lanes]`` on the host, row ``number % SLOTS``.

    Args:
        sites: the compiled sites, in execution order.
        count: lanes; the largest program's rows.
        dtype: the model's dtype.
        device: the model's device.
        rank: directions an edit may have.
        spare_row: the arena row of a lane without a session.
    """

    def __init__(
        self, sites: Sequence[Site], count: int, dtype: torch.dtype, device: torch.device, rank: int, spare_row: int
    ) -> None:
        self.sites, self.count, self.rank = tuple(sites), count, rank
        self.dtype, self.device, self.spare_row = dtype, device, spare_row
        self.padded = -(-count // ALIGNMENT) * ALIGNMENT
        self.written: list[Written] = [NOTHING] * count
        self._tables: dict[str, torch.Tensor] = {}
        self._specs: dict[str, TableSpec] = {}
        self._tap_rows: dict[tuple[int, int], torch.Tensor] = {}
        with torch.inference_mode(False):
            self.ints = torch.zeros(len(_INTS) + 1, self.padded, dtype=torch.int64, device=device)
            self.ring = torch.zeros(SLOTS, self.padded, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._flags = torch.zeros(len(FLAGS), len(sites), self.padded, dtype=torch.bool, device=device)
            self.taps, self.tap_of = self._make_taps()
        self.ints[_INTS.index(ROWS)] = spare_row
        self._host_flags = np.zeros(tuple(self._flags.shape), dtype=bool)
        self._flags_changed = False
        self.outbox = Outbox(self.ints, self._flags)
        self._index = {site.name: index for index, site in enumerate(self.sites)}

    def _make_taps(self) -> tuple[list[torch.Tensor], dict[str, tuple[int, int]]]:
        """Tap buffers ``[sites, lanes, *feature_shape]``, one for all sites alike, and each site's place in them."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, site in enumerate(self.sites):
            groups.setdefault((site.feature_shape, site.dtype or self.dtype), []).append(index)
        buffers: list[torch.Tensor] = []
        place: dict[str, tuple[int, int]] = {}
        for number, indices in enumerate(groups.values()):
            site = self.sites[indices[0]]
            shape = (len(indices), self.padded, *site.feature_shape)
            buffers.append(torch.zeros(shape, dtype=site.dtype or self.dtype, device=self.device))
            for rank, index in enumerate(indices):
                place[self.sites[index].name] = (number, rank)
        return buffers, place

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers on the device."""
        made = [self.ints, self._flags, *self.taps, *self._tables.values()]
        return sum(tensor.nbytes for tensor in made)

    # -- what a program gets -------------------------------------------------------------------

    def env(self, shape: ProgramShape, variant: Variant) -> dict[str, torch.Tensor]:
        """The inputs of a program: views of the buffers, made for this variant where they were not there yet."""
        rows = shape.rows
        tokens, positions, arena_rows, lengths = self.ints[:-1, :rows].unbind()
        env = {TOKENS: tokens[:, None], POSITIONS: positions[:, None], ROWS: arena_rows, LENGTHS: lengths}
        for index, site in enumerate(self.sites):
            for spec in edit_tables(site, ProgramShape(self.padded, 1, 1), variant, self.dtype, self.rank):
                part = spec.name.rpartition(":")[2]
                env[spec.name] = self._view(index, part, spec)[:rows]
        return env

    def _view(self, index: int, part: str, spec: TableSpec) -> torch.Tensor:
        if part in FLAGS:
            return self._flags[FLAGS.index(part), index].view(spec.shape)
        if part == "tap":
            return self.tap(index).view(spec.shape)
        if spec.name not in self._tables:
            with torch.inference_mode(False):
                table = torch.full(spec.shape, spec.neutral, dtype=spec.dtype, device=self.device)
            self._tables[spec.name], self._specs[spec.name] = table, spec
        return self._tables[spec.name]

    def tap(self, index: int) -> torch.Tensor:
        """The tap of a site, ``[lanes, *feature_shape]``."""
        number, rank = self.tap_of[self.sites[index].name]
        return self.taps[number][rank]

    def _tap_row(self, index: int, lane: int) -> torch.Tensor:
        """The tap of a site for one lane, ``[1, *feature_shape]``; to make such a view takes longer than to copy."""
        if (index, lane) not in self._tap_rows:
            self._tap_rows[index, lane] = words(self.tap(index)[lane : lane + 1])
        return self._tap_rows[index, lane]

    # -- writing -------------------------------------------------------------------------------

    def plan(self, lane: int, row: BatchRow) -> Written:
        """What a lane must hold for a row; what it holds now, where that is it."""
        step, now = row.step, self.written[lane]
        injected = self.injected(step.injections) if step.injections else ()
        source = step.steering[-1][1] if len(step.steering) == 1 else None
        place = () if source is None else _place(step, source)
        if source is not None and now is not STALE:
            nothing = not source and not now.edits
            if nothing or (now.source is source and now.place == place):
                if not injected and not now.injected:
                    return now
                return Written(source, place, now.edits, injected)
        edits = {i: armed for i, site in enumerate(self.sites) if (armed := acting(step, site)) is not None}
        return Written(source, place, edits, injected)

    def injected(self, names: Iterable[str]) -> tuple[int, ...]:
        """The indices of those of some sites that are compiled."""
        return tuple(sorted(self._index[name] for name in names if name in self._index))

    def write(self, lane: int, row: BatchRow, plan: Written) -> None:
        """Bring a lane's tables to what was planned for a row."""
        now = self.written[lane]
        if plan is now:
            return
        known, self.written[lane] = now.edits or {}, STALE
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for index, armed in (plan.edits or {}).items():
            if known.get(index) is not armed:
                self._write_edit(index, lane, armed, targets, sources)
        for index in plan.injected:
            targets.append(self._tap_row(index, lane))
            sources.append(words(row.step.injections[self.sites[index].name]))
        copy_all(targets, sources)
        self._flag(lane, now, plan)
        self.written[lane] = plan

    def clear(self, lane: int) -> None:
        """Let nothing act on a lane."""
        now = self.written[lane]
        if now.edits or now.injected or now is STALE:
            self._flag(lane, now, NOTHING)
            self.written[lane] = NOTHING

    def _flag(self, lane: int, now: Written, plan: Written) -> None:
        if now is not STALE and (now.edits is plan.edits or not (now.edits or plan.edits)):
            for index in {*now.injected} ^ {*plan.injected}:
                self._flags_changed = True
                self._host_flags[2, index, lane] = index in plan.injected
            return
        flags = np.zeros(self._host_flags.shape[:2], dtype=bool)
        for index, armed in (plan.edits or {}).items():
            flags[0, index] = armed.scale is not None or armed.add is not None
            flags[1, index] = armed.rank is not None
        for index in plan.injected:
            flags[2, index] = True
        if not np.array_equal(self._host_flags[:, :, lane], flags):
            self._flags_changed = True
            self._host_flags[:, :, lane] = flags

    def _write_edit(
        self, index: int, lane: int, armed: Armed, targets: list[torch.Tensor], sources: list[torch.Tensor]
    ) -> None:
        name = self.sites[index].name
        for part in ("scale", "add"):
            table, value = self._tables[f"{name}:{part}"], getattr(armed, part)
            if value is None:
                table[lane].fill_(self._specs[f"{name}:{part}"].neutral)
            else:
                targets.append(table[lane, 0])
                sources.append(value)
        if armed.rank is None:
            return
        count = armed.rank.read.shape[0]
        slots = self._tables[f"{name}:slot"][lane]
        slots[:count], slots[count:] = True, False
        for part in RankPart.__dataclass_fields__:
            targets.append(self._tables[f"{name}:{part}"][lane, :count])
            sources.append(getattr(armed.rank, part))

    @property
    def slot(self) -> torch.Tensor:
        """The number of the next step, ``[1]``."""
        return self.ints[-1, :1]

    def upload(self, rows: Mapping[int, tuple[int, int, int, int]], count: int, number: int) -> None:
        """Send what the first ``count`` lanes run in step ``number``, nothing on other lanes; and flags that changed.

        Args:
            rows: token, position, arena row and length by lane; see :meth:`djinn_fx.runtime.outbox.Outbox.send`.
            count: how many lanes.
            number: the step's.
        """
        self._send({lane: rows.get(lane, self.dead) for lane in range(count)}, count, number, whole=True)

    def change(self, rows: Mapping[int, tuple[int, int, int, int]], count: int, number: int) -> None:
        """:meth:`upload` for some lanes alone; the others go on from what the last step left."""
        if rows or self._flags_changed:
            self._send(rows, count, number, whole=False)

    def inject(
        self,
        lane: int,
        plan: Written,
        numbers: Mapping[int, tuple[int, int, int, int]],
        count: int,
        number: int,
        taken: Taken,
        *,
        post: bool = False,
    ) -> None:
        """:meth:`write` a plan that differs from what a lane holds by an injection alone, and :meth:`change`, in one.

        Args:
            lane: the lane.
            plan: the plan.
            numbers: as in :meth:`change`.
            count: likewise.
            number: likewise.
            taken: the value, its tap, a copy, and whether it differs from what the tap held.
            post: whether a graph that begins with :meth:`opening` runs step ``number``; :meth:`sent` is to follow it.
        """
        now, self.written[lane] = self.written[lane], STALE
        self._flag(lane, now, plan)
        if post:
            self.outbox.post(numbers, count, number, flags=self._news(), taken=taken)
        else:
            self._send(numbers, count, number, whole=False, taken=taken)
        self.written[lane] = plan

    def index_of(self, site: Site) -> int | None:
        """The index of a site at which a value can be injected."""
        return self._index.get(site.name)

    def _send(
        self,
        rows: Mapping[int, tuple[int, int, int, int]],
        count: int,
        number: int,
        *,
        whole: bool,
        taken: Taken | None = None,
    ) -> None:
        self.outbox.send(rows, count, number, whole=whole, flags=self._news(), taken=taken)
        self.sent()

    def sent(self) -> None:
        """The device has the flags, or will before anything else; until this is said they are sent again."""
        self._flags_changed = False

    def warm(self) -> None:
        """Make what the first part of a step would have to make to open a letter; there is none now."""
        opening = self.opening(1)
        if opening is not None:
            opening()

    def opening(self, count: int) -> Callable[[], None] | None:
        """What a graph of ``count`` lanes begins with to open what was posted; None where graphs cannot."""
        return self.outbox.opening(count, max((taps[0, 0].nbytes for taps in self.taps), default=0))

    def _news(self) -> npt.NDArray[np.bool_] | None:
        """The flags, if they changed since they were last sent."""
        return self._host_flags if self._flags_changed else None

    @property
    def dead(self) -> tuple[int, int, int, int]:
        """What a lane is given that runs nothing: token, position, arena row and length."""
        return 0, 0, self.spare_row, 0


def _place(step: Step, steering: Steering) -> tuple[object, ...]:
    """What the edits that act in a decode step depend on beside the steering."""
    if not steering:
        return ()
    specs = [armed.edit.positions for armed in steering.values()]
    if all(spec == "all" for spec in specs):
        return ()
    worded = all(isinstance(word, str) for spec in specs for word in (spec if isinstance(spec, tuple) else (spec,)))
    return (step.sampled[0], step.start == step.last_prompt) if worded else (step.sampled[0], step.start)
