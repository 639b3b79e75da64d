"""Every line that the debugger echoes is run in Python against the public API, and gives the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import djinn_fx as djinn
from djinn_fx.bundled import storyteller
from djinn_fx.debugger import shows
from djinn_fx.debugger.interpreter import Debugger

PROMPT = "It was a grey morning, and Mara felt sad."

#: A session with all commands that stand for Python; DIR is a folder of the test's own.
SCRIPT = """
break resid_post.1 if norm > 5 and not mean > 9
break resid_post.2 times 2
tbreak resid_post.0 if not 0 and 2**3 == 8
break resid_post.3 if h[0] or 0
disable 4
run
break mlp_out.1 if 1 < 2 < norm times 1
info breakpoints
print norm
print not 0
print not h[-1, :3]
print 2**3 + 7 // 2 - -1 % 3
print 1 and 2 or 3
print 0 and h[999]
print position > 3 and layer
print h[-1, 0] > 0 or position
print -3 < h[-1, :4] < 3
print 1 < position < 99
print cosine(h[0], h[-1])
print topk(unembed(h[-1]), 3).indices
print softmax(unembed(h[-1]), dim=-1).max()
print h[[0, -1], 1:3]
print h[h > 2].numel()
print h.clamp(min=-1, max=h[-1].max() / 2).norm(dim=1)[..., -1]
print (tokens[-1], width, h.shape, None)
print max
print std if_not_there
lens
fork 2
switch 2
set h[-1, 3] += norm * 2 - (1 and 0)
steer resid_post.1 add DIR/d.safetensors 0.5
info edits
continue
unsteer resid_post.1
delete 1
enable 4
continue
continue
switch 1
nan
delete
set h = -h
set h[[0, 2]] *= h[-1].mean() > 5
step
step 2
next
continue
rewind 14 resid_post.1
set h /= 2
save DIR/a.safetensors
load DIR/a.safetensors
continue
switch 3
continue
diff 1 2
nan
sites resid_post.*
tokens
info sessions
info site resid_post.1
forks
memory
receipt
"""


@pytest.fixture(scope="module")
def dj() -> Iterator[djinn.Dj]:
    model, tokenizer = storyteller()
    with djinn.compile(model, tokenizer=tokenizer, max_length=128) as compiled:
        yield compiled


def test_every_echoed_line_gives_the_same(dj: djinn.Dj, tmp_path: Path) -> None:
    safetensors.torch.save_file({"d": torch.ones(dj.sites.get("resid_post.1").width)}, tmp_path / "d.safetensors")
    out: list[str] = []
    debugger = Debugger(dj, out.append, prompt=PROMPT, max_new_tokens=8, echo=True)
    seen: list[tuple[str, list[str], list[str], Any]] = []  # line, Python, what was written, where it stands
    for line in SCRIPT.strip().replace("DIR", str(tmp_path)).splitlines():
        out.clear()
        done = debugger.execute(line)
        assert done != line.endswith("if_not_there"), out
        said = [part[4:] for part in out if part.startswith(">>> ")]
        assert said or not done or line.split()[0] in ("forks", "disable"), line
        seen.append((line, said, [part for part in out if not part.startswith(">>> ")], place(debugger.sessions)))
    debugger.close_sessions()

    printed: list[Any] = []
    space: dict[str, Any] = {
        "dj": dj, "djinn": djinn, "torch": torch, "safetensors": safetensors, "print": printed.append,
    }  # fmt: skip
    for line, said, wrote, where in seen:
        printed.clear()
        exec("\n".join(said), space)
        numbers = [int(name[1:]) for name in space if name[0] == "s" and name[1:].isdigit()]
        assert place({n: space[f"s{n}"] for n in numbers if not space[f"s{n}"].closed}) == where, line
        word = line.split()[0]
        if word == "print" and said:
            assert [shows.value(value) for value in printed] == wrote, line
        if word in ("diff", "receipt"):
            assert [str(value) for value in printed] == wrote, line
        if word == "nan":
            assert printed == [None] and wrote == ["all finite"]
    for name, value in space.items():
        if isinstance(value, djinn.Session):
            value.close()
        assert name != "if_not_there"


def place(sessions: Any) -> Any:
    """Where sessions stand: tokens, edits, site and value."""
    found = {}
    for number, session in sessions.items():
        run = session.run
        stop = run.stop if run is not None else None
        at = None if stop is None else (stop.site, stop.position, stop.value.tolist())
        found[number] = (session.tokens.tolist(), sorted(session.handles), at, run is not None and run.finished)
    return found
