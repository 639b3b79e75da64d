"""Stops: the value a run hands out when it stops, and the acts that are possible there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from djinn_fx.errors import InvalidValue, StaleStop
from djinn_fx.notebook import Shown
from djinn_fx.runtime import showing
from djinn_fx.runtime.claims import claimed
from djinn_fx.runtime.modes import outside_inference
from djinn_fx.runtime.sampling import checked_seed
from djinn_fx.runtime.scarce import memory_for
from djinn_fx.sites import Site
from djinn_fx.views import View

if TYPE_CHECKING:
    from djinn_fx.runtime.checkpoint import Checkpoint
    from djinn_fx.runtime.poised import Poised
    from djinn_fx.runtime.run import Run
    from djinn_fx.runtime.session import Session
    from djinn_fx.runtime.steps import Step


class Stop(Shown):
    """A run, stopped after one site: where, why, and the activation, readable and writable.

    Changing ``value`` in place or assigning to it changes what the run goes on with. Once the run went on the stop is
    stale: where and why it was, and ``value``, stay readable, every act raises :class:`StaleStop`.
    """

    def __init__(
        self,
        run: Run,
        site: Site,
        step: Step,
        value: torch.Tensor,
        fired: Sequence[int],
        poise: Callable[[], Poised | None] | None = None,
    ) -> None:
        self._run, self._site, self._step, self._value = run, site, step, value
        self._fired, self._kind = tuple(fired), _kind(value)
        self._poise = poise
        self.poised: Poised | None = None
        self._given, self._seen = (value, value._version), False
        self._lent, self._lending = False, threading.RLock()
        self.held = False
        self.waiting = False  # found by a step, not yet in the user's hands

    # -- where and why -------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        """The run that stopped."""
        return self._run

    @property
    def session(self) -> Session:
        """The session of the run."""
        return self._run.session

    @property
    def site(self) -> str:
        """Canonical name of the site after which the run stopped."""
        return self._site.name

    @property
    def place(self) -> Site:
        """The site itself, for the runtime."""
        return self._site

    @property
    def within(self) -> Step:
        """The step it stands in, for the runtime."""
        return self._step

    @property
    def layer(self) -> int | None:
        """Layer of the site, None for sites outside the blocks."""
        return self._site.layer

    @property
    def positions(self) -> tuple[int, ...]:
        """Absolute positions of the rows of ``value``."""
        return tuple(self._step.start + token for token in self._step.tokens_of(self._site))

    @property
    def position(self) -> int:
        """The last of ``positions``; while decoding the only one."""
        return self._step.stop - 1

    @property
    def fired(self) -> tuple[int, ...]:
        """Positions where a breakpoint held; empty for a stop that was stepped or rewound to."""
        return self._fired

    @property
    def phase(self) -> str:
        """``"generated"`` if every token of the step was sampled, else ``"prompt"``."""
        return "generated" if all(self._step.sampled) else "prompt"

    @property
    def tokens(self) -> torch.Tensor:
        """The session's tokens up to and including ``position``, int64 ``[position + 1]`` on the CPU.

        They are those of the session as it is now: of a stale stop others, or fewer, once its run was rewound.
        """
        return torch.tensor(self.session.token_list[: self._step.stop], dtype=torch.int64)

    # -- the activation ------------------------------------------------------------------------

    @property
    def value(self) -> torch.Tensor:
        """The activation after steering, ``[tokens, *feature_shape]``, on the model's device: the stop's own copy.

        What it holds when the run goes on is what the run goes on with; the same bits as before are no edit. Assigning
        copies a tensor of the same shape, dtype and device: tensors read from here before are the stop's no more. On a
        stale stop it can be read, writing into it changes nothing.

        Raises:
            InvalidValue: on assigning no tensor, one of another shape, dtype or device, or one that requires grad.
            StaleStop: on assigning after the run went on.
        """
        with self._lending:
            if self._lent:
                lent = self._value
                with memory_for("a stop's value", "The run can go on"), outside_inference():
                    mine = lent.clone()
                if lent.is_cuda:  # its memory waits for this copy, on whatever stream it is made
                    lent.record_stream(torch.cuda.current_stream(lent.device))
                self._value, self._given, self._lent = mine, (mine, mine._version), False
            self._seen = True
        self._make_ready()
        return self._value

    @value.setter
    def value(self, new: torch.Tensor) -> None:
        self.require_current("assign to stop.value")
        if not isinstance(new, torch.Tensor):
            raise InvalidValue(
                f"stop.value at {self.site!r} must be a tensor, got {type(new).__name__}. Assign "
                "torch.as_tensor(new).to(stop.value), or write a number in place: stop.value.fill_(number)."
            )
        self._require_fit(new)
        if new.requires_grad:
            raise InvalidValue(
                f"stop.value at {self.site!r}: the new tensor requires grad, but compiled programs "
                "do not run autograd. Assign tensor.detach()."
            )
        mine = new.clone()
        with self._lending:
            self._value, self._lent = mine, False
        self._make_ready()

    def _make_ready(self) -> None:
        """Whoever has the value may write to it: see that the run can go on at once then."""
        poise, self._poise = self._poise, None
        if poise is not None:
            self.poised = poise()

    def left(self) -> None:
        """The run went on; whoever keeps the stop shall not keep what it took to go on from it."""
        self._poise = self.poised = None

    @property
    def content(self) -> torch.Tensor:
        """The activation, for those who only look and hand it to nobody."""
        return self._value.detach()

    def _require_fit(self, new: torch.Tensor) -> None:
        if _kind(new) != self._kind:
            advice = "Assign new.to(stop.value)"
            if new.layout != torch.strided:
                advice = "Assign new.to_dense()"
            elif new.shape != self._kind[0]:
                advice = "Write a part with stop.value[i] = new"
            raise InvalidValue(
                f"stop.value at {self.site!r} is {_words(*self._kind)}; cannot assign {_describe(new)}. "
                f"Shape, dtype and device must be equal. {advice}."
            )

    def checked_value(self) -> torch.Tensor:
        """The value, for the run to go on with.

        Raises:
            InvalidValue: its shape, dtype or device was changed, by ``stop.value.data = ...`` or in place.
        """
        return self.fitting().detach()

    def fitting(self) -> torch.Tensor:
        """:meth:`checked_value`, for those who only read it."""
        if _kind(self._value) != self._kind:
            raise InvalidValue(
                f"stop.value at {self.site!r} is {_words(*self._kind)}, but through .data or in place it was made "
                f"{_describe(self._value)}. Assign a tensor like the one it was: stop.value = new."
            )
        return self._value

    @property
    def written(self) -> bool:
        """Whether the value was surely written to or assigned; False leaves open that it was, past PyTorch's notice."""
        given, version = self._given
        return self._value is not given or self._value._version != version

    @property
    def untouched(self) -> bool:
        """Whether nobody was ever given the value, so that it is what it was without a look."""
        return not (self._seen or self.written)

    def lend(self) -> torch.Tensor | None:
        """The value of an untouched stop, contiguous, which nobody will write; None if it was touched.

        Whoever asks for the value later is given a copy of his own.
        """
        with self._lending:
            if self._seen or self.written:
                return None
            if not self._value.is_contiguous():
                with outside_inference():
                    return self._value.clone(memory_format=torch.contiguous_format)
            self._lent = True
            return self._value

    # -- acts ----------------------------------------------------------------------------------

    @property
    def current(self) -> bool:
        """Whether the run still stands here."""
        return self._run.stop is self

    def handed_out(self) -> Stop:
        """The stop itself, in the user's hands from now on."""
        self.waiting = False
        return self

    def require_current(self, act: str) -> None:
        """Raise :class:`StaleStop` unless the run still stands here."""
        if not self.current:
            self.session.require_open()
            there = "" if self._run.stop is None else "run.stop, or "
            raise StaleStop(
                f"cannot {act}: the run went on from this stop at {self.site!r}, position "
                f"{self.position}. Use {there}run.rewind(position={self.position}, "
                f"site={self.site!r}) to come back here."
            )

    def step(self, tokens: int = 0) -> Stop | None:
        """Go on to the next site, or with ``tokens=n`` to the same site ``n`` steps on.

        Breakpoints in between are passed over. Returns the new stop, or None if the run finished first.

        Raises:
            StaleStop: the run went on from here.
            InvalidValue: a negative number of tokens.
        """
        if tokens < 0:
            raise InvalidValue(f"stop.step(tokens={tokens}): give 1 or more, or nothing.")
        with claimed([self._run]):  # so that it is still here when the step begins
            self.require_current("step")
            return self._run.step_to_next() if tokens == 0 else self._run.step_tokens(self._site, tokens)

    def fork(self, n: int = 1, seeds: Sequence[int] | None = None) -> list[Stop]:
        """Make ``n`` new sessions stopped at this same place, KV copied on the device.

        They inherit steering, the value as it is now and, unless ``seeds`` says otherwise, the seed; they have no
        breakpoints. They close with the parent.

        Raises:
            StaleStop: the run went on from here.
            CapacityError: fewer than ``n`` KV rows are free; none is made.
            InvalidValue: ``n`` below 1 or ``seeds`` of another length.
        """
        self.require_current("fork")
        if n < 1 or (seeds is not None and len(seeds) != n):
            raise InvalidValue(f"fork(n={n}, seeds={seeds!r}): n must be 1 or more, with n seeds.")
        seeds = None if seeds is None else [checked_seed(seed) for seed in seeds]
        engine = self.session.engine
        return engine.tiers.roomy(partial(engine.fork, self, n, seeds))

    def checkpoint(self) -> Checkpoint:
        """Checkpoint the session here, with the value as it is now; else as :meth:`Session.checkpoint`.

        What is written to the value afterwards does not change the checkpoint.

        Raises:
            StaleStop: the run went on from here.
            SessionClosed: the session was closed.
            CapacityError: no host memory is left (``pinned_bytes``).
            InvalidValue: the value was given another shape or dtype through ``.data``.
        """
        self.require_current("checkpoint")
        return self.session.checkpoint()

    def hold(self) -> None:
        """Inside ``dj.as_stopped``: keep this run stopped while the others go on."""
        self.require_current("hold")
        self.held = True

    def release(self) -> None:
        """Undo :meth:`hold`: the run goes on with the next step."""
        self.require_current("release")
        self.held = False

    def describe(self) -> View:
        """Where, why, the norm at each position and the logit lens; notebooks show it."""
        return showing.stop_view(self)

    def __repr__(self) -> str:
        state = "" if self.current else ", stale"
        return f"Stop({self.site!r}, position={self.position}, {self.phase}, value={_describe(self._value)}{state})"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a Stop does not pickle; use stop.checkpoint().save(path).")


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device, torch.layout]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _describe(tensor: torch.Tensor) -> str:
    return _words(*_kind(tensor))


def _words(shape: torch.Size, dtype: torch.dtype, device: torch.device, layout: torch.layout) -> str:
    kind = "" if layout == torch.strided else f"{str(layout).removeprefix('torch.')} "
    return f"{tuple(shape)} {kind}{str(dtype).removeprefix('torch.')} on {device}"
