"""Loading and compiling what the debugger debugs; reading its scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from djinn_fx.errors import InvalidValue

if TYPE_CHECKING:
    from djinn_fx.dj import Dj

#: Gives a compiled model and a prompt to begin with; told where to say what it is doing.
Opening = Callable[[Callable[[str], None]], "tuple[Dj, str]"]


def open_model(reference: str | None, tell: Callable[[str], None]) -> tuple[Dj, str]:
    """The compiled model of a path or hub id (None: the bundled one), and a prompt to begin with.

    Args:
        reference: the path or hub id.
        tell: is told what is being done.

    Raises:
        InvalidValue: transformers cannot find it.
        CaptureError, CaptureMismatch: it cannot be compiled.
    """
    import torch

    from djinn_fx import bundled
    from djinn_fx.api import compile as djinn_compile

    tell(f"loading {reference or 'the storyteller'}")
    if reference is None:
        torch.set_num_threads(1)  # a model this small runs fastest on one
    model, tokenizer = bundled.load(reference or bundled.NAME)
    if torch.cuda.is_available():
        tell("moving it to the GPU")
        model = model.to("cuda")
    known = getattr(model.config, "max_position_embeddings", None)
    length = min(1024, known) if isinstance(known, int) else 1024
    tell("compiling it, and measuring how exact that is")
    dj = djinn_compile(model, tokenizer=tokenizer, max_length=length)
    return dj, bundled.contrast().gloomy[0] if reference is None else "The"


def read_script(name: str) -> list[str]:
    """The lines of a script, ``-`` for standard input.

    Raises:
        OSError: it cannot be read.
        InvalidValue: it is a folder, no UTF-8, or holds no command.
    """
    path = Path(name)
    if name != "-" and path.is_dir():
        raise InvalidValue(f"the script {name} is a folder; give a file of commands, or - for standard input.")
    if name != "-" and not path.exists():
        raise InvalidValue(f"there is no script {name}; give a file of commands, or - for standard input.")
    data = sys.stdin.buffer.read() if name == "-" else path.read_bytes()
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidValue(f"the script {name} is no UTF-8 text: line {line}, byte {error.start} of it.") from error
    if not any(line.strip() and not line.strip().startswith("#") for line in lines):
        raise InvalidValue(f"the script {name} holds no command; leave --script out to type them one by one.")
    return lines
