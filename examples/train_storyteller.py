"""Train the bundled storyteller: a GPT-2 of 2.7 MB that tells joyful and gloomy stories.

Run it from the repository's root; it takes about 14 minutes of one core and downloads nothing:

    python examples/train_storyteller.py --out storyteller

It writes the model, its tokenizer and `contrast.json` (prompts and words of each mood), then
prints the held-out loss beside the grammar's own entropy, and how far the mood direction turns
the model's words at each layer.
"""

import itertools
import json
import math
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from examples import storyteller_grammar as grammar
else:  # a script finds its neighbours, not its own folder
    import storyteller_grammar as grammar

CONTEXT, STORY_ROWS, PACKED_ROWS = 256, 40, 16
PEAK_LR, WARMUP = 3e-3, 100
PIECE = r" ?[A-Za-z]+| ?[^\sA-Za-z]"
"""A token is a word or a mark together with the space before it, so that decoding is joining."""

console = Console()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows every word of the grammar.

    Words with a capital letter are also known without a space before them: as they stand at the
    start of a prompt, or after a quotation mark.
    """
    rng = random.Random("vocabulary")
    pieces = {piece for _ in range(20_000) for piece in re.findall(PIECE, grammar.story(rng))}
    pieces |= {piece.lstrip() for piece in pieces if piece.lstrip()[0].isupper()}
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<eos>", "<pad>", *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<eos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """An untrained GPT-2: 4 layers, 4 heads, width 128."""
    eos = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_inner=320,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.06,  # near 1 / sqrt(width): it learns far faster than from GPT-2's 0.02
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Tensor]:
    """Endless fresh batches [rows, tokens].

    Three batches in four have one story a row, padded: what came before a story tells nothing of
    it. The fourth has full rows of story after story, for the later positions. Half of the rows
    begin with <eos>, half with a story, as a prompt does; one row in eight begins inside a story,
    so that any sentence can open a prompt.
    """
    stories, cuts = random.Random(f"train {seed}"), random.Random(f"cuts {seed}")
    eos: int = tokenizer.eos_token_id
    pad: int = tokenizer.pad_token_id

    def row(length: int) -> Tensor:
        opening = grammar.story(stories)
        if cuts.random() < 1 / 8:
            sentences = opening.split(". ")
            opening = ". ".join(sentences[cuts.randrange(len(sentences)) :])
        ids = [*[eos] * cuts.randrange(2), *tokenizer.encode(opening), eos]
        while len(ids) < length:
            ids += [*tokenizer.encode(grammar.story(stories)), eos]
        return torch.tensor(ids[:CONTEXT])

    for step in itertools.count():
        rows, length = (PACKED_ROWS, CONTEXT) if step % 4 == 3 else (STORY_ROWS, 0)
        yield pad_sequence([row(length) for _ in range(rows)], batch_first=True, padding_value=pad)


def learning_rate(step: int, steps: int) -> float:
    """A linear warm-up, then a cosine down to nothing, as a share of the peak."""
    warm = min(1.0, (step + 1) / WARMUP)
    return warm * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def train(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, data: Iterator[Tensor], steps: int) -> None:
    """Minimise the next-token loss with AdamW."""
    eos: int = tokenizer.eos_token_id
    pad: int = tokenizer.pad_token_id
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: learning_rate(i, steps))
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)
        for _ in range(steps):
            tokens = next(data)
            inputs = tokens.masked_fill(tokens == pad, eos)  # behind the story, so nothing sees it
            logits = model(input_ids=inputs[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=pad)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, loss=float(loss.detach()))


@torch.no_grad()
def measure_loss(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, seed: str, stories: int = 1000
) -> tuple[float, float]:
    """The loss of <eos> STORY <eos> in nats per token, and the grammar's own entropy on it."""
    rng = random.Random(seed)
    loss = entropy = 0.0
    tokens = 0
    for _ in range(stories):
        text, nats = grammar.told(rng)
        ids = torch.tensor(tokenizer.encode(f"<eos>{text}<eos>"))
        logits = model(input_ids=ids[None, :-1]).logits[0]
        loss += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
        entropy += nats
        tokens += len(ids) - 1
    return loss / tokens, entropy / tokens


@torch.no_grad()
def mood_directions(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Each layer's mean difference, joyful minus gloomy, at the prompts' last position."""
    found: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, out: found.append(out[0, -1]))
        for block in model.transformer.h
    ]
    for pair in grammar.contrast():
        for prompt in pair:
            model(input_ids=torch.tensor([tokenizer.encode(prompt)]))
    for handle in handles:
        handle.remove()
    means = torch.stack(found).view(-1, 2, len(handles), found[0].shape[-1]).mean(0)
    return means[0] - means[1]


@contextmanager
def steered(model: GPT2LMHeadModel, layer: int, shift: Tensor) -> Iterator[None]:
    """Within the block, the layer's output is shifted at every position."""
    block = model.transformer.h[layer]
    handle = block.register_forward_hook(lambda _m, _i, out: out + shift)
    try:
        yield
    finally:
        handle.remove()


def continuations(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], **options: Any
) -> list[str]:
    """How the model goes on after each prompt."""
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    tokens = cast(Any, model).generate(**inputs, max_new_tokens=100, **options)
    start = inputs["input_ids"].shape[1]
    return tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)


def well_formed(text: str) -> float:
    """The share of the text's sentences that some pattern of the grammar can make."""
    slots: dict[str, list[str]] = {"time": [*grammar.TIMES], "kin": [*grammar.KIN]}
    slots["hero"] = [hero for heroes in grammar.HEROES.values() for hero in heroes]
    for pronouns in grammar.PRONOUNS.values():
        for slot, word in pronouns.items():
            slots.setdefault(slot, []).append(word)
    for lexicon in (*grammar.MOODS.values(), *grammar.TOPICS.values()):
        for slot, words in lexicon.items():
            slots.setdefault(slot, []).extend(words)
    slots["other"] = slots["place"]
    patterns = [*grammar.NEUTRAL_OPENINGS, *grammar.MOOD_OPENINGS, *grammar.ENDINGS]
    patterns += [pattern for stage in grammar.STAGES for pattern in stage]
    shapes = [
        re.sub(r"\\\[(\w+)\\\]", lambda slot: f"(?:{'|'.join(slots[slot[1]])})", shape)
        for shape in (re.escape(pattern) for pattern in patterns)
    ]
    sentence = re.compile("|".join(shapes).replace(r"\ ", " "), re.IGNORECASE)
    sentences = re.findall(r"[^.]+\.", re.sub(r"\b([Aa])n ", r"\1 ", text))
    return sum(bool(sentence.fullmatch(told.strip())) for told in sentences) / len(sentences)


def steering_table(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> Table:
    """What follows gloomy prompts, by layer and strength: how joyful, and how well formed."""
    strengths = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 2.5)
    directions = mood_directions(model, tokenizer)
    prompts = [gloomy for _, gloomy in grammar.contrast()]
    table = Table(
        title="after gloomy prompts, in percent: greedy joyful, well formed / sampled joyful, well formed",
        show_lines=True,
    )
    for heading in ("layer", *(f"{strength}" for strength in strengths)):
        table.add_column(heading, justify="right")
    for layer, direction in enumerate(directions):
        cells = []
        for strength in strengths:
            with steered(model, layer, strength * direction):
                greedy = continuations(model, tokenizer, prompts, do_sample=False)
                torch.manual_seed(0)
                sampled = continuations(model, tokenizer, prompts * 4, do_sample=True, top_k=0)
            texts = " ".join(greedy), " ".join(sampled)
            shares = [(100 * grammar.joyful_share(text), 100 * well_formed(text)) for text in texts]
            cells.append("\n".join(f"{joyful:.0f} {formed:.0f}" for joyful, formed in shares))
        table.add_row(str(layer), *cells)
    return table


def write(out: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Save the model, its tokenizer, and the prompts and words of each mood."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    lists = {
        "joyful": [joyful for joyful, _ in grammar.contrast()],
        "gloomy": [gloomy for _, gloomy in grammar.contrast()],
        "neutral": list(grammar.NEUTRAL),
        "joyful_words": sorted(grammar.joyful_words()),
        "gloomy_words": sorted(grammar.gloomy_words()),
    }
    (out / "contrast.json").write_text(json.dumps(lists, indent=2) + "\n", encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="The folder to write the model to.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 2200,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the stories.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train the storyteller, save it, and print how good and how steerable it is."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    start = time.monotonic()
    train(model, tokenizer, batches(tokenizer, seed), steps)
    minutes = (time.monotonic() - start) / 60
    model.eval()
    write(out, model, tokenizer)
    size = (out / "model.safetensors").stat().st_size
    console.print(f"{steps} steps in {minutes:.1f} minutes; {size:,} bytes of weights in {out}")
    for name in (f"train {seed}", "held out"):
        loss, entropy = measure_loss(model, tokenizer, name)
        console.print(f"{name}: loss {loss:.4f} nats per token, the grammar's entropy {entropy:.4f}")
    console.print(steering_table(model, tokenizer))


if __name__ == "__main__":
    typer.run(main)
