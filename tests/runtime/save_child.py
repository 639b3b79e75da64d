"""A process that is killed: it saves a checkpoint again and again, or generates under autosave."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.runtime.tiny import another_dj, prompt


def main(what: str, path: str) -> None:
    """Say ``ready`` on standard output, then go on until killed."""
    dj = another_dj("llama", batch_invariant=True)
    if what == "save":
        sessions = [dj.session() for _ in range(2)]
        for length, session in enumerate(sessions, 5):
            session.generate(prompt(length), max_new_tokens=3).run_to_end()
        held = [session.checkpoint().wait() for session in sessions]
        held[0].save(path)
        print("ready", flush=True)
        while True:
            for checkpoint in held:
                checkpoint.save(path)
    with dj.autosave(Path(path), every=0.05) as saver:
        session = dj.session(seed=3)
        while saver.written < 4 and session.length < 50:
            session.generate(prompt(2, session.length), max_new_tokens=1).run_to_end()
            saver.save_now()
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    torch.set_num_threads(1)  # as tests/conftest.py
    main(*sys.argv[1:])
