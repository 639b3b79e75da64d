"""The codec: what is read is what was written, through JSON, and what was shared is shared again."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from djinn_fx import when
from djinn_fx.runtime.breakpoints import ArmedBreakpoint
from djinn_fx.runtime.codec import Decoder, Encoder
from djinn_fx.runtime.plain import read_positions, write_positions
from djinn_fx.runtime.results import StepRecord
from djinn_fx.runtime.run import RunOptions
from djinn_fx.runtime.sampling import SamplingSpec
from djinn_fx.runtime.snapshot import FlightState, RunState, SessionState, StopState
from djinn_fx.runtime.steering import Armed, arm
from djinn_fx.runtime.steps import Step
from djinn_fx.sites import Site
from djinn_fx.specs import Breakpoint, Edit, Feature, Positions, ProgramShape
from tests.bits import assert_same_bits
from tests.runtime.tiny import direction

NAMES = ("embed", "resid_post.0", "resid_post.1")
#: The reading engine numbers its sites otherwise: a file must not depend on order numbers.
THEN = {10 * index: name for index, name in enumerate(NAMES)}
NOW = {name: 7 + index for index, name in enumerate(NAMES)}


def through(state: SessionState, first_key: int = 100) -> SessionState:
    """Written, made JSON text, and read by another engine."""
    encoder = Encoder(THEN)
    text = json.dumps(encoder.session(state), allow_nan=False)
    keys = itertools.count(first_key)
    decoder = Decoder(encoder.tensors, encoder.functions, torch.device("cpu"), NOW.__getitem__, lambda: next(keys))
    return decoder.session(json.loads(text))


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal all the way down; sites' orders by name, keys of handles not at all."""
    if isinstance(a, torch.Tensor):
        assert_same_bits(a, b, where)
    elif is_dataclass(a):
        assert type(a) is type(b), where
        for field in fields(a):
            if field.name not in ("key", "steering", "passed") or isinstance(a, SessionState):
                assert_same(getattr(a, field.name), getattr(b, field.name), f"{where}.{field.name}")
    elif isinstance(a, Mapping):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a!r} and {b!r}"


def armed(key: int, edit: Edit) -> Armed:
    return arm(key, edit, Site(edit.site, 0, (32,)), torch.float32, torch.device("cpu"), rank=8)


def step(start: int = 0, **changes: Any) -> Step:
    made = Step(start, (4, 5), (False, True), 3, ProgramShape(1, 16, 1), ((-1, {}),))
    return replace(made, **changes)


def session(**changes: Any) -> SessionState:
    return replace(SessionState(3, (1, 2), (False, True), 1, None, {}, (), None), **changes)


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", "all"),
        (5, 5),
        (slice(2, None), slice(2, None)),
        (slice(None, 9), slice(None, 9)),
        (("prompt", "last_prompt"), ("prompt", "last_prompt")),
        (["generated"], ("generated",)),
        ([4, 1, 7], (4, 1, 7)),
        (range(3, 6), (3, 4, 5)),
        ((), ()),
    ],
)
def test_positions(positions: Positions, expected: Positions) -> None:
    assert read_positions(json.loads(json.dumps(write_positions(positions)))) == expected


EDITS = [
    Edit("embed"),
    Edit("embed", scale=-0.0, strength=math.inf),
    Edit("embed", scale=direction(1), add=direction(2), strength=0.3, positions=slice(1, 4)),
    Edit("embed", scale=torch.tensor(0.5), ablate=direction(3, 2, 32), positions=(1, 2)),
    Edit("embed", ablate=direction(3), positions=("prompt", "generated")),
    Edit("embed", feature=Feature(direction(4), direction(5), 0.1, "jumprelu", 0.2, set=2.5)),
    Edit("embed", feature=Feature(direction(6, 2, 32), direction(7, 2, 32), min=-math.inf, max=0.1)),
]


@pytest.mark.parametrize("edit", EDITS, ids=range(len(EDITS)))
def test_edits_and_the_tensors_that_stand_for_them(edit: Edit) -> None:
    one = Armed(1, edit, None, None, None) if math.isinf(edit.strength) else armed(1, edit)
    state = session(steering={"embed": one})
    read = through(state)
    assert_same(read, state)
    assert read.steering["embed"].key == 100


PREDICATES = [
    when.norm_above(1.5),
    when.norm_above(math.inf),
    when.probe(direction(1), -2),
    when.cosine_above(direction(2), 0.25),
    when.nonfinite(),
    when.entropy_below(0.1),
    when.token(17),
]


def run(**changes: Any) -> RunState:
    return replace(RunState(RunOptions("forward"), (0, 0, 2), 0, (), (), (), False, None, False, None), **changes)


@pytest.mark.parametrize("predicate", PREDICATES, ids=lambda one: type(one).__name__)
def test_predicates(predicate: Any) -> None:
    spec = Breakpoint("resid_post.*", predicate, "generated", 4)
    state = session(run=run(breakpoints=(ArmedBreakpoint(spec, frozenset(NAMES[1:]), 2),)))
    assert_same(through(state), state)


def test_a_users_function_is_put_aside() -> None:
    class NormAbove(when.NormAbove):
        """Not the built-in one, in spite of its name."""

    specs = [Breakpoint("embed", lambda h: h.sum() > 0), Breakpoint("embed", NormAbove(3.0))]
    points = tuple(ArmedBreakpoint(spec, frozenset({"embed"}), None) for spec in specs)
    encoder = Encoder(THEN)
    made = encoder.session(session(run=run(breakpoints=points)))
    assert [point["when"] for point in made["run"]["breakpoints"]] == [{"function": f"function.{i}"} for i in (0, 1)]
    assert list(encoder.functions.values()) == [spec.when for spec in specs]


# -- sessions ----------------------------------------------------------------------------------


def test_a_whole_session() -> None:
    early, late = armed(4, EDITS[2]), armed(9, replace(EDITS[6], site="resid_post.1"))
    both = {"embed": early, "resid_post.1": late}
    journal = (
        step(steering=((-1, {}), (0, {"embed": early})), injections={"embed": direction(8, 2, 32)}),
        step(2, shape=ProgramShape(8, 1, 1), steering=((-1, {"embed": early}), (10, both))),
    )
    flight = FlightState(step(4, steering=((-1, both),)), 10, StopState("resid_post.0", direction(9), True, (4, 5)))
    options = RunOptions("generate", 9, SamplingSpec(True, 0.7, 5, 0.9), frozenset({8, 2}), print, True)
    records = (
        StepRecord(0, {"resid_post.1": direction(1, 2, 32)}, direction(2, 1, 64)),
        StepRecord(2, stepped=False),
    )
    points = (ArmedBreakpoint(Breakpoint("embed"), frozenset({"embed"}), None),)
    state = session(
        seed=-(2**63),
        last_logits=direction(3).bfloat16(),
        steering=both,
        journal=journal,
        run=run(options=options, breakpoints=points, capture=NAMES[2:], records=records, flight=flight),
    )
    read = through(state)
    assert state.run is not None and read.run is not None and read.run.flight is not None
    assert_same(read, replace(state, run=replace(state.run, options=replace(options, on_token=None))))
    assert [after for after, _ in read.journal[0].steering] == [-1, NOW["embed"]]
    assert [after for after, _ in read.journal[1].steering] == [-1, NOW["resid_post.0"]]
    assert read.run.flight.passed == NOW["resid_post.0"]
    assert [set(edits) for _, edits in read.journal[1].steering] == [{"embed"}, {"embed", "resid_post.1"}]


def test_what_was_one_object_is_one_object_again() -> None:
    one = armed(4, EDITS[2])
    again = armed(4, replace(EDITS[2], strength=0.5))  # the same handle
    other = armed(5, EDITS[4])
    states: list[Mapping[str, Armed]] = [{"embed": one}, {"embed": one}, {"embed": again}, {"embed": other}]
    state = session(journal=tuple(step(2 * i, steering=((-1, edits),)) for i, edits in enumerate(states)))
    encoder, longer = Encoder(THEN), Encoder(THEN)
    made = encoder.session(replace(state, steering=states[0]))
    assert len(made["edits"]) == 3 and len(made["states"]) == 3
    longer.session(replace(state, journal=state.journal * 50))
    assert len(longer.tensors) == len(encoder.tensors)
    read = through(replace(state, steering=states[0]))
    found = [edits["embed"] for _, edits in (each.steering[0] for each in read.journal)]
    assert found[0] is found[1] is read.steering["embed"]
    assert found[0].key == found[2].key != found[3].key
    assert min(armed.key for armed in found) >= 100


def test_a_users_tensor_is_copied_on_both_sides() -> None:
    mine = direction(1)
    encoder = Encoder(THEN)
    made = encoder.session(session(steering={"embed": Armed(0, Edit("embed", add=mine), None, None, None)}))
    mine.zero_()
    decoder = Decoder(encoder.tensors, {}, torch.device("cpu"), NOW.__getitem__, lambda: 0)
    for _ in range(2):
        add = decoder.session(made).steering["embed"].edit.add
        assert add is not None
        assert_same_bits(add, direction(1))
        add.zero_()
