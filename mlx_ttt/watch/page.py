"""Builds the page: one HTML file that holds its style, its program and its data, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..network.model import Model
from .codes import encode
from .reading import Reading

PARTS = Path(__file__).parent / "parts"
SCRIPTS = ("values", "reading", "lines", "text", "inspector", "map", "charts", "passages", "live", "main")


@dataclass(frozen=True)
class Subject:
    """What a page is about: its title, and the model."""

    title: str
    kind: str
    layers: int
    heads: int
    mini_batch: int

    @classmethod
    def of(cls, title: str, model: Model) -> Subject:
        args = model.args
        return cls(title, args.kind, args.num_hidden_layers, args.num_attention_heads, args.mini_batch_size)

    @property
    def subtitle(self) -> str:
        return f"{self.kind}, {self.layers} layers of {self.heads} heads, mini-batches of {self.mini_batch} tokens"

    def facts(self) -> dict[str, Any]:
        return {"layers": self.layers, "heads": self.heads, "miniBatch": self.mini_batch}


def report(reading: Reading, subject: Subject) -> str:
    """The page of a text that has been read."""
    figures = reading.figures
    coded = {
        "surprisal": figures.surprisal,
        "write": figures.write_norm,
        "loss": figures.loss,
        "strongestNorm": figures.strongest_norm,
        "columns": reading.columns,
        "reset": reading.reset,
    }
    codes = {name: encode(values) for name, values in coded.items()}
    lengths = [_units(text) for text in reading.texts]
    arrays = {
        **{name: code for name, (code, _) in codes.items()},
        "strongest": figures.strongest.astype("<u2"),
        "lengths": np.array(lengths, "<u2"),
        "drift": reading.drift.astype("<f4"),
    }
    facts = {
        **subject.facts(),
        "text": "".join(reading.texts),
        "names": reading.names,
        "width": reading.width,
        "driftAt": reading.drift_at.tolist(),
        "resetEvery": reading.reset_every,
        "gain": _rounded(reading.gain),
        "gainHalfWidth": _rounded(reading.gain_half_width),
        "highs": {name: high for name, (_, high) in codes.items()},
    }
    blocks = [
        f'<script type="text/plain" data-array="{name}">{in_base64(array)}</script>' for name, array in arrays.items()
    ]
    return _page(subject, facts, blocks)


def live_page(subject: Subject, facts: dict[str, Any]) -> str:
    """The page that a server feeds with events."""
    return _page(subject, {**subject.facts(), **facts, "live": True}, [])


def in_base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _rounded(nats: float) -> float | None:
    """JSON has no NaN."""
    return round(nats, 4) if np.isfinite(nats) else None


def _units(text: str) -> int:
    """The length of a text as JavaScript counts it."""
    return len(text) + sum(character > "\uffff" for character in text)


def _page(subject: Subject, facts: dict[str, Any], blocks: list[str]) -> str:
    live = "live" in facts
    script = "\n".join((PARTS / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    panes = [(PARTS / "pane.html").read_text(encoding="utf-8").replace("{{side}}", side) for side in "AB"[: 1 + live]]
    filled = {
        # No network and no program but ours, whatever the text says: a second wall behind the escaping.
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        f"form-action 'none'; connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}",
        "title": html.escape(subject.title),
        "subtitle": html.escape(subject.subtitle),
        "mode": "live" if live else "report",
        "style": (PARTS / "style.css").read_text(encoding="utf-8"),
        "panes": "".join(panes),
        "prompt": (PARTS / "prompt.html").read_text(encoding="utf-8") if live else "",
        "data": "\n".join([f'<script type="application/json" id="about">{_json(facts)}</script>', *blocks]),
        "script": script,
    }
    template = (PARTS / "index.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda name: filled[name[1]], template)  # once: a text may hold {{script}}


def _json(facts: dict[str, Any]) -> str:
    """For a script element, which ends where a text says </script>."""
    return json.dumps(facts, ensure_ascii=False).replace("<", "\\u003c")
