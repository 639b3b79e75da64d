"""What the end of a decode step must do, whoever does it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from djinn_fx.kernels.advance import Beginning, Message
from djinn_fx.kernels.triton_taking import Taken

Advance = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]

Make = Callable[[Tensor, Tensor], Beginning]

NAN, INF = float("nan"), float("inf")


def check(advance: Advance, vocab: int, dtype: torch.dtype, device: str, slots: int = 3) -> None:
    """Some rows, each with its own trap, over several steps around a ring."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(7, vocab, generator=generator).to(dtype)
    last = vocab - 1
    logits[1] = 1.0  # the first of equals
    logits[2] = NAN
    logits[3] = -INF
    logits[4, 0], logits[4, last] = NAN, 50.0
    logits[5] = NAN
    logits[5, last] = -INF  # the only number there is
    wanted = [int(logits[0].argmax()), 0, 0, 0, last, last, int(logits[6].argmax())]
    strided = torch.empty(7, 2, vocab, dtype=dtype)
    strided[:, 0] = logits
    given = strided.to(device)[:, 0]
    tokens, positions = torch.full((7,), 9, device=device), torch.arange(7, device=device)
    lengths = torch.tensor([1, 2, 3, 4, 5, 6, 0], device=device)
    ring = torch.full((slots, 16), -1, pin_memory=device == "cuda")
    slot = torch.tensor([slots - 1], device=device)
    for step in range(2):
        advance(given, tokens, positions, lengths, slot, ring)
        if device == "cuda":
            torch.cuda.synchronize()
        assert tokens.tolist() == wanted
        assert positions.tolist() == [place + (step + 1) * (place < 6) for place in range(7)]
        assert lengths.tolist() == [place + 1 + step + 1 if place < 6 else 0 for place in range(7)]
        assert slot.tolist() == [slots + step]
        assert ring[(slots - 1 + step) % slots, :7].tolist() == wanted
    assert ring[1].eq(-1).all()


def check_beginning(make: Make, device: str) -> None:
    """Lanes that keep all, that keep their token, that take all; those beyond the program's, which keep all; flags."""
    message = Message(16, 5008, device == "cuda")
    rows = -torch.arange(5 * 16, dtype=torch.int64).view(5, 16) - 1000
    news = torch.tensor([0, 1, 2, 2, 1, 0, 2, 1] * 2)
    message.rows[:5], message.rows[5] = rows, news
    message.raised.copy_(torch.randint(0, 2, (5008,), generator=torch.Generator().manual_seed(0)))
    ints = torch.empty(5, 16, dtype=torch.int64, device=device)
    flags = torch.empty(5008, dtype=torch.uint8, device=device)
    beginning = make(ints, flags)
    for anew in (False, True, False):  # all but the first go through the kernel that the first has found
        ints.copy_(torch.arange(5 * 16).view(5, 16))
        flags.fill_(7)
        before = ints.cpu().clone()
        beginning(message, 11, anew)
        assert torch.equal(ints.cpu(), taken_over(before, rows, news, 11))
        assert torch.equal(flags.cpu(), message.raised if anew else torch.full_like(message.raised, 7))


def taken_over(before: Tensor, rows: Tensor, news: Tensor, count: int) -> Tensor:
    """What lanes run after a message, by hand."""
    found = before.clone()
    for lane, new in enumerate(news[:count].tolist()):
        found[1:, lane] = rows[1:, lane] if new else before[1:, lane]
        found[0, lane] = rows[0, lane] if new == 2 else before[0, lane]
    return found


def check_taking(make: Make, device: str) -> None:
    """A value that a step begins with: its place becomes it, so does a copy, and it is said whether it differs."""
    pinned = device == "cuda"
    message = Message(16, 5008, pinned)
    message.raised.fill_(1)
    ints = torch.arange(5 * 16, device=device).view(5, 16)
    flags = torch.zeros(5008, dtype=torch.uint8, device=device)
    beginning = make(ints, flags)
    for dtype, size in SIZES:
        for anew in (False, True):
            for change in (None, 0, size - 1):
                flags.zero_()
                value = Value(dtype, size, change, device)
                beginning(message, 11, anew, value.taken)
                value.check(True)
                assert flags.cpu().eq(int(anew)).all()
    assert torch.equal(ints.cpu(), torch.arange(5 * 16).view(5, 16))


def check_letters(make: Make, device: str) -> None:
    """A letter is read by the step whose number it has, and by no other; what is longer than it is left alone."""
    pinned, step = device == "cuda", 41
    letter = Message(16, 5008, pinned)
    letter.rows[:5] = -torch.arange(5 * 16).view(5, 16)
    letter.rows[4], letter.rows[5] = step, 2
    letter.raised.fill_(1)
    ints, flags = torch.empty(5, 16, dtype=torch.int64, device=device), torch.empty(5008, dtype=torch.uint8).to(device)
    beginning = make(ints, flags)
    for here in (step, step - 1, step):
        for dtype, size in SIZES:
            for anew in (False, True):
                value = Value(dtype, size, size - 1, device)
                ints.copy_(torch.arange(5 * 16).view(5, 16))
                ints[4, 0] = here
                flags.zero_()
                before = ints.cpu().clone()
                letter.tell(anew, value.taken, step)
                beginning.read(letter, 11, 20000)
                value.check(here == step)
                assert flags.cpu().eq(int(anew and here == step)).all()
                read = taken_over(before, letter.rows[:5], letter.rows[5], 11)
                assert torch.equal(ints.cpu(), read if here == step else before)
    unread = Message(16, 5008, pinned)
    ints.fill_(5)
    beginning.read(unread, 11, 20000)
    assert ints.cpu().eq(5).all()


#: Values of a few bytes, and of more than a program brings over.
SIZES = ((torch.bfloat16, 8), (torch.float32, 4), (torch.bfloat16, 3000), (torch.float32, 5000))


class Value:
    """A value that is to be taken over between two that are not; ``change`` is where it differs from its place."""

    def __init__(self, dtype: torch.dtype, size: int, change: int | None, device: str) -> None:
        self.pinned = device == "cuda"
        self.taps = torch.randn(3, size, generator=torch.Generator().manual_seed(size)).to(device, dtype)
        self.before, self.change = self.taps.cpu().clone(), change
        self.value, self.own = self.taps[1].clone(), torch.zeros(size, dtype=dtype, device=device)
        if change is not None:
            self.value[change] = float("nan")
        self.differs = torch.zeros(1, dtype=torch.int32, pin_memory=self.pinned)

    @property
    def taken(self) -> Taken:
        return self.value, self.taps[1], self.own, self.differs

    def check(self, arrived: bool) -> None:
        if self.pinned:
            torch.cuda.synchronize()
        assert self.differs.item() == (arrived and self.change is not None)
        value = self.value.cpu()
        wanted = (value, value) if arrived else (self.before[1], torch.zeros_like(value))
        for found, held in ((self.taps[1], wanted[0]), (self.own, wanted[1]), (self.taps[::2], self.before[::2])):
            assert torch.equal(found.cpu().contiguous().view(torch.uint8), held.contiguous().view(torch.uint8))
