"""The demo: the main job of djinn_fx on a real model, with the exactness of every act checked on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from djinn_fx import bundled, render
from djinn_fx.api import compile as djinn_compile
from djinn_fx.dj import Dj
from djinn_fx.runtime.bits import same_bits
from djinn_fx.runtime.wording import nbytes

#: Contrasting prompts for a model from outside.
GOOD = ("I love this film. It is", "What a wonderful day! I feel", "The food was delicious and the people")
BAD = ("I hate this film. It is", "What a terrible day! I feel", "The food was disgusting and the people")


@dataclass
class Demo:
    """What the demo's scenes share.

    Attributes:
        console: where it prints.
        reference: path or hub id of the model.
        model: the model.
        tokenizer: its tokenizer.
        dj: the compiled model.
        layer: the layer at which most scenes stop.
        prompts: pairs of contrasting prompts, and open ones.
        new_tokens: tokens each scene generates.
        verdicts: what was checked so far: a sentence and whether it held.
    """

    console: Console
    reference: str
    model: Any
    tokenizer: Any
    dj: Dj
    layer: int
    prompts: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    new_tokens: int
    verdicts: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def site(self) -> str:
        """The site at which most scenes stop."""
        return f"resid_post.{self.layer}"

    @property
    def prompt(self) -> str:
        """The prompt of most scenes: a gloomy one."""
        return self.prompts[1][0]

    def verdict(self, sentence: str, held: bool) -> None:
        """Record and show a check."""
        self.verdicts.append((sentence, held))
        line = Table.grid(padding=(0, 2))
        line.add_column(no_wrap=True)
        line.add_column()
        line.add_row("  [green]exact[/green]" if held else "  [bold red]NOT exact[/bold red]", sentence)
        self.console.print(line)

    def say(self, text: str) -> None:
        """Print a line of a scene, or some, indented."""
        self.console.print(Padding(text, (0, 0, 0, 2)))

    def tell(self, label: str, text: str | None, note: str = "") -> None:
        """Show a text beside its label."""
        line = Table.grid(padding=(0, 2))
        line.add_column(width=14, justify="right", style="dim")
        line.add_column()
        line.add_row(label, Text.assemble((text or "").strip(), ("  " + note if note else "", "cyan")))
        self.console.print(line)


def run_demo(reference: str | None, console: Console) -> bool:
    """Run every scene; returns whether every check held."""
    started = time.perf_counter()
    demo = prepare(reference, console)
    for number, (title, scene) in enumerate(SCENES, start=1):
        console.print()
        console.rule(f"[bold]{number}. {title}[/bold]", align="left")
        scene(demo)
    console.print()
    _summary(demo, time.perf_counter() - started)
    demo.dj.close()
    return all(held for _, held in demo.verdicts)


def prepare(reference: str | None, console: Console) -> Demo:
    """Load and compile the model, with progress."""
    path = reference or str(bundled.PATH)
    if reference is None:
        torch.set_num_threads(1)  # a model this small runs fastest on one
    with _working(console, f"loading {'the bundled storyteller' if reference is None else path}"):
        model, tokenizer = bundled.load(path)
        if torch.cuda.is_available():
            model = model.to("cuda")
    if reference is None:
        contrast = bundled.contrast()
        prompts = (contrast.joyful, contrast.gloomy, contrast.neutral)
    else:
        prompts = (GOOD, BAD, ("The", "Yesterday I"))
    with _working(console, "compiling: capture, annotate, steer, split, verify against eager"):
        started = time.perf_counter()
        dj = djinn_compile(model, tokenizer=tokenizer, max_length=_length(model), prefill_chunk=64)
        seconds = time.perf_counter() - started
    layers = sum(name.startswith("resid_post.") for name in dj.sites.names)
    console.print(
        Panel(
            f"{type(model).__name__}, {layers} layers, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M "
            f"parameters on {next(model.parameters()).device}; compiled in {seconds:.1f} s into "
            f"{len(dj.program.segments)} segments\n{dj.receipt}",
            title="djinn.compile(model)",
            title_align="left",
        )
    )
    new_tokens = 40 if reference is None else 24
    return Demo(console, path, model, tokenizer, dj, max(0, layers // 2), prompts, new_tokens)


def _length(model: Any) -> int:
    return min(256, int(getattr(model.config, "max_position_embeddings", 256)))


@contextmanager
def _working(console: Console, what: str) -> Iterator[None]:
    with console.status(f"{what} ..."):
        yield


# -- scenes ------------------------------------------------------------------------------------


def stop_look_edit(demo: Demo) -> None:
    """Stop in the middle of a forward pass, look, edit, go on."""
    dj, site = demo.dj, demo.site
    with dj.session() as untouched, dj.session() as stopped, dj.session() as edited:
        plain = untouched.generate(demo.prompt, max_new_tokens=demo.new_tokens)
        plain.run_to_end()
        run = stopped.generate(demo.prompt, max_new_tokens=demo.new_tokens, breakpoints=[site])
        stops = 0
        for stop in run:
            stops += 1
            if stops == 1:
                demo.say(
                    f"prompt: [italic]{demo.prompt}[/italic]\nstopped after [bold]{stop.site}[/bold], "
                    f"{stop.phase}, positions {stop.positions[0]}-{stop.positions[-1]}; later layers have not run"
                )
                demo.console.print(render.activation(stop.value[-1], demo.tokenizer, dj.unembed))
        lens = dj.run_with_cache(demo.prompt, "resid_post", logits=False)[1].stack("resid_post", -1)[:, 0]
        demo.console.print(render.logit_lens(lens, demo.tokenizer, dj.unembed))
        demo.verdict(
            f"{stops} stops at {site}, every one resumed untouched: same tokens as never stopping",
            torch.equal(run.tokens, plain.tokens),
        )
        other = edited.generate(demo.prompt, max_new_tokens=demo.new_tokens, breakpoints=[site])
        next(other).value.mul_(-1.0)
        other.run_to_end()
        demo.tell("untouched", run.text)
        demo.tell("edited once", other.text)


def steer(demo: Demo) -> None:
    """Steer along a direction computed from contrasting prompts."""
    dj, bundle = demo.dj, demo.reference == str(bundled.PATH)
    site = "resid_post.1" if bundle else demo.site  # the storyteller's card has the layers compared
    good, bad = demo.prompts[0], demo.prompts[1]
    with torch.no_grad():
        ends = [dj.run_with_cache(list(side), site, positions=-1, logits=False)[1][site] for side in (good, bad)]
        direction = ends[0].float().mean((0, 1)) - ends[1].float().mean((0, 1))
    demo.say(f"direction: mean of {len(good)} contrasting prompts' {site}, length {direction.norm():.1f}")
    prompts = list(bad[:4])
    plain = dj.generate(prompts, max_new_tokens=demo.new_tokens)
    counts = Table("steering", "joyful words", "gloomy words", title_justify="left", box=None)
    for strength in (0.0, 0.5, 1.0, 1.5) if bundle else (0.0, 1.0, 2.0, 4.0):
        edits = [_edit(site, direction, strength)]
        steered = dj.generate(prompts, max_new_tokens=demo.new_tokens, edits=edits)
        if bundle:
            counts.add_row(f"{strength:+.1f} x direction", *_moods(result.text or "" for result in steered))
        if strength == 0.0:
            demo.verdict(
                "steering with strength 0 changes nothing",
                all(torch.equal(a.tokens, b.tokens) for a, b in zip(plain, steered, strict=True)),
            )
        demo.tell(f"{strength:+.1f} x", steered[0].text)
    if counts.row_count:
        demo.console.print(counts)


def _edit(site: str, direction: torch.Tensor, strength: float) -> Any:
    from djinn_fx.specs import Edit

    return Edit(site, add=direction, strength=strength)


def _moods(texts: Any) -> tuple[str, str]:
    words = [word.strip(".,!?\"'").lower() for text in texts for word in text.split()]
    contrast = bundled.contrast()
    return (
        str(sum(word in contrast.joyful_words for word in words)),
        str(sum(word in contrast.gloomy_words for word in words)),
    )


def pause_and_serve(demo: Demo) -> None:
    """Pause A in the middle of a layer stack, serve B whole, resume A."""
    dj = demo.dj
    alone = []
    for text in (demo.prompt, demo.prompts[0][0]):
        with dj.session() as session:
            alone.append(session.generate(text, max_new_tokens=demo.new_tokens, output_logits=True).result())
    with dj.session() as a, dj.session() as b:
        run_a = a.generate(demo.prompt, max_new_tokens=demo.new_tokens, breakpoints=[demo.site], output_logits=True)
        for _ in range(3):
            stop = next(run_a)
        demo.say(f"A pauses at {stop.site}, position {stop.position}; B runs from start to end")
        result_b = b.generate(demo.prompts[0][0], max_new_tokens=demo.new_tokens, output_logits=True).result()
        result_a = run_a.result()
    for name, got, want in (("A", result_a, alone[0]), ("B", result_b, alone[1])):
        assert got.logits is not None and want.logits is not None
        demo.verdict(f"{name}: logits bit for bit as when it runs alone", same_bits(got.logits, want.logits))


def fork_and_part(demo: Demo) -> None:
    """Fork at one place and edit each fork differently."""
    dj = demo.dj
    with dj.session() as session:
        run = session.generate(demo.prompt, max_new_tokens=demo.new_tokens, breakpoints=[demo.site])
        stop = next(run)
        copies = stop.fork(3)
        for copy, factor in zip(copies, (1.0, 0.5, -1.0), strict=True):
            copy.value.mul_(factor)
        results = dj.results([run, *(copy.run for copy in copies)])
        tokens = [result.tokens.tolist() for result in results]
        demo.verdict("a fork left alone equals its parent", tokens[0] == tokens[1])
        for label, result, own in zip(("parent", "x 1.0", "x 0.5", "x -1.0"), results, tokens, strict=True):
            parts = next((i for i, (x, y) in enumerate(zip(own, tokens[0], strict=False)) if x != y), None)
            where = "same" if parts is None else f"parts at position {parts}"
            demo.tell(label, result.text, f"[{where}]")


def rewind_and_turn(demo: Demo) -> None:
    """Rewind into the past and go another way."""
    dj = demo.dj
    with dj.session() as session:
        run = session.generate(demo.prompt, max_new_tokens=demo.new_tokens)
        first = run.result()
        position = int(first.tokens.numel()) - demo.new_tokens // 2
        stop = run.rewind(position=position, site=demo.site)
        demo.say(f"rewound to position {stop.position}, {stop.site}: {len(stop.tokens)} tokens of history stand")
        again = run.result()
        demo.verdict("rewound and resumed untouched: the same future", torch.equal(first.tokens, again.tokens))
        run.rewind(position=position, site=demo.site).value.mul_(-1.0)
        demo.say("rewound again, and this time the activation is turned around once (value.mul_(-1))")
        other = run.result()
        for label, result in (("first", first), ("other way", other)):
            demo.tell(label, result.text)


def save_and_restore(demo: Demo) -> None:
    """Save a stopped session, restore it in a second process."""
    dj = demo.dj
    with tempfile.TemporaryDirectory() as folder, dj.session() as session:
        path = Path(folder) / "a.safetensors"
        run = session.generate(demo.prompt, max_new_tokens=demo.new_tokens, breakpoints=[demo.site])
        next(run), next(run)
        started = time.perf_counter()
        saved = session.checkpoint()
        dispatch = (time.perf_counter() - started) * 1e3
        saved.wait().save(path)
        demo.say(
            f"checkpoint() returned after {dispatch:.2f} ms; {nbytes(path.stat().st_size)} on disk; "
            "a second process restores it and goes on"
        )
        with _working(demo.console, "second process: load, compile, restore, resume"):
            answer = subprocess.run(
                [sys.executable, "-m", "djinn_fx.demo_child", str(path), demo.reference],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "DJINN_DEMO_THREADS": str(torch.get_num_threads())},
            )
        if answer.returncode:
            demo.say(f"[red]{answer.stderr.strip()[-600:]}[/red]")
        tokens = json.loads(answer.stdout.splitlines()[-1]) if answer.returncode == 0 else []
        demo.verdict("restored in another process: the same tokens", tokens == run.result().tokens.tolist())


SCENES: tuple[tuple[str, Callable[[Demo], None]], ...] = (
    ("Stop in the middle of a forward pass, look, edit, resume", stop_look_edit),
    ("Steer along a direction", steer),
    ("Pause A, serve B, resume A", pause_and_serve),
    ("Fork at one place, edit each fork", fork_and_part),
    ("Rewind and go another way", rewind_and_turn),
    ("Save, restore in a second process", save_and_restore),
)


def _summary(demo: Demo, seconds: float) -> None:
    table = Table("verdict", "what was checked", title=f"exactness ({seconds:.0f} s)", title_justify="left")
    for sentence, held in demo.verdicts:
        table.add_row("[green]exact[/green]" if held else "[bold red]NOT exact[/bold red]", sentence)
    demo.console.print(table)
