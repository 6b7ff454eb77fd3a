"""Tables of launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from .count import Count, Tokens
from .decoding import Case
from .gpus import GPUS
from .rules import RULES, SOURCES


def name(case: Case) -> str:
    """A case's model, weights and batch in words."""
    if case.config["model_type"] == "ttt":
        kind = {"linear": "TTT-Linear", "mlp": "TTT-MLP"}[case.config["ttt_layer_type"]]
        model = f"{kind}, {'Mamba' if case.config['pre_conv'] else 'Transformer'} backbone"
    else:
        model = f"mlx-lm's {case.config['model_type']}"
    return f"{model}, {f'{case.bits} bits' if case.bits else case.dtype}, batch {case.batch}"


class Result:
    """Counts of a case on all GPUs: while the token before is still running, and after it."""

    def __init__(self, case: Case):
        tokens = Tokens(case)
        self.counts: Mapping[str, Count] = {gpu.name: tokens.count(gpu) for gpu in GPUS}
        self.idle: Mapping[str, Count] = {gpu.name: tokens.count(gpu, running=0) for gpu in GPUS}

    @property
    def worst(self) -> int:
        return max(x.layer.total() for x in self.counts.values())


def detailed(title: str, result: Result) -> str:
    """The table of one case: launches of a layer and around the layers, by what they do."""
    lines = [f"{title}\n", _row(["", *result.counts]), _row(["---"] + ["--:"] * len(result.counts))]
    for heading, part in (("a layer", "layer"), ("embedding, last norm, head", "around")):
        counters: list[Counter[str]] = [getattr(x, part) for x in result.counts.values()]
        rows = list(dict.fromkeys(what for counter in counters for what in counter))
        lines += [_row([what, *(str(counter[what] or "") for counter in counters)]) for what in rows]
        lines.append(_row([f"**{heading}**", *(f"**{counter.total()}**" for counter in counters)]))
    idle = max(x.layer.total() for x in result.idle.values())
    lines += ["", f"launches a layer if the token before has run: {idle}", f"launches a layer: {result.worst}"]
    return "\n".join(lines)


def overview(results: Mapping[tuple[str, str], Result]) -> str:
    """One line for each case and kind of token."""
    head = ["", "token", *(gpu.name for gpu in GPUS), "worst", "around the layers"]
    lines = [_row(head), _row(["---", "---"] + ["--:"] * (len(head) - 2))]
    for (case, kind), result in results.items():
        layer = [str(x.layer.total()) for x in result.counts.values()]
        around = max(x.around.total() for x in result.counts.values())
        lines.append(_row([case, kind, *layer, f"**{result.worst}**", str(around)]))
    return "\n".join(lines)


def rules() -> str:
    """Where each rule was read."""
    places: dict[str, list[str]] = {}
    for operation, known in RULES.items():
        places.setdefault(known.place, []).append(operation)
    lines = [f"Rules of {SOURCES}\n", _row(["operations", "place"]), _row(["---", "---"])]
    return "\n".join(lines + [_row([", ".join(names), place]) for place, names in places.items()])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
