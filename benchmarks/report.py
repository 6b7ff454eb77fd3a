"""Results as text: medians, how far they are from the machine's limits, and ratios with their spread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

from .models import OURS, prefill_flops

Answers = list[dict]  # of a worker, one for each round
Lengths = dict[str, Answers]  # by number of tokens


def text(results: dict) -> str:
    """All of it, in Markdown."""
    parts = head(results["machine"])
    if "torch" in results:
        parts += beside_torch(results["torch"])
    for comparison in results["comparisons"]:
        parts += of_comparison(comparison)
    if "startup" in results:
        rows = [[name, f"{median(s):.2f}", f"{min(s):.2f}…{max(s):.2f}"] for name, s in results["startup"].items()]
        parts += ["## Start-up", table(["process, to its end", "seconds", "from…to"], rows)]
    return "\n\n".join([*parts, f"Measured in {results['seconds'] / 60:.0f} minutes."]) + "\n"


def head(machine: dict) -> list[str]:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("mlx", "mlx-lm", "numpy", "python"))
    items = [
        f"{machine['device']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB",
        f"{machine['system']}",
        f"{machine['threads']} threads; BLAS: {machine['blas']}",
        f"compiler for `mx.compile`: {machine['compiler']}",
        f"{versions}; mlx_ttt {machine['commit'] or 'outside a repository'}",
    ]
    return ["# Benchmarks", bullets(items)]


def of_comparison(result: dict) -> list[str]:
    parts = [f"## {result['title']}", limits_line(result), bullets(result["skipped"]), sizes(result)]
    if result["read"]:
        parts += [
            "### Prefill by prompt length: tokens/s (times the limit)",
            by_length(result["read"], lambda name, n, answers: prefill_cell(result, name, n, answers)),
            *ratios(result, "read", "Prefill"),
            "### Time to first token by prompt length: seconds",
            by_length(result["read"], lambda name, n, answers: f"{median(seconds(answers)):.2f}"),
        ]
    if result["decode"]:
        parts += [
            "### Decode by context length: tokens/s (times the limit)",
            by_length(result["decode"], lambda name, n, answers: decode_cell(result, name, answers)),
            *ratios(result, "decode", "Decode"),
            long_to_short(result),
        ]
    memory = result["read"] or result["decode"]
    if memory:
        parts += [
            f"### Peak memory while {'reading' if result['read'] else 'writing'}, by context length: MLX's arrays, MB",
            by_length(memory, lambda name, n, answers: f"{peak_bytes(answers) / 1e6:,.0f}"),
            "### State by context length: MB",
            by_length(result["decode"] or memory, lambda name, n, answers: f"{answers[0]['state_bytes'] / 1e6:,.1f}"),
        ]
    return [part for part in parts if part]


def limits_line(result: dict) -> str:
    if not result["limits"]:
        return ""
    bandwidth, rate = (
        "…".join(f"{choose(m[key] for m in result['limits']) / 1e9:.0f}" for choose in (min, max))
        for key in ("bytes_per_second", "flops_per_second")
    )
    return (
        f"Limits, measured after each of the following: memory is read at {bandwidth} GB/s, "
        f"matrices are multiplied at {rate} GFLOP/s."
    )


def times_the_limit(answers: Answers, key: str, amount: float) -> str:
    """How long it took, beside what the machine could do right after it: the median of the rounds."""
    return f"({median(a['seconds'] * a['limits'][key] / amount for a in answers):.2f})"


def sizes(result: dict) -> str:
    first = next(iter(result["models"].values()))["parameters"]
    rows = [
        [
            name,
            f"{m['parameters'] / 1e6:,.1f} M",
            f"{100 * (m['parameters'] / first - 1):+.1f} %",
            f"{m['config']['num_hidden_layers']}",
            f"{m['weight_bytes'] / 1e6:,.0f}",
        ]
        for name, m in result["models"].items()
    ]
    return table(["", "parameters", "of the first", "layers", "weights, MB"], rows)


def prefill_cell(result: dict, name: str, tokens: int, answers: Answers) -> str:
    flops = prefill_flops(result["models"][name]["config"], tokens)
    return f"{tokens / median(seconds(answers)):,.0f} {times_the_limit(answers, 'flops_per_second', flops)}"


def decode_cell(result: dict, name: str, answers: Answers) -> str:
    """The limit is to read the weights and the state once for each token."""
    tokens = answers[0]["tokens"]
    nbytes = tokens * (result["models"][name]["weight_bytes"] + answers[0]["state_bytes"])
    return f"{tokens / median(seconds(answers)):,.1f} {times_the_limit(answers, 'bytes_per_second', nbytes)}"


def ratios(result: dict, what: str, title: str) -> list[str]:
    """How many times as fast each of ours is as each of the others."""
    measured = result[what]
    parts = []
    for ours in [name for name in measured if name in OURS]:
        others = {name: lengths for name, lengths in measured.items() if name not in OURS}
        if others:
            cells = by_length(others, lambda _, n, theirs, mine=measured[ours]: faster(mine.get(str(n)), theirs))
            parts += [f"### {title}: {ours}, times as fast as", cells]
    return parts


def faster(ours: Answers | None, theirs: Answers) -> str:
    return ratio(seconds(theirs), seconds(ours)) if ours else ""


def long_to_short(result: dict) -> str:
    """Speed after the longest context over speed after the shortest."""
    rows = []
    for name, lengths in result["decode"].items():
        short, long = (choose(lengths, key=int) for choose in (min, max))
        if short != long:
            value = ratio(seconds(lengths[short]), seconds(lengths[long]))
            rows.append([name, f"{thousands(int(long))} : {thousands(int(short))}", value])
    return table(["decode after long : short", "tokens", "ratio"], rows) if rows else ""


def beside_torch(result: dict) -> list[str]:
    """Ours beside a PyTorch implementation of the same models."""
    about = result["torch"]
    checks = "; ".join(
        f"{name}: {'the same' if c['same_tokens'] else 'NOT THE SAME'} greedy tokens, log-probabilities "
        f"within {c['largest_difference']:.0e}"
        for name, c in about["checks"].items()
    )
    rows = [row for name in OURS for row in torch_rows(name, result["read"], result["decode"])]
    parts = [
        f"## {result['title']}",
        f"{about['file']}, torch {about['torch']}, {about['threads']} threads. A small checkpoint in both: {checks}.",
        limits_line(result),
        bullets(result["skipped"]),
        table(["", "", "ours", "PyTorch", "ratio"], rows) if rows else "",
    ]
    return [part for part in parts if part]


def torch_rows(name: str, read: dict[str, Lengths], decode: dict[str, Lengths]) -> list[list[str]]:
    """As many as were measured in both."""
    rows = []
    for n in read.get(name, {}).keys() & read.get(f"PyTorch {name}", {}).keys():
        ours, theirs = read[name][n], read[f"PyTorch {name}"][n]
        rows += [
            [name, f"prefill of {n}, tokens/s", *speeds(int(n), seconds(ours), seconds(theirs))],
            [
                name,
                "… their logits of all positions",
                *speeds(int(n), seconds(ours), seconds(theirs, "seconds_all_logits")),
            ],
            [name, "largest resident memory, MB", *megabytes(ours, theirs, "resident_bytes")],
            [name, "… their logits of all positions", *megabytes(ours, theirs, "resident_bytes_all_logits")],
        ]
    for n in decode.get(name, {}).keys() & decode.get(f"PyTorch {name}", {}).keys():
        ours, theirs = decode[name][n], decode[f"PyTorch {name}"][n]
        rows.append([name, "decode, tokens/s", *speeds(ours[0]["tokens"], seconds(ours), seconds(theirs))])
    return rows


def speeds(tokens: int, ours: list[float], theirs: list[float]) -> list[str]:
    return [f"{tokens / median(ours):,.1f}", f"{tokens / median(theirs):,.1f}", ratio(theirs, ours)]


def megabytes(ours: Answers, theirs: Answers, their_key: str) -> list[str]:
    a, b = ours[0]["resident_bytes"], theirs[0][their_key]
    return [f"{a / 1e6:,.0f}", f"{b / 1e6:,.0f}", f"{a / b:.2f}"]


def seconds(answers: Answers, key: str = "seconds") -> list[float]:
    return [answer[key] for answer in answers]


def peak_bytes(answers: Answers) -> float:
    return median(answer["peak_bytes"] for answer in answers)


def ratio(above: list[float], below: list[float]) -> str:
    """Of two things measured in the same rounds: the median of the rounds' ratios, and the least and the largest."""
    values = [a / b for a, b in zip(above, below, strict=False)]
    return f"{median(values):.2f}" + (f" ({min(values):.2f}…{max(values):.2f})" if len(values) > 1 else "")


def by_length(rows: dict[str, Lengths], cell: Callable[[str, int, Answers], str]) -> str:
    """A table with a column for each number of tokens."""
    lengths = sorted({int(n) for cells in rows.values() for n in cells})
    lines = [
        [name, *(cell(name, n, cells[str(n)]) if str(n) in cells else "" for n in lengths)]
        for name, cells in rows.items()
    ]
    return table(["tokens", *map(thousands, lengths)], lines)


def thousands(n: int) -> str:
    return f"{n:,}".replace(",", " ")


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown, aligned so that it reads as it is: names to the left, numbers to the right."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (head, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
