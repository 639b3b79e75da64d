"""Harvest activations over a text file into sharded safetensors; a harvest that was killed goes on where it stood.

    python examples/harvest.py story.txt --out activations --sites resid_post.1 --sites mlp_out.2

Each line of the file is a text of its own, cut into windows. A shard holds every site as ``[tokens, *feature_shape]``
beside ``token``, ``line`` (of the file) and ``position`` (in its window), pads left out; ``index.json`` names the
shards. Killed at any time and started again with the same arguments, it gives the same files, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file

import djinn_fx as djinn
from djinn_fx import bundled

Item = TypeVar("Item")

FORMAT = "djinn_fx harvest 1"
INDEX = "index.json"

#: Bytes of the text in which words that the model does not know are looked for.
LOOKED_AT = 1 << 16

#: Folder of files that are being written: a kill leaves what it likes there, and nothing elsewhere.
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Plan:
    """What to harvest, and how; a harvest goes on only with the plan it began with.

    Attributes:
        sites: names, roles and globs.
        length: most tokens of a window.
        rows: windows of a batch.
        batches: batches of a shard.
        skip: positions at the start of each window that are left out.
        dtype: of what is written, such as ``"float16"``; None keeps the model's.
    """

    sites: tuple[str, ...] = ("resid_post",)
    length: int = 256
    rows: int = 16
    batches: int = 8
    skip: int = 0
    dtype: str | None = None


@dataclass(frozen=True)
class Window:
    """Tokens of one line of the text; ``end`` is the byte after that line."""

    line: int
    tokens: tuple[int, ...]
    end: int


def windows(text: Path, tokenizer: Any, length: int) -> Iterator[Window]:
    """The text's windows in the order of the file; empty lines give none."""
    end = 0
    with text.open("rb") as file:
        for line, raw in enumerate(file):
            end += len(raw)
            try:
                words = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{text}, line {line + 1}: no UTF-8 at byte {error.start} of it.") from error
            tokens = tokenizer(words, verbose=False)["input_ids"] if words else []
            for start in range(0, len(tokens), length):
                yield Window(line, tuple(tokens[start : start + length]), end)


def activations(dj: djinn.Dj, batch: tuple[Window, ...], plan: Plan) -> dict[str, torch.Tensor]:
    """The sites' values of a batch on the device, pads and skipped positions left out: ``[tokens, *feature_shape]``."""
    sites = dj.sites.select(plan.sites)
    dtype = getattr(torch, plan.dtype) if plan.dtype else None
    rows = [list(window.tokens) for window in batch]
    # Nothing behind the last wanted site is computed.
    _, cache = dj.run_with_cache(rows, plan.sites, stop_after=sites[-1].name, logits=False, dtype=dtype)
    lengths = torch.tensor([len(row) for row in rows])
    places = torch.arange(int(lengths.max())).expand(len(rows), -1)
    kept = (places < lengths[:, None]) & (places >= plan.skip)
    whole, chosen = bool(kept.all()), kept.flatten().nonzero().flatten()  # no waiting for the device
    found = {}
    for site in sites:
        value = cache[site.name].flatten(0, 1)
        found[site.name] = value if whole else value[chosen.to(value.device, non_blocking=True)]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int32) for row in rows], batch_first=True)
    lines = torch.tensor([window.line for window in batch])[:, None].expand_as(places)
    return {**found, "token": tokens[kept], "line": lines[kept], "position": places[kept].int()}


class Background:
    """Brings batches to the host and writes shards beside the model's work, each in order on a thread of its own.

    The next batch waits for the last one's copy and the next shard for the last one's file, so that none pile up.
    """

    def __init__(self) -> None:
        self._copies, self._files = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._copied: Future[Any] | None = None
        self._written: Future[Any] | None = None
        self._stream: torch.cuda.Stream | None = None

    def fetch(self, values: dict[str, torch.Tensor]) -> Future[dict[str, torch.Tensor]]:
        """Begin to copy a batch to the host."""
        if self._copied is not None:
            self._copied.result()
        device, ready = next(iter(values.values())).device, None
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            ready = torch.cuda.current_stream(device).record_event()
        self._copied = found = self._copies.submit(_to_host, values, ready, self._stream)
        return found

    def write(self, shard: Callable[[], object]) -> None:
        """Begin to write a shard."""
        if self._written is not None:
            self._written.result()  # what failed there is said here
        self._written = self._files.submit(shard)

    def close(self) -> None:
        """Wait for what was begun."""
        self._copies.shutdown()
        self._files.shutdown()

    def finish(self) -> None:
        """See that the last shard was written."""
        if self._written is not None:
            self._written.result()


def _to_host(
    values: dict[str, torch.Tensor], ready: torch.cuda.Event | None, stream: torch.cuda.Stream | None
) -> dict[str, torch.Tensor]:
    """Values on the host, once they are computed."""
    if ready is None or stream is None:
        return values
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        pinned = {name: _pinned_like(value).copy_(value, non_blocking=True) for name, value in values.items()}
    stream.synchronize()
    return {name: value.clone() for name, value in pinned.items()}  # torch keeps pinned memory for the next batch


def _pinned_like(value: torch.Tensor) -> torch.Tensor:
    """Pinned memory: the bus fills it many times faster than fresh pages, and holds nobody up."""
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True)


def harvest(
    dj: djinn.Dj,
    tokenizer: Any,
    text: Path,
    out: Path,
    plan: Plan,
    *,
    model: str = "",
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Harvest a text file into a folder; goes on behind the shards that are already there.

    Args:
        dj: a compiled model whose ``max_length`` is the plan's ``length`` at least.
        tokenizer: gives ``input_ids``.
        text: a file of UTF-8, a text per line.
        out: the folder; made if there is none.
        plan: what and how.
        model: the model's name, for the index.
        progress: told how many bytes of the text are done.

    Returns:
        the index, as ``index.json`` has it.

    Raises:
        ValueError: the folder holds the harvest of another model (by its name), text or plan, or its index is damaged;
            or the text is no UTF-8.
    """
    out.mkdir(parents=True, exist_ok=True)
    index = _begin(out, {"format": FORMAT, "model": model, "text": _digest(text), "plan": asdict(plan)})
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # what a kill left
    done = index["shards"]
    groups = _grouped(_grouped(windows(text, tokenizer, plan.length), plan.rows), plan.batches)
    if done:
        progress(done[-1]["end"])
    background = Background()
    try:
        for group in islice(groups, len(done), None):
            parts = []
            for batch in group:
                parts.append(background.fetch(activations(dj, batch, plan)))
                progress(batch[-1].end)
            background.write(partial(_write_shard, out, index, parts, group[-1][-1].end))
        background.finish()
    finally:
        background.close()
    index |= {"tokens": sum(shard["tokens"] for shard in done), "complete": True}
    _write_index(out, index)
    (out / UNFINISHED).rmdir()
    return index


def _write_shard(out: Path, index: dict[str, Any], parts: list[Future[dict[str, torch.Tensor]]], end: int) -> None:
    """Write the next shard and then the index that names it."""
    batches = [part.result() for part in parts]
    shard = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    name = f"harvest-{len(index['shards']):05d}.safetensors"
    _whole(out / name, partial(save_file, shard))
    index["shards"].append({"file": name, "tokens": len(shard["token"]), "end": end})
    _write_index(out, index)


def load(out: Path, name: str) -> Iterator[torch.Tensor]:
    """A site of a harvest (or ``"token"``, ``"line"``, ``"position"``), a shard at a time."""
    for shard in json.loads((out / INDEX).read_text(encoding="utf-8"))["shards"]:
        with safe_open(out / shard["file"], "pt") as file:
            yield file.get_tensor(name)


def _grouped(items: Iterable[Item], count: int) -> Iterator[tuple[Item, ...]]:
    """So many items at a time; the last group may be smaller."""
    rest = iter(items)
    while group := tuple(islice(rest, count)):
        yield group


def _begin(out: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The index of a harvest that was begun, or a new one.

    Raises:
        ValueError: it belongs to another one, or is damaged.
    """
    head = json.loads(json.dumps(head))
    if not (out / INDEX).exists():
        return {**head, "shards": [], "complete": False}
    try:
        index: dict[str, Any] = json.loads((out / INDEX).read_text(encoding="utf-8"))
        whole = [(out / shard["file"]).exists() for shard in index["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out / INDEX} is damaged; choose another folder, or empty this one.") from error
    other = [key for key, value in head.items() if index.get(key) != value]
    if other:
        raise ValueError(f"{out} holds a harvest with another {', '.join(other)}; choose another folder.")
    index["shards"] = index["shards"][: whole.index(False) if False in whole else None]
    return index


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_index(out: Path, index: dict[str, Any]) -> None:
    _whole(out / INDEX, lambda path: path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8"))


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is there whole or not at all, whenever this process ends."""
    part = path.parent / UNFINISHED / path.name
    part.parent.mkdir(exist_ok=True)
    write(part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def main(
    text: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="UTF-8, a text per line.")],
    out: Annotated[Path, typer.Option(help="Folder of the shards and their index.")] = Path("harvest"),
    model: Annotated[str, typer.Option(help="Path or hub id; default: the bundled storyteller.")] = "",
    sites: Annotated[list[str] | None, typer.Option(help="Sites, roles and globs; default: resid_post.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Most tokens of a window.")] = Plan.length,
    rows: Annotated[int, typer.Option(min=1, help="Windows of a batch.")] = Plan.rows,
    batches: Annotated[int, typer.Option(min=1, help="Batches of a shard.")] = Plan.batches,
    skip: Annotated[int, typer.Option(min=0, help="Positions left out at the start of each window.")] = Plan.skip,
    dtype: Annotated[str | None, typer.Option(help="Of what is written; default: the model's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: CUDA where there is one.")] = "",
) -> None:
    """Harvest activations over a text file; started again after a kill it goes on."""
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise typer.BadParameter(f"{dtype!r} is no dtype of torch, such as float16.")
    console = Console(stderr=True)
    try:
        network, tokenizer = bundled.load(model or bundled.NAME)
    except djinn.DjinnError as error:
        raise typer.BadParameter(str(error)) from error
    with text.open("rb") as file:
        words = file.read(LOOKED_AT).decode("utf-8", "ignore").split()
    unknown = bundled.unknown_words(tokenizer, " ".join(words))
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        some = ", ".join(map(repr, unknown[:8]))
        console.print(f"note: the model does not know {some}{more}, and reads its unknown token instead", markup=False)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"no device {device!r} here: {str(error).splitlines()[0]}.") from error
    network.to(device)
    # One session's KV is kept, as this opens none; a window is one chunk.
    dj = djinn.compile(network, tokenizer=tokenizer, max_sessions=1, max_length=length, prefill_chunk=length)
    plan = Plan(tuple(sites or Plan.sites), length, rows, batches, skip, dtype)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console
    )
    try:
        with bar:
            task = bar.add_task(text.name, total=text.stat().st_size)
            index = harvest(
                dj, tokenizer, text, out, plan, model=model, progress=lambda end: bar.update(task, completed=end)
            )
    except (djinn.DjinnError, ValueError, OSError) as error:
        console.print(f"{type(error).__name__}: {error}", style="bold red", markup=False)
        raise typer.Exit(2) from error
    print(f"{index['tokens']} tokens in {len(index['shards'])} shards in {out}")


if __name__ == "__main__":
    typer.run(main)
