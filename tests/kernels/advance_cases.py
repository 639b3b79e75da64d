"""What the end of a decode step must do, whoever does it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from djinn_fx.kernels.triton_taking import Taken

Advance = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]

Begin = Callable[[Tensor, Tensor, int, Tensor, Tensor, bool, Taken | None], object]

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


def check_beginning(begin: Begin, device: str) -> None:
    """Lanes that keep all, that keep their token, that take all; those beyond the program's, which keep all; flags."""
    message = -torch.arange(6 * 16, dtype=torch.int64).view(6, 16) - 1000
    message[5] = torch.tensor([0, 1, 2, 2, 1, 0, 2, 1] * 2)
    raised = torch.randint(0, 2, (5008,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    if device == "cuda":
        message, raised = message.pin_memory(), raised.pin_memory()
    for anew in (False, True, False):  # all but the first go through the kernel that the first has found
        ints = torch.arange(5 * 16, device=device).view(5, 16)
        flags = torch.full((5008,), 7, dtype=torch.uint8, device=device)
        wanted = ints.cpu().clone()
        before = wanted.clone()
        begin(message, ints, 11, raised, flags, anew, None)
        for lane, news in enumerate(message[5, :11].tolist()):
            wanted[1:, lane] = message[1:5, lane] if news else before[1:, lane]
            wanted[0, lane] = message[0, lane] if news == 2 else before[0, lane]
        assert torch.equal(ints.cpu(), wanted)
        assert torch.equal(flags.cpu(), raised if anew else torch.full_like(raised, 7))


def check_taking(begin: Begin, device: str) -> None:
    """A value that a step begins with: its place becomes it, so does a copy, and it is said whether it differs."""
    pinned = device == "cuda"
    message = torch.zeros(6, 16, dtype=torch.int64, pin_memory=pinned)
    raised = torch.ones(5008, dtype=torch.uint8, pin_memory=pinned)
    ints = torch.arange(5 * 16, device=device).view(5, 16)
    for dtype, size in ((torch.bfloat16, 8), (torch.float32, 4), (torch.bfloat16, 3000), (torch.float32, 5000)):
        for anew in (False, True):
            for change in (None, 0, size - 1):
                flags = torch.zeros(5008, dtype=torch.uint8, device=device)
                taps = torch.randn(3, size, generator=torch.Generator().manual_seed(size)).to(device, dtype)
                before, value, own = taps.cpu().clone(), taps[1].clone(), torch.empty(size, dtype=dtype, device=device)
                if change is not None:
                    value[change] = float("nan")
                differs = torch.zeros(1, dtype=torch.int32, pin_memory=pinned)
                begin(message, ints, 11, raised, flags, anew, (value, taps[1], own, differs))
                if pinned:
                    torch.cuda.synchronize()
                assert differs.item() == (change is not None)
                for found, wanted in ((taps[1], value), (own, value), (taps[::2].cpu(), before[::2])):
                    same = found.contiguous().view(torch.uint8) == wanted.contiguous().view(torch.uint8)
                    assert same.all()
                assert flags.cpu().eq(int(anew)).all()
    assert torch.equal(ints.cpu(), torch.arange(5 * 16).view(5, 16))
