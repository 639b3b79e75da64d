"""What the panes of the debugger's screen show: text with styles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.text import Text

from djinn_fx import render
from djinn_fx.debugger import shows
from djinn_fx.debugger.lens import Lens, Moved, lens_at
from djinn_fx.dj import Dj
from djinn_fx.errors import DjinnError
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.wording import nonfinite
from djinn_fx.views import Share, visible

if TYPE_CHECKING:
    from djinn_fx.debugger.interpreter import Debugger

PROMPT, GENERATED, CURSOR, HERE, ARMED, DIM, BAD = (
    "#8fb8de", "#9fd8a0", "bold #1c1c1c on #ffb454", "bold #ffb454", "bold #ff6b6b", "#808080", "bold #ff6b6b",
)  # fmt: skip

#: Layers of the lens that the pane shows at most; the command `lens` shows all.
LAYERS = 8


def tokens_of(debugger: Debugger, chosen: int | None = None) -> Text:
    """The current session's text, prompt and generated; the token where it stands, and one ``chosen``, stand out."""
    if debugger.current not in debugger.sessions:
        return Text.assemble(("not running; ", DIM), ("run", "bold"), (" begins with: ", DIM), debugger.prompt)
    session = debugger.session
    run = session.run
    stop, begins = (run.stop, run.prompt_end) if run is not None else (None, 0)
    found = Text()
    for position, token in enumerate(session.tokens.tolist()):
        word = visible(debugger.dj.engine.decode_text([token]) or f"{token} ")
        style = PROMPT if position < begins else GENERATED
        if stop is not None and position == stop.position:
            style = CURSOR
        if position == chosen:
            style = f"reverse {style}"
        lead = len(word) - len(word.lstrip(" "))  # the space before a word is no part of the mark
        found.append(word[:lead]).append(word[lead:] or " ", style)
    return found


def layer(name: str, *, armed: bool, disabled: bool, here: bool, steered: bool) -> Text:
    """A line of the layers: breakpoint, where the run stands, the site, whether it is edited."""
    point = ("●", ARMED) if armed else ("○", DIM) if disabled else (" ", "")
    return Text.assemble(
        point, ("▶" if here else " ", HERE), " ", (name, HERE if here else ""), (" ~" if steered else "", GENERATED)
    )


def site_of(dj: Dj, stop: Stop | None, width: int) -> Text:
    """The stopped site: numbers, flags, histogram, largest neurons, and the logit lens over the layers."""
    if stop is None:
        return Text("not at a stop", DIM)
    flat = stop.value[-1].detach().float().cpu().flatten()
    found = Text()
    measures = {
        "norm": f"{flat.norm():.2f}", "mean": f"{flat.mean():+.3f}", "min": f"{flat.min():+.2f}",
        "max": f"{flat.max():+.2f}", **({"std": f"{flat.std():.2f}"} if width > 66 else {}),
    }  # fmt: skip
    for name, number in measures.items():
        found.append(f"{name} ", DIM).append(f"{number}  ", "bold")
    bad = nonfinite(int(flat.isnan().sum()), int(flat.isinf().sum()))
    found.append(bad or ("finite" if width > 58 else ""), BAD if bad else DIM)
    found.append("\nvalues   ", DIM).append(render.histogram(flat, max(12, min(40, width - 26))), PROMPT)
    found.append("\nlargest  ", DIM).append_text(_neurons(flat, max(3, min(8, (width - 9) // 12))))
    try:
        found.append("\n").append_text(_lens(lens_at(dj, stop), width))
    except DjinnError as error:
        found.append(f"\n{error}", DIM)
    return found


def _neurons(flat: torch.Tensor, count: int) -> Text:
    found = Text()
    for index, value in shows.largest(flat, count):
        found.append(f"{index}:", DIM).append(f"{value:+.2f}  ")
    return found


def _lens(lens: Lens, width: int) -> Text:
    """Layers, at most :data:`LAYERS` of them, then the tokens that moved."""
    shown = _chosen(lens)
    columns = max((len(words) for _, words in shown), default=0)
    wide = [max((len(words[i].text) for _, words in shown if i < len(words)), default=0) for i in range(columns)]
    while sum(wide) + 7 * len(wide) + 17 > width and len(wide) > 1:
        wide.pop()  # narrow terminals see the likeliest only
    found = Text().append("lens     likeliest next tokens after each layer", DIM)
    for site, words in shown:
        here = site in (lens.here, "here")
        found.append(f"\n{'▶' if here else ' '} {site:<14} ", HERE if here else "").append_text(_row(words, wide))
    longest = max((len(moved.text) for moved in lens.moved), default=0)
    if lens.moved:
        found.append("\nmoved    how the last layer's likeliest came up, first layer to last", DIM)
    for moved in lens.moved:
        found.append(f"\n  {moved.text:<{max(longest, 14)}} ").append(moved.spark(lens.most), PROMPT)
        chance = moved.probabilities[-1]
        found.append(f"  {chance:>3.0%}  " if chance == chance else "       ", "bold").append(_ranks(moved), DIM)
    return found


def _row(words: tuple[Share, ...], wide: list[int]) -> Text:
    if not words:
        return Text("not finite", BAD)
    found = Text()
    for rank, (word, room) in enumerate(zip(words, wide, strict=False)):
        found.append(f"{word.text:<{room}} ", "bold" if not rank else "").append(f"{word.share:>3.0%}   ", DIM)
    return found


def _chosen(lens: Lens) -> list[tuple[str, tuple[Share, ...]]]:
    """The layers to show: the last ones' neighbours are much alike, so they are thinned out evenly."""
    named = lens.named()
    if len(named) <= LAYERS:
        return named
    keep = {round(i * (len(named) - 1) / (LAYERS - 2)) for i in range(LAYERS - 1)}
    keep |= {i for i, (site, _) in enumerate(named) if site == lens.here}
    return [named[i] for i in sorted(keep)]


def _ranks(moved: Moved) -> str:
    """Ranks at a few layers, the first and the last among them."""
    ranks = [str(rank or "?") for rank in moved.ranks]
    if len(ranks) > LAYERS:
        ranks = [ranks[round(i * (len(ranks) - 1) / 3)] for i in range(4)]
    return "rank " + " → ".join(ranks)
