"""Commands that move a run: run, continue, step, next, rewind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from djinn_fx.bundled import unknown_words
from djinn_fx.debugger.words import between, number
from djinn_fx.errors import InvalidValue

if TYPE_CHECKING:
    from djinn_fx.debugger.interpreter import Debugger
    from djinn_fx.runtime.stop import Stop


def run(d: Debugger, rest: str) -> None:
    """Begin again."""
    prompt = rest or d.prompt
    if not prompt:
        raise InvalidValue("give a prompt: run A PROMPT.")
    session = d.dj.session()
    try:
        begun = session.generate(prompt, max_new_tokens=d.max_new_tokens, breakpoints=d.specs())
    except BaseException:
        session.close()  # what ran before goes on
        raise
    for known in d.sessions:
        d.say_python(f"s{known}.close()")
    d.close_sessions()
    d.prompt, d.sessions[1], d.current = prompt, session, 1
    d.say_python(
        "s1 = dj.session()",
        f"run1 = s1.generate({prompt!r}, max_new_tokens={d.max_new_tokens}, breakpoints={d.specs_python()})",
        "stop1 = next(run1, None)",
    )
    unknown = unknown_words(d.dj.engine.tokenizer, prompt)
    if unknown:
        d.write(f"note: the model does not know {', '.join(map(repr, unknown))}, and reads its unknown token instead")
    d.arrived(d.drive(lambda: next(begun, None)))


def continue_(d: Debugger, rest: str) -> None:
    """Go on to the next breakpoint."""
    run = d.run
    if run.finished:
        raise InvalidValue("the run has finished; say `rewind POSITION SITE` or `run`.")
    d.say_python(f"stop{d.current} = next(run{d.current}, None)")
    d.arrived(d.drive(lambda: next(run, None)))


def step(d: Debugger, rest: str) -> None:
    """To the next site or token."""
    if rest == "token":
        _step(d, "", tokens=1)
    else:
        _step(d, rest, tokens=0)


def next_(d: Debugger, rest: str) -> None:
    """To the next token."""
    _step(d, rest, tokens=1)


def _step(d: Debugger, rest: str, *, tokens: int) -> None:
    count = number(rest, "number of steps") if rest else 1
    if count < 1:
        raise InvalidValue("give 1 step or more.")
    for left in range(count, 0, -1):
        stop = d.stop
        d.say_python(f"stop{d.current} = stop{d.current}.step({f'tokens={tokens}' if tokens else ''})")
        found = d.drive(lambda stop=stop: stop.step(tokens=tokens))  # type: ignore[misc]
        if found is None or d.asked or left == 1:
            d.arrived(found)
            return


def rewind(d: Debugger, rest: str) -> None:
    """Back to a position."""
    words = rest.split()
    if len(words) not in (1, 2):
        raise InvalidValue("rewind POSITION [SITE], such as rewind 17 resid_post.3.")
    position, site = number(words[0], "position"), words[1] if len(words) == 2 else None
    name = d.current
    if site is not None:
        d.compile_in([d.dj.sites.get(site)])
    run, before = d.run, _past(d)
    stop = run.rewind(position=position, site=site)
    d.say_python(f"stop{name} = run{name}.rewind(position={position}" + (f", site={site!r})" if site else ")"))
    d.write(_rewound(stop, position, before, _past(d)))
    d.arrived(stop)


@dataclass(frozen=True)
class _Past:
    """What a session has behind it: how many tokens, the edits at stops, what steers it."""

    tokens: int
    edits: tuple[str, ...]
    steered: frozenset[str]


def _past(d: Debugger) -> _Past:
    session, stop = d.session, d.run.stop
    edits = [(site, step.start, step.stop - 1) for step in session.journal for site in step.injections]
    if stop is not None and stop.written:
        edits.append((stop.site, stop.positions[0], stop.positions[-1]))
    said = [f"{site} ({between(first, last)})" for site, first, last in dict.fromkeys(edits)]
    return _Past(len(session.tokens), tuple(said), frozenset(session.handles))


def _rewound(stop: Stop, position: int, before: _Past, now: _Past) -> str:
    """Where a rewind went, and what it dropped."""
    first, last = stop.positions[0], stop.positions[-1]
    place = f"rewound to position {position}"
    if not first <= position <= last:
        place = f"rewound to the step of position {position}; {stop.site} is kept there at {between(first, last)} alone"
    elif first != last:
        place += f", in the prompt's step, which computes {between(first, last)} together"
    lost = [between(now.tokens, before.tokens - 1)] if now.tokens < before.tokens else []
    lost += [f"the edit of {edit}" for edit in before.edits if edit not in now.edits]
    lost += [f"the steering of {site}" for site in sorted(before.steered - now.steered)]
    back = [f"the steering of {site} is back" for site in sorted(now.steered - before.steered)]
    return "; ".join([place, f"dropped: {', '.join(lost) or 'nothing'}", *back])
