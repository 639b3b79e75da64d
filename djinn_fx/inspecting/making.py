"""Traces of models: only what a graph depends on is loaded, and no weight is ever filled in."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from djinn_fx.bundled import neighbours, no_model
from djinn_fx.errors import InvalidValue
from djinn_fx.passes.context import Lower
from djinn_fx.passes.lower import lower_eager
from djinn_fx.passes.pipeline import PASSES, CaptureStore, build, discover, passes_of
from djinn_fx.passes.report import PassFailed
from djinn_fx.passes.source import Source, prepare
from djinn_fx.passes.trace import Trace, read, versions
from djinn_fx.program import Program
from djinn_fx.sites import Site, SiteTable
from djinn_fx.specs import ProgramShape, Variant


@dataclass(frozen=True)
class Subject:
    """A model made ready to be inspected.

    Attributes:
        name: for people.
        source: the model as the passes take it.
        table: its sites.
        store: its captures.
        arenas: keys and values of each layer.
    """

    name: str
    source: Source
    table: SiteTable
    store: CaptureStore
    arenas: tuple[tuple[torch.Tensor, torch.Tensor], ...]


@dataclass(frozen=True)
class Choice:
    """Which program of a model.

    Attributes:
        shape: batch rows, query tokens, kept positions.
        variant: the steering compiled in.
        sites: where it can stop; names, roles and globs.
        rank: slots of rank edits.
    """

    shape: ProgramShape = field(default_factory=lambda: ProgramShape(1, 1, 1))
    variant: Variant = "armed"
    sites: Sequence[str] = ("resid_post",)
    rank: int = 4

    def selected(self, table: SiteTable) -> tuple[Site, ...]:
        """The sites, in execution order."""
        return table.select(list(self.sites))


def configuration_of(reference: str, known: Sequence[str] = ()) -> Any:
    """The configuration of a model by path or hub id; its weights are not looked at.

    Args:
        reference: the path or hub id.
        known: names of models that are built in, for the error.

    Raises:
        InvalidValue: transformers cannot find it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(reference)
    except (OSError, ValueError) as error:
        raise no_model(reference, error, known) from error


def read_trace(path: Path) -> Trace:
    """The recorded trace in a file.

    Raises:
        InvalidValue: there is none, with the nearest names; or it is damaged.
    """
    try:
        return read(path)
    except OSError as error:
        near = neighbours(path)
        hint = f"nearest beside it: {', '.join(near)}" if near else "DJINN_TRACE=folder or --jsonl FILE records one"
        raise InvalidValue(f"no trace at {path} ({error.strerror or error}); {hint}.") from error


def hollow(config: Any) -> nn.Module:
    """A causal language model of a configuration, its weights never written: memory that nobody touches costs none.

    Raises:
        InvalidValue: the configuration is another kind of model's.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    dtype = getattr(config, "dtype", None) or torch.float32
    try:
        with no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise InvalidValue(f"{config.model_type} is no causal language model of transformers.") from error
    model.tie_weights()
    found: nn.Module = model.eval()
    return found


def subject(name: str, model: nn.Module, choice: Choice, positions: int = 1024) -> Subject:
    """Prepare a model and find its sites.

    Args:
        name: for people.
        model: a causal language model; its weights are shared, never copied.
        choice: which program will be asked for.
        positions: of the KV arenas; more where a step has more.

    Raises:
        CaptureError: it cannot be captured.
        InvalidValue: a step has more tokens than the model has positions.
    """
    source = prepare(model)
    store = CaptureStore()
    config: Any = model.config
    room, query = getattr(config.get_text_config(), "max_position_embeddings", None), choice.shape.query
    if isinstance(room, int) and query > room:
        raise InvalidValue(f"{query} tokens in a step: {name} knows {room} positions.")
    known = source.config.get("max_position_embeddings")
    positions = max(query, min(positions, known) if isinstance(known, int) else positions)
    form: dict[str, Any] = {"dtype": source.dtype, "device": source.device}
    arenas = tuple(
        (
            torch.empty(choice.shape.rows + 1, spec.heads, positions + 1, spec.key_dim, **form),
            torch.empty(choice.shape.rows + 1, spec.heads, positions + 1, spec.value_dim, **form),
        )
        for spec in source.kv
    )
    return Subject(name, source, discover(source, store), store, arenas)


def trace_of(what: Subject, choice: Choice, stop_after: str | None = None) -> Trace:
    """Run the passes and record them; a pass that fails ends the trace, which then says so.

    Args:
        what: the model.
        choice: which program.
        stop_after: the last pass to run; None: all.

    Raises:
        InvalidValue, UnknownSite: a pass or site that is not there.
    """
    if stop_after is not None and stop_after not in PASSES:
        near = difflib.get_close_matches(stop_after, PASSES, n=2)
        hint = f"nearest: {', '.join(near)}; " if near else ""
        raise InvalidValue(f"no pass {stop_after!r}; {hint}the passes are {', '.join(PASSES)}.")
    shape = (choice.shape.rows, choice.shape.query, choice.shape.keep)
    try:
        records = passes_of(what.source, choice.shape, stop_after=stop_after, **_request(what, choice))
    except PassFailed as failed:
        found = failed.trace
        return Trace(what.name, shape, choice.variant, found.records, versions(), found.failure)
    return Trace(what.name, shape, choice.variant, records, versions())


def program_of(what: Subject, choice: Choice, lower: Lower = lower_eager) -> Program:
    """The program itself, to be run."""
    return build(what.source, choice.shape, lower=lower, **_request(what, choice))


def _request(what: Subject, choice: Choice) -> dict[str, Any]:
    """What the passes are told beside the model and the shape."""
    return {
        "sites": choice.selected(what.table),
        "variant": choice.variant,
        "rank": choice.rank,
        "arenas": what.arenas,
        "store": what.store,
    }


def trace_of_program(name: str, program: Program) -> Trace:
    """The trace of a program that is already there."""
    shape = program.shape
    return Trace(name, (shape.rows, shape.query, shape.keep), program.variant, program.records, versions())


def is_trace(reference: str) -> bool:
    """Whether somebody means a recorded trace."""
    return Path(reference).suffix == ".jsonl"
