"""A process that is killed: it saves a checkpoint again and again, or generates under autosave."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import djinn_fx as djinn
from tests.runtime.tiny import another_dj, make_dj, make_model, prompt

#: Tokens of a run that is killed on its way.
LONG = 160


def long_dj() -> djinn.Dj:
    """A model of many positions whose bits do not depend on who decodes beside."""
    model = make_model("llama", positions=LONG + 100)
    return make_dj(model, max_length=LONG + 100, batch_invariant=True, backend="static")


def driven(path: str) -> None:
    """Generate under autosave, without a pause between two calls."""
    dj = long_dj()
    sessions = [dj.session(seed) for seed in range(3)]
    runs = [s.generate(prompt(6, s.seed), max_new_tokens=LONG, do_sample=not s.seed) for s in sessions]
    with dj.autosave(path, every=0.05) as saver, ThreadPoolExecutor(1) as pool:
        alone = pool.submit(runs[0].result)
        group = threading.Thread(target=dj.results, args=(runs[1:],), daemon=True)
        group.start()
        while saver.written < 6:
            time.sleep(0.001)
        print("ready", flush=True)
        alone.result()
        group.join()
        sys.stdin.read()


def main(what: str, path: str) -> None:
    """Say ``ready`` on standard output, then go on until killed."""
    if what == "driven":
        driven(path)
        return
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
