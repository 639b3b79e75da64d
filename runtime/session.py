"""Sessions: one user's sequence, its KV row, tokens, steering and journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch

from djinn_fx.errors import CapacityError, InvalidValue, SessionBusy, SessionClosed
from djinn_fx.notebook import Shown
from djinn_fx.runtime import showing
from djinn_fx.runtime.residence import Residence
from djinn_fx.runtime.run import Run, RunOptions
from djinn_fx.runtime.sampling import SamplingSpec
from djinn_fx.runtime.saved import Saved
from djinn_fx.runtime.steering import Armed, SteerHandle, arm
from djinn_fx.runtime.steps import Steering, Step
from djinn_fx.sites import require_compiled
from djinn_fx.specs import Breakpoint, Edit
from djinn_fx.views import View

if TYPE_CHECKING:
    from djinn_fx.runtime.checkpoint import Checkpoint
    from djinn_fx.runtime.engine import Engine


class Session(Residence, Shown):
    """One sequence: runs append to it, its KV stays on the device between runs.

    Make one with ``dj.session()``; use it as a context manager or call :meth:`close`.
    """

    def __init__(self, engine: Engine, row: int, seed: int) -> None:
        super().__init__(engine, row)
        self.seed = seed
        self.saved: Saved | None = None  # where it was recovered from
        self.settled = True  # False while those who recover it may still give it up
        # These three only grow: who cuts one puts another in its place, because snapshots share them.
        self.token_list: list[int] = []
        self.sampled: list[bool] = []
        self.journal: list[Step] = []
        self.length = 0
        self.steering: Steering = {}
        self.children: list[Session] = []
        self.parent: Session | None = None
        self.last_logits: torch.Tensor | None = None
        self.closed = False
        self.orphaned = False  # closed because the session that it was forked from was
        self._run: Run | None = None

    @property
    def _itself(self) -> Session:
        return self

    # -- runs ----------------------------------------------------------------------------------

    def generate(
        self,
        inputs: object = None,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token_ids: Iterable[int] | None = None,
        on_token: Callable[[int], object] | None = None,
        output_logits: bool = False,
        capture: Iterable[str] = (),
        breakpoints: Iterable[str | Breakpoint] = (),
    ) -> Run:
        """A lazy run that appends ``inputs`` and generates; iterate it for its stops.

        Args:
            inputs: a str, ints, LongTensor ``[T]`` or ``[1, T]``, or a mapping with ``input_ids``; None goes on from
                what the session holds.
            max_new_tokens: how many tokens to generate at most.
            do_sample: sample instead of taking the most likely token.
            temperature: divides the logits before sampling.
            top_k: keep the k most likely tokens only.
            top_p: keep the smallest set of tokens with this much probability.
            stop_token_ids: tokens that end the run beside the model's own EOS.
            on_token: called with each new token, outside every lock.
            output_logits: keep each new token's logits for the result.
            capture: sites whose values the result's cache shall hold.
            breakpoints: sites or :func:`djinn_fx.break_at` breakpoints.

        Raises:
            SessionBusy, SessionClosed, UnknownSite, SiteNotCompiled, InvalidPredicate, InvalidValue, CapacityError.
        """
        wanted: object = max_new_tokens
        if not isinstance(wanted, int) or wanted < 1:
            raise InvalidValue(f"max_new_tokens={max_new_tokens!r}: give a whole number, 1 or more.")
        if not do_sample and (temperature != 1.0 or top_k is not None or top_p is not None):
            raise InvalidValue(
                "temperature, top_k and top_p only act when sampling: add do_sample=True, or leave them out."
            )
        options = RunOptions(
            kind="generate",
            max_new_tokens=max_new_tokens,
            sampling=SamplingSpec(do_sample, temperature, top_k, top_p),
            stop_token_ids=frozenset(int(token) for token in stop_token_ids or ()),
            on_token=on_token,
            output_logits=output_logits,
        )
        return self._begin(inputs, options, capture, breakpoints)

    def forward(
        self,
        inputs: object,
        *,
        capture: Iterable[str] = (),
        breakpoints: Iterable[str | Breakpoint] = (),
    ) -> Run:
        """A lazy run that appends ``inputs`` without generating; its result has logits ``[T, vocab]``.

        Raises:
            As :meth:`generate`.
        """
        return self._begin(inputs, RunOptions(kind="forward"), capture, breakpoints)

    def _begin(
        self,
        inputs: object,
        options: RunOptions,
        capture: Iterable[str],
        breakpoints: Iterable[str | Breakpoint],
    ) -> Run:
        self.require_free()
        return self.engine.new_run(self, inputs, options, capture, breakpoints)

    def require_still(self) -> None:
        """Raise :class:`SessionBusy` while a thread is driving the session's run; the caller holds the lock."""
        if self._run is not None:
            self._run.require_still()

    def require_free(self) -> None:
        """Raise unless another run may begin: the session is open and its last run is finished."""
        self.require_open()
        if self._run is not None and not self._run.finished:
            raise SessionBusy(
                "this session has an unfinished run. Finish it (run.result()), go on with it "
                "(iterate it), or abandon it (run.close()) before starting another."
            )

    @property
    def run(self) -> Run | None:
        """The session's newest run, or None."""
        return self._run

    def adopt(self, run: Run) -> None:
        """Make ``run`` the session's newest run."""
        if self._run is not None:
            self._run.end = run.prompt_start
        self._run = run

    @property
    def tokens(self) -> torch.Tensor:
        """All tokens of the session, int64 ``[T]`` on the CPU."""
        return torch.tensor(self.token_list, dtype=torch.int64)

    def watch(self, breakpoints: Iterable[str | Breakpoint]) -> None:
        """Put ``breakpoints`` in the place of those of the session's newest run, from here on; a fork's run too.

        Raises:
            UnknownSite, SiteNotCompiled, InvalidPredicate, SessionClosed, SessionBusy.
        """
        self.engine.watch(self, breakpoints)

    # -- steering ------------------------------------------------------------------------------

    def steer(
        self,
        site: str | Edit,
        *,
        scale: float | torch.Tensor = 1.0,
        kv: Literal["keep", "recompute"] = "keep",
        **edit: Any,
    ) -> SteerHandle:
        """Steer ``site`` from here on; a later call on the same site replaces the earlier.

        With nothing but a site it changes nothing: a neutral edit, which ends an earlier one there.

        Args:
            site: a site name, with the fields of :class:`djinn_fx.Edit` as keywords, or an Edit.
            scale: see Edit.
            kv: ``"keep"``: what was computed stays; ``"recompute"``: the sequence is run again as if the edit had
                always acted.
            **edit: ``add``, ``ablate``, ``strength``, ``feature``, ``positions`` as in Edit.

        Raises:
            UnknownSite, SiteNotCompiled, SessionClosed.
            InvalidValue: a tensor of another width, or a number that is NaN or infinite.
        """
        if kv not in ("keep", "recompute"):
            raise InvalidValue(f"steer(kv={kv!r}): choose 'keep' or 'recompute'.")
        if isinstance(site, Edit):
            if edit or isinstance(scale, torch.Tensor) or scale != 1.0:
                raise InvalidValue("steer(Edit(...)): put every field into the Edit itself.")
            spec = site
        else:
            spec = Edit(site, scale=scale, **edit)

        def act() -> SteerHandle:
            self.require_open()
            if kv == "recompute":
                # First of all, so that nothing is changed where this fails.
                self.require_still()
                if self._run is not None and self._run.stop is not None:
                    self._run.stop.checked_value()
                self.engine.bring_back(self)
            key = self.engine.next_key()
            armed = self.set_steering(key, spec)
            if kv == "recompute":
                self.engine.recompute(self, armed)
            return SteerHandle(self, armed.edit.site, key)

        return self.engine.tiers.roomy(act)

    def set_steering(self, key: int, edit: Edit) -> Armed:
        """Put an edit in force under a handle's key."""
        engine = self.engine
        with engine.lock:
            self.require_open()
            site = require_compiled(engine.table.single(edit.site), engine.compiled_names)
            armed = arm(key, edit, site, engine.dtype, engine.device, engine.options.edit_rank)
            self.steering = {**self.steering, site.name: armed}
            return armed

    def drop_steering(self, site: str) -> None:
        """End the edit of a site."""
        with self.engine.lock:
            self.steering = {name: armed for name, armed in self.steering.items() if name != site}

    @property
    def handles(self) -> dict[str, SteerHandle]:
        """A handle on each edit in force, by canonical site name; after a restore, the way to them."""
        return {site: SteerHandle(self, site, armed.key) for site, armed in self.steering.items()}

    # -- life ------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """A checkpoint of the session as it stands, also between runs and while stopped.

        It holds tokens, KV, sampler, steering and journal and, where the run stands at a stop, the stop and its value
        as it is now. On CUDA the call returns at once: its copies go on while the model runs, and ``checkpoint.wait()``
        waits for them. It waits itself where host memory has to be pinned first, or freed by earlier copies.

        Raises:
            SessionClosed: it was closed.
            SessionBusy: a thread is in the middle of a step of its run.
            CapacityError: no host memory is left (``pinned_bytes``); nothing has changed.
            InvalidValue: the stop's value was given another shape or dtype through ``.data``.
        """
        tiers = self.engine.tiers

        def act() -> Checkpoint:
            self.require_open()
            return tiers.make_host_room(partial(_taker(), self))

        return tiers.roomy(act)

    def checkpoint_between(self) -> Checkpoint:
        """:meth:`checkpoint`, also between two steps of a run that is being driven; the caller holds the lock.

        Where ``pinned_bytes`` is used up it lies in ordinary memory.
        """
        take = _taker()
        try:
            return take(self, between=True)
        except CapacityError:
            return take(self, between=True, beyond=True)

    def require_open(self) -> None:
        """Raise :class:`SessionClosed` if the session was closed."""
        if self.orphaned and not self.engine.closed:
            raise SessionClosed(
                "this session is a fork, and the session that it was forked from was closed (a `with` closes it at its "
                "end), which closes its forks too. Use forks before that; or keep one with stop.checkpoint() while it "
                "is open, and go on with dj.restore(checkpoint)."
            )
        if self.closed or self.engine.closed:
            raise SessionClosed(
                "this session was closed; its KV row is gone. Open another with dj.session(), or "
                "restore a checkpoint of it with dj.restore()."
            )

    def require_endable(self) -> None:
        """Raise :class:`SessionBusy` where its run or a fork's is in the middle of a step."""
        if self._run is not None:
            self._run.require_endable()
        for child in self.children:
            child.require_endable()

    def close(self) -> None:
        """Close the session and its forks: zero the KV row and give it back. Checkpoints survive.

        Raises:
            SessionBusy: a thread is driving its run or a fork's; nothing is closed.
        """
        with self.engine.lock:
            self.require_endable()
            for child in list(self.children):
                child.close()
                child.orphaned = True
            if not self.closed:
                if self._run is not None:
                    self._run.abandon()
                self.engine.forget(self)
                self.closed = True
                if self.parent is not None and self in self.parent.children:
                    self.parent.children.remove(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def inherit(self, parent: Session, seed: int) -> None:
        """Take over a parent's history (forks); the KV is copied by the engine."""
        self.token_list, self.sampled = list(parent.token_list), list(parent.sampled)
        self.length, self.steering = parent.length, dict(parent.steering)
        self.journal, self.seed = list(parent.journal), seed
        self.last_logits = parent.last_logits

    def describe(self) -> View:
        """Tokens, place and steering; notebooks show it."""
        return showing.session_view(self)

    def __repr__(self) -> str:
        where = "closed" if self.closed else f"row {self.row}" if self.resident else f"offloaded to the {self.tier}"
        return f"Session({len(self.token_list)} tokens, {where}, {len(self.steering)} edits)"


@cache
def _taker() -> Callable[..., Checkpoint]:
    """What takes checkpoints; it imports sessions, and to import it in every call takes as long as a launch."""
    from djinn_fx.runtime.checkpoint import take_checkpoint

    return take_checkpoint
