"""Doubts: whether a value that the user may have changed was changed at all, answered by the device.

A value with the same bits is no edit. To look first costs a wait for the device; here the step is launched with the
value in it, and by the time it is launched the answer is there. Where it turns out that nothing was changed, the step
that ran is, bit for bit, the one that ran before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from djinn_fx.kernels.taking import Taking
from djinn_fx.runtime.bits import same_bits
from djinn_fx.runtime.copystream import mark


class Question:
    """A question to the device: where it writes its answer, and what passes when it has.

    Attributes:
        word: int32 ``[1]`` on the host; the device writes 1 where the value differs.
        stray: whether the comparison may be under way, and nothing would tell when it is over.
    """

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.word = torch.zeros(1, dtype=torch.int32, pin_memory=cuda)
        self._told = self.word.numpy()
        self._passed: torch.cuda.Event | None = None
        self._stream = torch.cuda.default_stream(device) if cuda else None  # whoever holds the engine's lock is on it
        self._open = False
        self.stray = False

    @property
    def open(self) -> bool:
        """Whether the device may still write its answer."""
        if self._open and self._passed is not None and self._passed.query():
            self._open = False
        return self._open

    def reset(self) -> Question:
        """Make it ready to be asked; returns itself."""
        self._told[0] = 0
        return self

    def asked(self, passed: torch.cuda.Event | None = None) -> torch.cuda.Event | None:
        """The comparison was enqueued just now.

        Args:
            passed: something that passes behind it, if there is such a thing.

        Returns:
            what passes behind it, on CUDA.
        """
        if self._stream is not None:
            # A new one: others may keep it for longer than the question is this one.
            self._passed, self._open = passed or mark(self._stream), True
        self.stray = False
        return self._passed

    def answer(self) -> bool:
        """Whether the value differs; waits until the device has compared it."""
        if self.open and self._passed is not None:
            self._passed.synchronize()
            self._open = False
        return bool(self._told[0])


class Verdict:
    """Whether a value differs from what was there.

    Attributes:
        known: the answer; None as long as nobody asked the device.

    Args:
        known: see above.
        ask: waits for the answer; it may be asked again.
        told: called once, when nobody will ask any more.
    """

    __slots__ = ("_ask", "_told", "known")

    def __init__(
        self, known: bool | None, ask: Callable[[], bool] | None = None, told: Callable[[], None] | None = None
    ) -> None:
        self.known, self._ask, self._told = known, ask, told

    def holds(self) -> bool:
        """Whether the value differs; waits until the device has compared it."""
        if self.known is None:
            assert self._ask is not None
            self.known = self._ask()
            # Only now: an interrupt before this leaves the question to this verdict, which then asks it once more.
            self._let_go()
        return self.known

    def _let_go(self) -> None:
        told, self._told = self._told, None
        if told is not None:
            told()

    def __del__(self) -> None:
        self._let_go()


class Doubt(NamedTuple):
    """One value, taken over.

    Attributes:
        own: a copy of the value that nobody else writes, contiguous.
        verdict: whether it differs from what was there.
    """

    own: torch.Tensor
    verdict: Verdict

    @property
    def known(self) -> bool | None:
        """What is known of that without waiting."""
        return self.verdict.known

    def holds(self) -> bool:
        """Whether the value differs; waits until the device has compared it."""
        return self.verdict.holds()


#: Copies a value to where it is given, in the order of the engine's stream, and compares it; returns what passes then.
Copy = Callable[[torch.Tensor], torch.cuda.Event | None]


class Doubts:
    """The open questions of one engine; the caller holds its lock.

    Args:
        device: the model's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._taking = device, Taking()
        self._free: deque[Question] = deque()  # nobody will ask these any more, but the device may still answer them
        self._made: list[Question] = []  # also those lost by an interrupt, for the same reason

    def raised(self, value: torch.Tensor, before: torch.Tensor) -> Doubt:
        """Take a value over and begin to compare it; on CUDA nothing waits.

        Args:
            value: what stands there now.
            before: what the step had left there, of the same shape and dtype.
        """
        if self._device.type != "cuda":
            own = value.clone(memory_format=torch.contiguous_format)
            return Doubt(own, Verdict(not same_bits(own, before)))
        own = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        question = self.question()
        self._copy(value, before, question, own)
        return self.about(own, question)

    def warm(self, dtype: torch.dtype) -> None:
        """Make what the first value of a dtype would have to make: CUDA loads a kernel when it is first launched."""
        value = torch.zeros(16, dtype=dtype, device=self._device)
        self.raised(value, value).holds()

    def carried(self, value: torch.Tensor, before: torch.Tensor) -> tuple[Verdict, Copy]:
        """:meth:`raised` for whoever has a place for the copy: the verdict, and what makes the copy, on CUDA.

        Args:
            value: see there.
            before: see there; it may be longer, as :class:`djinn_fx.kernels.taking.Taking` says.
        """
        question = self.question()
        return self._verdict(question), partial(self._copy, value, before, question)

    def _copy(
        self, value: torch.Tensor, before: torch.Tensor, question: Question, own: torch.Tensor
    ) -> torch.cuda.Event | None:
        question.stray = True  # an interrupt from here on: its answer would be taken for another's
        self._taking(value, before, own, question.word)
        return question.asked()

    def question(self) -> Question:
        """A question that nobody has asked yet."""
        # The oldest only: where the device has not come to it, it has not come to the others either.
        if self._free and not self._free[0].open:
            return self._free.popleft().reset()
        self._made.append(Question(self._device))
        return self._made[-1]

    def about(self, own: torch.Tensor, question: Question) -> Doubt:
        """The doubt that a question will settle."""
        return Doubt(own, self._verdict(question))

    def _verdict(self, question: Question) -> Verdict:
        return Verdict(None, question.answer, partial(self._given_back, question))

    def _given_back(self, question: Question) -> None:
        if not question.stray:
            self._free.append(question)
