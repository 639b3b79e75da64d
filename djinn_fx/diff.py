"""Two runs side by side: where they part, and how far apart the model's predictions are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from djinn_fx.dj import Dj
from djinn_fx.errors import InvalidValue
from djinn_fx.runtime.run import Run


@dataclass(frozen=True)
class Place:
    """One position of two runs.

    Attributes:
        position: absolute position, 0-based.
        tokens: the token of each run there; None where a run is shorter.
        best: the token that each run's logits make likeliest to come next; None where a run is shorter.
        kl: KL divergence from the first run's next-token distribution to the second's, in nats; NaN where the
            logits of one are not finite, None where one is shorter.
    """

    position: int
    tokens: tuple[int | None, int | None]
    best: tuple[int | None, int | None]
    kl: float | None


@dataclass(frozen=True)
class RunDiff:
    """What :func:`diff` found; printed, a table.

    Attributes:
        tokens: all tokens of both sessions so far, the prompt included.
        first_difference: first position at which the tokens differ or one run ends; None if they are equal.
        places: every position, in order.
        words: the text of each token that occurs, where there is a tokenizer.
    """

    tokens: tuple[tuple[int, ...], tuple[int, ...]]
    first_difference: int | None
    places: tuple[Place, ...]
    words: tuple[tuple[int, str], ...] = ()

    def __str__(self) -> str:
        names = dict(self.words)

        def word(token: int | None) -> str:
            return "-" if token is None else repr(names[token]) if token in names else str(token)

        first = self.first_difference
        lines = ["same tokens" if first is None else f"tokens part at position {first}"]
        lines.append(f"{'pos':>4}  {'first':<14} {'second':<14} {'first: next':<14} {'second: next':<14} KL (nats)")
        for place in self.places:
            cells = [word(token) for token in (*place.tokens, *place.best)]
            mark = "*" if place.tokens[0] != place.tokens[1] else " "
            kl = "" if place.kl is None else f"{place.kl:.4f}"
            lines.append(f"{place.position:>4}{mark} " + " ".join(f"{cell:<14}" for cell in cells) + f" {kl}")
        return "\n".join(lines)


def diff(run_a: Run, run_b: Run, *, dj: Dj) -> RunDiff:
    """Compare two runs, such as two forks of one, as their sessions stand.

    Logits are those of the sessions: with every edit and all steering as they acted, with the value at a stop. Where a
    run kept its logits (``output_logits=True``, ``forward``) these are taken, else they are computed anew from the
    session's own steps. So they tell what an edit did, also where the tokens are still the same.

    Args:
        run_a: the first run; finished or not.
        run_b: the second.
        dj: the compiled model of both.

    Raises:
        InvalidValue: a run is of another model, or has no tokens.
        SessionClosed: the model or a session was closed.
        SessionBusy: another thread is driving one of them.
    """
    for run in (run_a, run_b):
        if run.session.engine is not dj.engine:
            raise InvalidValue("diff: a run is not of this compiled model; give both runs' own dj.")
    sides = [run.session.tokens for run in (run_a, run_b)]
    if not all(side.numel() for side in sides):
        raise InvalidValue("diff: a run has no tokens yet.")
    logits = [_logits(dj, run).log_softmax(-1) for run in (run_a, run_b)]
    a, b = (tuple(side.tolist()) for side in sides)
    best = [side.argmax(-1).tolist() for side in logits]
    shared = min(len(side) for side in logits)
    gaps = _divergence(logits[0][:shared], logits[1][:shared]).tolist()
    common = min(len(a), len(b))
    apart = [i for i in range(common) if a[i] != b[i]]
    first = apart[0] if apart else None if len(a) == len(b) else common
    places = tuple(
        Place(
            i,
            (a[i] if i < len(a) else None, b[i] if i < len(b) else None),
            (best[0][i] if i < len(best[0]) else None, best[1][i] if i < len(best[1]) else None),
            gaps[i] if i < shared else None,
        )
        for i in range(max(len(a), len(b)))
    )
    return RunDiff((a, b), first, places, _words(dj, {*a, *b, *best[0], *best[1]}))


def _logits(dj: Dj, run: Run) -> torch.Tensor:
    """The logits of a run's session, fp32 ``[positions, vocab]``; those that the run kept, where it did."""
    logits = dj(run.session).logits[0].float()
    kept = [record.logits for record in run.records if record.logits is not None]
    if kept:
        known = torch.cat(kept).float()
        start = run.prompt_start if run.options.kind == "forward" else run.prompt_end - 1
        logits[start : start + len(known)] = known
    return logits


def _divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """KL divergence by position, of log probabilities ``[positions, vocab]``; what is impossible in ``a`` counts 0."""
    likely = a.exp()
    return torch.where(likely == 0, 0.0, likely * (a - b)).sum(-1).clamp_min(0)


def _words(dj: Dj, tokens: set[int]) -> tuple[tuple[int, str], ...]:
    if dj.engine.tokenizer is None:
        return ()
    return tuple((token, dj.engine.decode_text([token]) or "") for token in sorted(tokens))
