"""Doubts: whether a value that the user may have changed was changed at all, answered by the device.

A value with the same bits is no edit. To look first costs a wait for the device; here the step is launched with the
value in it, and by the time it is launched the answer is there. Where it turns out that nothing was changed, the step
that ran is, bit for bit, the one that ran before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from djinn_fx.kernels.taking import Taking
from djinn_fx.runtime.bits import same_bits


class Question:
    """A question to the device: where it writes its answer, and what passes when it has.

    Attributes:
        word: int32 ``[1]`` on the host; the device writes 1 where the value differs.
    """

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.word = torch.zeros(1, dtype=torch.int32, pin_memory=cuda)
        self._told = self.word.numpy()
        self._passed = torch.cuda.Event() if cuda else None
        self._stream = torch.cuda.default_stream(device) if cuda else None  # whoever holds the engine's lock is on it

    def reset(self) -> Question:
        """Make it ready to be asked; returns itself."""
        self._told[0] = 0
        return self

    def asked(self) -> None:
        """The comparison was enqueued just now."""
        if self._passed is not None:
            self._passed.record(self._stream)

    def answer(self) -> bool:
        """Whether the value differs; waits until the device has compared it."""
        if self._passed is not None:
            self._passed.synchronize()
        return bool(self._told[0])


class Doubt:
    """One value, taken over.

    Attributes:
        own: a copy of the value that nobody else writes; the value itself where it is known to be no edit.
        known: whether it differs from what was there; None as long as nobody asked the device.

    Args:
        own: see above.
        known: see above.
        ask: waits for the answer; it may be asked again.
        told: called once the answer is known.
    """

    def __init__(
        self,
        own: torch.Tensor,
        known: bool | None,
        ask: Callable[[], bool] | None = None,
        told: Callable[[], None] | None = None,
    ) -> None:
        self.own, self.known, self._ask, self._told = own, known, ask, told

    def holds(self) -> bool:
        """Whether the value differs; waits until the device has compared it."""
        if self.known is None:
            assert self._ask is not None
            self.known = self._ask()
            # Only now: an interrupt before this leaves the question to this doubt, which then asks it once more.
            if self._told is not None:
                self._told()
        return self.known


class Doubts:
    """The open questions of one engine; the caller holds its lock.

    Args:
        device: the model's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._taking = device, Taking()
        self._free: list[Question] = []
        self._made: list[Question] = []  # also those lost by an interrupt: the device may still write their answers

    def raised(self, value: torch.Tensor, before: torch.Tensor) -> Doubt:
        """Take a value over and begin to compare it; on CUDA nothing waits.

        Args:
            value: what stands there now.
            before: what the step had left there, of the same shape and dtype.
        """
        if self._device.type != "cuda":
            known = not same_bits(value, before)
            return Doubt(value.clone() if known else value, known)
        own = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        question = self.question()
        self._taking(value, before, own, question.word)
        question.asked()
        return self.about(own, question)

    def question(self) -> Question:
        """A question that nobody has asked yet."""
        if self._free:
            return self._free.pop().reset()
        self._made.append(Question(self._device))
        return self._made[-1]

    def about(self, own: torch.Tensor, question: Question) -> Doubt:
        """The doubt that a question will settle."""
        return Doubt(own, None, question.answer, partial(self._free.append, question))
