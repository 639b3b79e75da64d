"""What a record of ``interactivity`` shows."""

from __future__ import annotations

from collections.abc import Callable

from djinn_fx.benchmarks.interacting.legacy import ORIGINAL
from djinn_fx.benchmarks.record import Json, Record
from djinn_fx.benchmarks.tables import Picture, Table, figure, mebibytes, missing, number, share, yes


def tables(record: Record) -> list[Table]:
    """Every table; one of a part that has no figures says why."""
    makers: dict[str, Callable[[Record], list[Table]]] = {
        "breakpoints": _breakpoints,
        "checkpoints": _checkpoints,
        "overhead": _overhead,
        "steering": _steering,
        "concurrency": _concurrency,
        "residency": _residency,
        "scaling": _scaling,
        "comparison": _comparison,
    }
    found = [_summary(record)]
    for part, maker in makers.items():
        why = missing(record.results[part])
        found += [Table(part.capitalize(), ["why"], [[why]])] if why else maker(record)
    return found


def _range(cell: Json, unit: str = "ms") -> str:
    why = missing(cell)
    return why or f"{number(cell['median'])} {unit} ({number(cell['min'])}-{number(cell['max'])})"


def _summary(record: Record) -> Table:
    """The original's rows, its figures beside ours."""
    r = record.results
    rows: list[list[str]] = []

    def row(what: str, original: str, part: str, ours: Callable[[Json], str]) -> None:
        rows.append([what, original, missing(r[part]) or ours(r[part])])

    first = ORIGINAL["to_stop_ms"]
    row("token accuracy", "100 %", "breakpoints", lambda p: f"{100 * p['token_accuracy']:.4g} %")
    row("logits bit for bit", "not reported", "breakpoints", lambda p: yes(p["bitwise"]))
    row(
        "call to the stop, warm",
        f"{first[0]}-{first[1]} ms",
        "breakpoints",
        lambda p: "; ".join(f"layer {n}: {figure(c)} ms" for n, c in p["warm"].items()),
    )
    row(
        "first stop, compiling included",
        "37.5 s",
        "breakpoints",
        lambda p: f"{figure(p['first_with_compile_s'])} s (what other runs left in caches on disk was used)",
    )
    row("checkpoint, call returns", "0.0 ms (asynchronous)", "checkpoints", lambda p: _range(p["dispatch"]))
    row("checkpoint, safe in host memory", "not reported", "checkpoints", lambda p: _range(p["until_safe"]))
    row("activation back on the device", "1.33 ms (0.89-1.72)", "checkpoints", lambda p: _range(p["activation_back"]))
    row("whole session restored at its stop", "not reported", "checkpoints", lambda p: _range(p["restore"]))
    published = "0.19 % mean, 0.24 % max"
    row("overhead per token, nothing armed", published, "overhead", lambda p: _overhead_cell(p, "nothing armed"))
    row("... the same graph again (control)", "not reported", "overhead", lambda p: _overhead_cell(p, "bare again"))
    row("... watched at every layer", "not reported", "overhead", lambda p: _overhead_cell(p, "watched at every layer"))
    row("tokens changed, one layer x 0.9", "2 of 512", "steering", lambda p: f"{p['tokens_changed']} of {p['tokens']}")
    row("a second request during the pause", "374 ms", "concurrency", lambda p: _range(p["b"]["during"]))
    note = "The original system's own published figures were taken on an H100; compare the last column within itself."
    return Table("The experiment at a glance", ["what", "original system (H100)", "djinn_fx, this run"], rows, note)


def _overhead_cell(part: Json, arm: str) -> str:
    why = missing(part["decode"])
    if why:
        return why
    ratio = part["decode"][arm]["against_bare"]
    return f"{share(ratio['overhead'])} ({share(ratio['low'])} to {share(ratio['high'])})"


def _breakpoints(record: Record) -> list[Table]:
    part = record.results["breakpoints"]
    heads = ["layer", "trial", "token accuracy", "logits bit for bit", "to the stop, ms", "resume, ms"]
    rows = [
        [
            str(t["layer"]),
            str(t["trial"] + 1),
            f"{100 * t['token_accuracy']:.4g} %",
            yes(t["bitwise"]),
            figure(t.get("to_stop_ms")),
            figure(t.get("resume_ms")),
        ]
        for t in part["trials"]
    ]
    exact = sum(t["bitwise"] for t in part["every_layer"])
    note = f"At every layer: {exact} of {len(part['every_layer'])} bit for bit."
    found = [Table("Breakpoints, trial by trial", heads, rows, note)]
    resumes = part["resume_decode"]
    why = missing(resumes)
    kinds = _by_kind(resumes) if why is None else [("a step, untouched, edited", resumes)]
    body = [[name, why or _range(times)] for name, times in kinds]
    text = (
        "From advancing a stopped run to its token being committed. A stopped step has run to its end: untouched, only "
        "that is left; edited, it runs again"
    )
    if "edited_first" in resumes:
        text += (
            ", from its layer on once there is a graph of that part. `the first times` are those before, of all these "
            "layers: they run all of it."
        )
    elif record.environment.get("device") == "cpu":
        text += ", all of it where nothing is compiled."
    else:
        text += "."
    return [*found, Table("Resuming while decoding", ["what", "median (min-max)"], body, text)]


def _by_kind(resumes: Json) -> list[tuple[str, Json]]:
    """What was timed, and its times."""
    kinds = {"step": "a step", "untouched": "untouched", "edited": "edited", "edited_first": "edited, the first times"}
    found = []
    for key, name in kinds.items():
        part = resumes.get(key, {})
        if "median" in part:
            found.append((name, part))
        else:
            found += [(f"{name} at layer {layer}", times) for layer, times in part.items()]
    return found


def _checkpoints(record: Record) -> list[Table]:
    part = record.results["checkpoints"]
    heads = ["layer", "trial", "MiB", "bit for bit", "call returns, ms", "safe, ms", "restored, ms"]
    rows = [
        [
            str(t["layer"]),
            str(t["trial"] + 1),
            number(t["bytes"] / 2**20),
            yes(t["bitwise"]),
            *(figure(t.get(f"{key}_ms")) for key in ("dispatch", "safe", "restore")),
        ]
        for t in part["trials"]
    ]
    body = [
        [
            what,
            *(
                [missing(part[key])] * 5
                if missing(part[key])
                else [figure(part[key], k) for k in ("median", "mean", "min", "max", "std")]
            ),
        ]
        for key, what in (
            ("dispatch", "checkpoint: the call returns"),
            ("dispatch_untouched", "the same, where nobody asked for the value"),
            ("until_safe", "checkpoint: safe in host memory"),
            ("restore", "session restored, standing at its stop"),
            ("activation_back", f"activation alone to the device ({mebibytes(part['activation_bytes'])})"),
        )
        if key in part  # older records have fewer
    ]
    note = "Restoring a session runs the interrupted step up to its site again and compares bits; milliseconds."
    return [
        Table("Checkpoints, trial by trial", heads, rows),
        Table(
            "Checkpoints", ["what", "median", "mean", "min", "max", "std"], [[str(c) for c in r] for r in body], note
        ),
    ]


def _overhead(record: Record) -> list[Table]:
    part = record.results["overhead"]
    found = []
    for phase, title in (("decode", "Overhead while decoding, per token"), ("prompt", "Overhead of a prompt")):
        arms = part[phase]
        why = missing(arms)
        if why:
            found.append(Table(title, ["why"], [[why]]))
            continue
        rows = []
        for name, arm in arms.items():
            if name == "resolution":
                continue
            ratio, groups = arm["against_bare"], arm["by_rounds"]
            interval = f"{share(ratio['low'])} to {share(ratio['high'])}"
            extremes = [share(groups[key]) for key in ("mean", "max")]
            rows.append([name, figure(arm), share(ratio["overhead"]), interval, *extremes, share(groups["std"])])
        resolution = arms["resolution"]
        told = "can" if resolution["tells_limit"] else "can **not**"
        note = (
            f"Against the same graph compiled without any site, {arms['bare']['count']} rounds in turns; 95 % "
            "moving-block bootstrap interval of the ratio of medians. `bare again` is the control: what its interval "
            f"spans is noise (half-width {100 * resolution['half_width']:.2f} %), so 0.24 % {told} be told from noise "
            "here."
        )
        heads = ["arm", "ms", "overhead", "95 % interval", "mean of groups", "max", "std"]
        found.append(Table(title, heads, rows, note))
    return found


def _steering(record: Record) -> list[Table]:
    part = record.results["steering"]
    hooks = part["hooks"]
    cost = part["cost"]
    rows = [
        ["tokens changed", f"{part['tokens_changed']} of {part['tokens']}"],
        ["logits moved by", missing(part["logits_moved"]) or f"{100 * part['logits_moved']:.3g} %"],
        ["the same bits each time", yes(part["repeatable"])],
        ["tokens changed by the same forward hook, eager", f"{hooks['tokens_changed']} of {part['tokens']}"],
        ["tokens that differ from the hook's", f"{hooks['tokens_that_differ']} ({hooks['beyond_ties']} beyond ties)"],
        ["... without steering", str(hooks["tokens_that_differ_unsteered"])],
        ["plain forward", missing(cost) or _range(cost["plain"])],
        ["steered forward", missing(cost) or _range(cost["steered"])],
        ["cost", missing(cost) or share(cost["against_plain"]["overhead"])],
    ]
    title = f"Steering: layer {part['layer']} x {part['factor']}"
    note = "Most likely tokens of one forward pass; logits by root mean square."
    return [Table(title, ["what", "figure"], rows, note)]


def _concurrency(record: Record) -> list[Table]:
    part = record.results["concurrency"]
    memory = part["memory_bytes"]

    def difference(name: str) -> str:
        ratio = part.get(name)
        return "-" if ratio is None else f"{share(ratio['overhead'])} ({share(ratio['low'])} to {share(ratio['high'])})"

    rows = [
        ["both exact", yes(part["exact"])],
        ["B alone", _range(part["b"]["alone"])],
        ["B during A's pause", _range(part["b"]["during"])],
        ["difference", difference("during_against_alone")],
    ]
    if "after" in part["b"]:  # records from before there was this control
        rows += [
            ["B after A was stopped there and closed (control)", _range(part["b"]["after"])],
            ["during the pause, over the control", difference("during_against_after")],
        ]
    rows += [
        *(
            [f"memory, {key.replace('_', ' ')}", mebibytes(memory[key])]
            for key in ("before", "a_paused", "b_done", "after")
        ),
        ["the activation that A holds", mebibytes(memory["activation"])],
    ]
    note = f"A stands in the middle of its forward pass while B runs whole. Memory: {memory['counted']}."
    return [Table("A second request during the pause", ["what", "figure"], rows, note)]


def _residency(record: Record) -> list[Table]:
    part = record.results["residency"]
    rows = [
        [row["act"], f"{row['DtoH']:,}", f"{row['HtoD']:,}", str(row["copies"]), f"{row['kv_bytes']:,}"]
        for row in part["rows"]
    ]
    note = (
        f"Counted by the profiler. Pausing and resuming added {part['added_bytes'][0]:,} and "
        f"{part['added_bytes'][1]:,} bytes; moving the KV out and back would have taken "
        f"{2 * part['kv_bytes']:,} each time."
    )
    heads = ["act", "device to host, bytes", "host to device, bytes", "copies", "KV, bytes"]
    return [Table("Residency: bytes that crossed the bus", heads, rows, note)]


def _scaling(record: Record) -> list[Table]:
    part = record.results["scaling"]
    layers = [[str(row["layer"]), figure(row), figure(row, "p95")] for row in part["by_layer"]]
    memory = [[name.replace("_", " "), mebibytes(nbytes)] for name, nbytes in part["memory"].items()]
    lengths = [
        [str(row["tokens"]), mebibytes(row["bytes"]), figure(row["dispatch_ms"]), figure(row["safe_ms"])]
        for row in part["by_length"]
    ]
    return [
        Table("Call to the stop, by layer", ["layer", "median, ms", "p95, ms"], layers),
        Table("Memory by component", ["component", "size"], memory, "One session at a stop, one checkpoint of it."),
        Table("Checkpoints by length", ["tokens", "bytes", "call returns, ms", "safe, ms"], lengths),
    ]


def _comparison(record: Record) -> list[Table]:
    part = record.results["comparison"]
    rows = []
    for name, entry in part["systems"].items():
        why = missing(entry)
        if why:
            rows.append([name, *(["-"] * len(part["works"])), why])
            continue
        pauses = "yes" if entry["pauses"] else f"no: {entry['why_not']}"
        rows.append([name, *(figure(entry[key]) for key in part["works"]), pauses])
    heads = ["system", *(f"{work}, ms" for work in part["works"].values()), "another request during a pause"]
    note = "One forward pass of the same prompt over the same weights, answers checked; medians."
    return [Table("The same forward pass by other systems", heads, rows, note)]


def pictures(record: Record) -> list[Picture]:
    """Latency by layer, and overhead."""
    found = []
    scaling, overheads = record.results["scaling"], record.results["overhead"]
    if not missing(scaling):
        points: list[tuple[float | str, float]] = [
            (row["layer"], row["median"]) for row in scaling["by_layer"] if not missing(row)
        ]
        sizes: list[tuple[float | str, float]] = [(r["tokens"], r["bytes"] / 2**20) for r in scaling["by_length"]]
        if points:
            title = "Call to the stop, by layer"
            found.append(Picture("latency_by_layer", title, "lines", {"djinn_fx": points}, "layer", "ms"))
        found.append(
            Picture("checkpoint_bytes", "Checkpoint by length", "lines", {"djinn_fx": sizes}, "tokens", "MiB", "xy")
        )
    if not missing(overheads) and not missing(overheads["decode"]):
        bars: list[tuple[float | str, float]] = [
            (name, 100 * arm["against_bare"]["overhead"])
            for name, arm in overheads["decode"].items()
            if name not in ("resolution", "bare")
        ]
        ratios = {str(name): overheads["decode"][name]["against_bare"] for name, _ in bars}
        found.append(
            Picture(
                "overhead",
                "Overhead per decoded token",
                "bars",
                {"djinn_fx": bars},
                "% over the same graph without sites; lines: 95 % intervals",
                floor={"0.24 %, the original's most": 0.24},
                spans={name: (100 * ratio["low"], 100 * ratio["high"]) for name, ratio in ratios.items()},
            )
        )
    return found
