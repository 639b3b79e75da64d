"""What each command of the debugger does."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from djinn_fx.debugger import shows
from djinn_fx.debugger.conditions import predicate
from djinn_fx.debugger.echo import translate
from djinn_fx.debugger.expressions import BINARY, evaluate, parse
from djinn_fx.diff import diff
from djinn_fx.errors import InvalidValue
from djinn_fx.specs import break_at

if TYPE_CHECKING:
    from djinn_fx.debugger.interpreter import Debugger

_BREAK = re.compile(r"(?P<site>\S+?)(?:\s+if\s+(?P<when>.+?))?(?:\s+times\s+(?P<times>\d+))?$")
_SET = re.compile(r"(?P<target>h(?:\[.*?\])?)\s*(?P<op>[-+*/]?=)(?!=)\s*(?P<value>.+)$")


_OPERATORS: Mapping[str, type[ast.operator]] = {"+=": ast.Add, "-=": ast.Sub, "*=": ast.Mult, "/=": ast.Div}


def _number(text: str, what: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise InvalidValue(f"{text!r} is no {what}; give a whole number.")
    return int(text)


def break_(d: Debugger, rest: str) -> None:
    """List breakpoints, or make one."""
    if not rest:
        d.write("\n".join(f"{n}  {point.text}" for n, point in d.points.items()) or "no breakpoints")
        return
    from djinn_fx.debugger.interpreter import Point

    match = _BREAK.match(rest)
    if match is None:
        raise InvalidValue(f"cannot read {rest!r}: break SITE [if EXPR] [times N].")
    site, condition, times = match["site"], match["when"], match["times"]
    found = d.dj.sites.select(site)
    missing = [s.name for s in found if s.name not in d.dj.compiled_sites]
    when = predicate(condition) if condition else None
    python = [repr(site)]
    if condition:
        python.append(f"when=lambda h: {translate(condition, {}, 'h')}")
    if times:
        python.append(f"times={times}")
    number = d.made + 1
    python_line = f"djinn.break_at({', '.join(python)})"
    point = Point(break_at(site, when, times=int(times) if times else None), rest, f"b{number}")
    if missing:
        d.dj.add_sites(missing)
        d.say_python(f"dj.add_sites({missing!r})")
    d.points[number] = point
    d.say_python(f"b{number} = {python_line}")
    try:
        d.watch()
    except Exception:
        del d.points[number]
        raise
    d.made = number
    d.write(f"breakpoint {number} at {', '.join(s.name for s in found)}" + (f" if {condition}" if condition else ""))


def delete(d: Debugger, rest: str) -> None:
    """Remove a breakpoint, or all."""
    if not rest:
        d.points.clear()
    elif d.points.pop(_number(rest, "breakpoint"), None) is None:
        raise InvalidValue(f"no breakpoint {rest}; `break` lists them.")
    d.watch()


def run(d: Debugger, rest: str) -> None:
    """Begin again."""
    prompt = rest or d.prompt
    if not prompt:
        raise InvalidValue("give a prompt: run A PROMPT.")
    d.prompt = prompt
    for number in d.sessions:
        d.say_python(f"s{number}.close()")
    d.close_sessions()
    session = d.dj.session()
    d.sessions[1], d.current = session, 1
    begun = session.generate(prompt, max_new_tokens=d.max_new_tokens, breakpoints=d.specs())
    d.say_python(
        "s1 = dj.session()",
        f"run1 = s1.generate({prompt!r}, max_new_tokens={d.max_new_tokens}, breakpoints={d.specs_python()})",
        "stop1 = next(run1, None)",
    )
    d.arrived(next(begun, None))


def continue_(d: Debugger, rest: str) -> None:
    """Go on to the next breakpoint."""
    run = d.run
    if run.finished:
        raise InvalidValue("the run has finished; say `rewind POSITION SITE` or `run`.")
    d.say_python(f"stop{d.current} = next(run{d.current}, None)")
    d.arrived(next(run, None))


def step(d: Debugger, rest: str) -> None:
    """To the next site or token."""
    if rest not in ("", "token"):
        raise InvalidValue(f"cannot read {rest!r}: step, or step token.")
    tokens = 1 if rest else 0
    stop = d.stop
    d.say_python(f"stop{d.current} = stop{d.current}.step({'tokens=1' if tokens else ''})")
    d.arrived(stop.step(tokens=tokens))


def print_(d: Debugger, rest: str) -> None:
    """Print an expression."""
    value = evaluate(rest, d.names(rest))
    d.say_python(f"print({translate(rest, d.python_names(), f'stop{d.current}.value[-1]')})")
    d.write(shows.value(value))


def set_(d: Debugger, rest: str) -> None:
    """Change the activation in place; where it fails nothing is changed."""
    match = _SET.match(rest)
    if match is None:
        raise InvalidValue(f"cannot read {rest!r}: set h *= 0.9, set h[-1] = 0, set h[-1, 5] += 1.")
    target, op, source = match["target"], match["op"], match["value"]
    names, stop = d.names(source), d.stop
    amount = evaluate(source, names)
    if not isinstance(amount, (bool, int, float, torch.Tensor)):
        raise InvalidValue(f"{source!r} is neither a number nor a tensor.")
    new = stop.value.detach().clone()
    tree = parse(target)
    index: Any = ... if isinstance(tree, ast.Name) else _index(tree, names)
    old = new[index]
    combined = amount if op == "=" else BINARY[_OPERATORS[op]](old, amount)
    new[index] = combined if not isinstance(combined, torch.Tensor) else combined.to(new.dtype)
    stop.value.copy_(new)
    python = d.python_names()
    at, value = f"stop{d.current}.value", translate(source, python, f"stop{d.current}.value[-1]")
    subscript = "[...]" if index is ... else translate(target, python, "")[len(at) :]
    d.say_python(f"{at}{subscript} {op} {value}")
    d.write(shows.numbers(stop.value[-1]))


def _index(tree: ast.expr, names: dict[str, Any]) -> Any:
    """The index of ``h[...]``, evaluated by the expressions' own rules."""
    if not isinstance(tree, ast.Subscript) or not isinstance(tree.value, ast.Name) or tree.value.id != "h":
        raise InvalidValue("the target is h or h[...].")
    evaluate(tree, names)  # checks that it is in range
    return evaluate(tree.slice, names)


def _vector(path: str) -> tuple[torch.Tensor, str]:
    """The one tensor of a safetensors file."""
    tensors = load_file(Path(path).expanduser())
    if len(tensors) != 1:
        raise InvalidValue(f"{path} holds {len(tensors)} tensors; this takes a file with one.")
    return next(iter(tensors.values())), f"next(iter(safetensors.torch.load_file({path!r}).values()))"


def steer(d: Debugger, rest: str) -> None:
    """Edit a site from here on."""
    words = rest.split()
    if (
        len(words) not in (3, 4)
        or words[1] not in ("scale", "add", "ablate")
        or (len(words) == 4) > (words[1] == "add")
    ):
        raise InvalidValue("steer SITE scale X | add FILE.safetensors [STRENGTH] | ablate FILE.")
    site, how, what = words[:3]
    session = d.session
    options: dict[str, Any]
    if how == "scale":
        options, python = {"scale": float(what)}, f"scale={float(what)!r}"
    else:
        vector, load = _vector(what)
        options, python = {how: vector}, f"{how}={load}"
        if len(words) == 4:
            options["strength"] = float(words[3])
            python += f", strength={float(words[3])!r}"
    session.steer(site, **options)
    d.say_python(f"s{d.current}.steer({site!r}, {python})")
    d.write(f"steering {d.dj.sites.get(site).name} from here on")


def unsteer(d: Debugger, rest: str) -> None:
    """End an edit."""
    site, handles = d.dj.sites.get(rest).name, d.session.handles
    if site not in handles:
        raise InvalidValue(f"{site} is not steered here; steered: {', '.join(handles) or 'nothing'}.")
    handles[site].remove()
    d.say_python(f"s{d.current}.handles[{site!r}].remove()")


def fork(d: Debugger, rest: str) -> None:
    """Copies of this run."""
    count = _number(rest, "number of forks") if rest else 1
    made = d.stop.fork(count)
    numbers = d.adopt(made)
    names = ", ".join(f"stop{n}" for n in numbers)
    d.say_python(f"{names}{',' if count == 1 else ''} = stop{d.current}.fork({count})")
    for number in numbers:
        d.say_python(f"s{number}, run{number} = stop{number}.session, stop{number}.run")
        d.say_python(f"s{number}.watch({d.specs_python()})")
        d.sessions[number].watch(d.specs())
    d.write(f"forked: {', '.join(map(str, numbers))}; `switch {numbers[0]}` acts on it")


def switch(d: Debugger, rest: str) -> None:
    """Act on another fork."""
    number = _number(rest, "fork")
    if number not in d.sessions:
        raise InvalidValue(f"no fork {number}; there are {', '.join(map(str, d.sessions)) or 'none'}.")
    d.current = number
    d.say_python(f"# from here on: s{number}, run{number}, stop{number}")
    forks(d, "")


def forks(d: Debugger, rest: str) -> None:
    """List the forks."""
    lines = []
    for number, session in d.sessions.items():
        stop, mark = session.run.stop if session.run else None, "*" if number == d.current else " "
        where = f"at {stop.site}, position {stop.position}" if stop else "not at a stop"
        lines.append(f"{mark}{number}  {where}  {((session.run.text if session.run else None) or '').strip()[-60:]}")
    d.write("\n".join(lines) or "nothing runs yet")


def diff_(d: Debugger, rest: str) -> None:
    """Two forks side by side."""
    words = rest.split()
    if len(words) != 2:
        raise InvalidValue("diff takes two forks: diff 1 2.")
    chosen = [_number(word, "fork") for word in words]
    runs = [d.sessions[number].run if number in d.sessions else None for number in chosen]
    if runs[0] is None or runs[1] is None:
        raise InvalidValue(f"forks are {', '.join(map(str, d.sessions)) or 'none yet'}.")
    d.say_python(f"print(djinn.diff(run{chosen[0]}, run{chosen[1]}, dj=dj))")
    d.write(str(diff(runs[0], runs[1], dj=d.dj)))


def rewind(d: Debugger, rest: str) -> None:
    """Back to a position."""
    words = rest.split()
    if len(words) not in (1, 2):
        raise InvalidValue("rewind POSITION [SITE], such as rewind 17 resid_post.3.")
    position, site = _number(words[0], "position"), words[1] if len(words) == 2 else None
    number = d.current
    stop = d.run.rewind(position=position, site=site)
    d.say_python(f"stop{number} = run{number}.rewind(position={position}" + (f", site={site!r})" if site else ")"))
    d.arrived(stop)


def lens(d: Debugger, rest: str) -> None:
    """The logit lens."""
    at, text = f"stop{d.current}", shows.lens(d.dj, d.stop)
    d.say_python(
        f'lens = dj.run_with_cache({at}.tokens, "resid_post", positions=-1, logits=False)[1].stack("resid_post", -1)',
        "print(dj.unembed(lens[:, 0]).softmax(-1).topk(3))",
    )
    d.write(text)


def nan(d: Debugger, rest: str) -> None:
    """The first site with a NaN."""
    d.say_python(f"print(dj.first_nonfinite(s{d.current}.tokens))")
    found = d.dj.first_nonfinite(d.session.tokens)
    d.write("all finite" if found is None else f"first non-finite: {found[0]}, positions {found[1]}")


def save(d: Debugger, rest: str) -> None:
    """Checkpoint the session; breakpoints stay with the debugger, since functions do not go into files."""
    session = d.session
    if not rest:
        raise InvalidValue("give a file: save a.safetensors.")
    session.watch(())
    try:
        path = session.checkpoint().wait().save(rest)
    finally:
        session.watch(d.specs())
    s = f"s{d.current}"
    d.say_python(f"{s}.watch([])", f"{s}.checkpoint().wait().save({rest!r})", f"{s}.watch({d.specs_python()})")
    d.write(f"saved {Path(path).stat().st_size / 1e3:.0f} kB")


def load(d: Debugger, rest: str) -> None:
    """Restore a checkpoint as another fork."""
    if not rest:
        raise InvalidValue("give a file: load a.safetensors.")
    session = d.dj.restore(rest, breakpoints=d.specs())
    number = max(d.sessions, default=0) + 1
    d.sessions[number], d.current = session, number
    d.say_python(
        f"s{number} = dj.restore({rest!r}, breakpoints={d.specs_python()})",
        f"run{number}, stop{number} = s{number}.run, s{number}.run.stop",
    )
    forks(d, "")


def receipt(d: Debugger, rest: str) -> None:
    """How exact it is."""
    d.say_python("print(dj.receipt)")
    d.write(str(d.dj.receipt))


def memory(d: Debugger, rest: str) -> None:
    """Bytes by component."""
    d.say_python("print(dj.memory())")
    d.write("\n".join(f"{name:<16} {size / 1e6:10.3f} MB" for name, size in d.dj.memory().items()))


def sites(d: Debugger, rest: str) -> None:
    """Names of sites."""
    d.say_python(f"print([site.name for site in dj.sites.select({rest or '*'!r})])")
    compiled = set(d.dj.compiled_sites)
    d.write("\n".join(f"{'*' if s.name in compiled else ' '} {s.name}" for s in d.dj.sites.select(rest or "*")))


def tokens(d: Debugger, rest: str) -> None:
    """Tokens with positions."""
    d.say_python(f"print(s{d.current}.tokens)")
    d.write("  ".join(f"{i}:{shows.token_text(d.dj, int(t))}" for i, t in enumerate(d.session.tokens)))


def history(d: Debugger, rest: str) -> None:
    """The lines so far."""
    d.write("\n".join(f"{n:>4}  {line}" for n, line in enumerate(d.history, start=1)))


def echo(d: Debugger, rest: str) -> None:
    """Python shown or not."""
    if rest not in ("on", "off"):
        raise InvalidValue("echo on, or echo off.")
    d.echo = rest == "on"


def quit_(d: Debugger, rest: str) -> None:
    """Leave."""
    d.close_sessions()
    d.done = True
