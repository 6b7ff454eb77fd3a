"""What the tests of the Swift code compare with: `python -m tests.export.swift_fixtures` writes it.

It is small and lies in the repository, so that `swift test` needs no Python.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import mlx_ttt
from mlx_ttt.checkpoint.tokenizer import write_tokenizer
from mlx_ttt.export.coreai.state import groups, together, unpacked
from mlx_ttt.export.layout import StateLayout
from mlx_ttt.export.verify import observed, uneven_scale
from mlx_ttt.loading import load_model
from mlx_ttt.model import Model, ModelArgs
from mlx_ttt.network.cache import TTTCache
from mlx_ttt.text.state import fingerprint

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "swift" / "Tests" / "Fixtures"
MLP = ROOT / "tests" / "data" / "golden" / "mlp-mamba"
PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks? It is the east, and Juliet is the naïve 🙂 sun."
POSITIONS = (0, 5, 15, 16, 17, 31, 32, 40)


def main(out: Path = FIXTURES) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_packages(out)
    write_bundles(out)
    write_continuations(out)
    write_learning(out)
    write_layouts(out)
    write_small_model(out / "small")
    write_samplers(out)
    write_templates(out)


# ------------------------------------------------------------------------------------------------- packages


def write_packages(out: Path) -> None:
    """Exported packages without their programs and weights: what they say of themselves."""
    from mlx_ttt.export.mil.package import Options, export

    with tempfile.TemporaryDirectory() as folder:
        for name, model, options in (
            ("linear", mlx_ttt.bundled_model(), Options(prefill_tokens=32)),
            ("linear-io", mlx_ttt.bundled_model(), Options(state_mode="io")),
            ("mlp", MLP, Options()),
            ("linear-learning", mlx_ttt.bundled_model(), Options(prefill_tokens=32, learning=True, signals=True)),
            ("linear-io-learning", mlx_ttt.bundled_model(), Options(state_mode="io", learning=True, signals=True)),
            ("mlp-learning", MLP, Options(learning=True, signals=True)),
        ):
            package = Path(folder) / f"{name}.mlpackage"
            export(model, package, options=options, companions=False)
            _write_description(package, out / package.name)


def _write_description(package: Path, out: Path) -> None:
    from coremltools.models.utils import load_spec

    spec = load_spec(str(package))
    spec.ClearField("mlProgram")
    for key in ("com.github.apple.coremltools.conversion_date",):
        spec.description.metadata.userDefined.pop(key, None)
    shutil.rmtree(out, ignore_errors=True)
    file = out / "Data" / "com.apple.CoreML" / "model.mlmodel"
    file.parent.mkdir(parents=True)
    file.write_bytes(spec.SerializeToString(deterministic=True))


def write_bundles(out: Path) -> None:
    """Bundles for Core AI without their programs: `main` as Apple's own runtime describes it, and our metadata."""
    from mlx_ttt.export.coreai.bundle import bundle_metadata
    from mlx_ttt.export.coreai.program import build, save
    from mlx_ttt.export.coreai.runner_main import MAIN
    from mlx_ttt.export.coreai.runtime import Runtime
    from mlx_ttt.export.functions import Options as Computing

    for name, source, compute in (
        ("linear", mlx_ttt.bundled_model(), "float32"),
        ("linear-half", mlx_ttt.bundled_model(), "float16"),
        ("mlp", MLP, "float32"),
    ):
        model, _ = load_model(source)
        bundle, options = out / f"{name}.bundle", Computing(compute=compute)
        shutil.rmtree(bundle, ignore_errors=True)
        (bundle / f"{name}.aimodel").mkdir(parents=True)
        with tempfile.TemporaryDirectory() as folder:
            asset = Path(folder) / "main.aimodel"
            weights = "float32" if compute == "float32" else "float16"
            save(build(model, weights, options, (MAIN,)), asset)
            with Runtime(asset) as runtime:
                write_json(
                    bundle / f"{name}.aimodel" / "interface.json", {MAIN: interface(runtime.function(MAIN).desc)}
                )
        how = {"weights": weights}
        write_json(bundle / "metadata.json", bundle_metadata(name, model, options, {"eos_token_id": []}, how))


def interface(description: Any) -> dict[str, Any]:
    """A function of a program, from the runtime's description of it; -1 is a dimension that the call chooses."""
    found: dict[str, Any] = {}
    for kind in ("input", "output", "state"):
        names = getattr(description, f"{kind}_names")
        values = {name: getattr(description, f"{kind}_descriptor")(name) for name in names}
        found[f"{kind}s"] = {name: {"shape": list(x.shape), "type": str(x.dtype)} for name, x in values.items()}
    return found


# ------------------------------------------------------------------------------------------------- the network


def greedy(model: Model, ids: Sequence[int], count: int) -> tuple[list[int], list[list[float]]]:
    """The likeliest continuation, with no token at which it ends; and at each place the two best logits."""
    cache, found, best = model.make_cache(), [], []
    logits = model(mx.array([list(ids)]), cache)
    for _ in range(count):
        found.append(int(mx.argmax(logits[0, -1])))
        best.append([round(x, 6) for x in sorted(logits[0, -1].tolist())[:-3:-1]])
        logits = model(mx.array([found[-1:]]), cache)
    return found, best


def write_continuations(out: Path) -> None:
    for name, ids in (("linear", None), ("mlp", list(range(3, 16)))):
        model, _ = load_model(mlx_ttt.bundled_model() if name == "linear" else MLP)
        model.set_dtype(mx.float32)
        found = {}
        if ids is None:
            _, tokenizer = mlx_ttt.load()
            ids = tokenizer.encode(PROMPT)
            found = {"prompt": PROMPT, "fingerprint": fingerprint(model, tokenizer)}
        continuation, best = greedy(model, ids, 300)
        if name == "linear":
            found["greedy_text"] = tokenizer.decode(continuation)
        found |= {"prompt_ids": ids, "greedy_ids": continuation, "best_logits": best}
        write_json(out / f"{name}.json", found)
        text = mx.array([[*ids, *continuation][: POSITIONS[-1] + 1]])
        logits = model(text)[0, list(POSITIONS)]
        mx.save_safetensors(
            str(out / f"{name}.safetensors"),
            {"ids": text[0].astype(mx.int32), "positions": mx.array(POSITIONS), "logits": logits},
        )


def write_learning(out: Path) -> None:
    """A text read with three learning scales [layers, H]: logits at some places, signals [layers, H, n] everywhere."""
    for name, source in (("linear", mlx_ttt.bundled_model()), ("mlp", MLP)):
        model, _ = load_model(source)
        model.set_dtype(mx.float32)
        known = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        ids = [*known["prompt_ids"], *known["greedy_ids"]][: POSITIONS[-1] + 1]
        arrays = {"ids": np.array(ids, np.int32), "positions": np.array(POSITIONS, np.int32)}
        uneven = uneven_scale(model)
        for case, learning in (("one", np.ones_like(uneven)), ("uneven", uneven), ("frozen", np.zeros_like(uneven))):
            logits, signals = observed(model, ids, model.make_cache(), learning)
            found = {"learning": learning, "logits": logits[list(POSITIONS)], **signals}
            arrays |= {f"{case}.{key}": x for key, x in found.items()}
        mx.save_safetensors(str(out / f"{name}-learning.safetensors"), {k: mx.array(x) for k, x in arrays.items()})


# ------------------------------------------------------------------------------------------------- the state


def random_cache(model: Model, offset: int) -> list[TTTCache]:
    """A state with another number everywhere."""
    random = np.random.default_rng(0)
    caches = model.make_cache()
    for c in caches:
        c.offset = [offset]
        c.arrays = {
            "weights": tuple(mx.array(random.normal(size=w.shape).astype(np.float32)) for w in c.weights),
            "rows": mx.array(random.normal(size=c.rows.shape).astype(np.float32)),
            "history": {k: mx.array(random.normal(size=x.shape).astype(np.float32)) for k, x in c.history.items()},
        }
    return caches


def write_layouts(out: Path) -> None:
    """A state as arrays of layers, and packed as an exported model has it."""
    for kind in ("linear", "mlp"):
        sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
        args = ModelArgs(
            **sizes,
            num_attention_heads=2,
            mini_batch_size=4,
            ttt_layer_type=kind,
            pre_conv=True,
            share_qk=kind == "mlp",
        )
        mx.random.seed(0)
        model = Model(args)
        cache, start = random_cache(model, 7), model.make_cache()
        layout = StateLayout.of(args)
        arrays = {"packed": mx.array(layout.pack(cache, start))}
        for name, caches in (("start", start), ("now", cache)):
            for i, c in enumerate(caches):
                arrays |= {f"{name}.{i}.weights.{j}": w for j, w in enumerate(c.weights)}
                arrays |= {f"{name}.{i}.rows": c.rows}
                arrays |= {f"{name}.{i}.history.{k}": x for k, x in c.history.items()}
        grouped = together(layout, unpacked(layout, np.array(arrays["packed"])))
        arrays |= {f"grouped.{name}": mx.array(x) for name, x in grouped.items()}
        metadata = {"layout": json.dumps(layout.description() | {"groups": groups(layout)})}
        mx.save_safetensors(str(out / f"layout-{kind}.safetensors"), arrays, metadata)


# ------------------------------------------------------------------------------------------------- a saved state


def write_small_model(out: Path) -> None:
    """A model directory with random weights, a state that Python saved, and how its text goes on."""
    from tests.checkpoint.sentencepiece_models import EXACT, train

    out.mkdir(exist_ok=True)
    args = ModelArgs(
        vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        mini_batch_size=4, pre_conv=True, share_qk=True, use_gate=True, conv_kernel=3,
    )  # fmt: skip
    mx.random.seed(1)
    model = Model(args)
    weights = {name: w + 0.1 * mx.random.normal(w.shape) for name, w in tree_flatten(model.parameters())}
    mx.save_safetensors(str(out / "model.safetensors"), weights)
    write_json(out / "config.json", {**vars(args), "bos_token_id": 1, "eos_token_id": 2})
    with tempfile.TemporaryDirectory() as source:
        (Path(source) / "tokenizer.model").write_bytes(train(**EXACT["llama-2"]))
        write_tokenizer(Path(source), out, {})
    (out / "tokenizer.model").unlink()
    model, tokenizer = mlx_ttt.load(out)
    state = mlx_ttt.read(model, tokenizer, "the inhabitants of Москва 🙂 123")
    mlx_ttt.save_state(out / "python.state", state, model, tokenizer)
    write_json(out / "expected.json", {"text": mlx_ttt.generate(model, tokenizer, state=state, max_tokens=40)})


# ------------------------------------------------------------------------------------------------- sampling


def write_samplers(out: Path) -> None:
    """How likely mlx-lm's sampler makes each token, for some options."""
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_repetition_penalty

    logits = mx.array(np.random.default_rng(0).normal(size=24).astype(np.float32) * 2)[None]
    context = [3, 7, 7, 20]
    found = []
    for temperature, top_p, min_p, top_k, penalty in (
        (1.0, 1.0, 0.0, 0, 1.0),
        (0.7, 0.8, 0.0, 0, 1.0),
        (1.5, 1.0, 0.05, 0, 1.0),
        (1.0, 1.0, 0.0, 5, 1.0),
        (0.9, 0.9, 0.02, 6, 1.3),
    ):
        changed = make_repetition_penalty(penalty)(mx.array(context), logits[:]) if penalty != 1 else logits
        logprobs = changed - mx.logsumexp(changed, axis=-1, keepdims=True)
        logprobs = apply_top_p(logprobs, top_p) if top_p < 1 else logprobs
        logprobs = apply_min_p(logprobs, min_p) if min_p else logprobs
        logprobs = apply_top_k(logprobs, top_k) if top_k else logprobs
        likely = mx.softmax(logprobs / temperature, axis=-1)
        options = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "top_k": top_k, "penalty": penalty}
        found.append({**options, "probabilities": likely[0].tolist()})
    write_json(out / "samplers.json", {"logits": logits[0].tolist(), "context": context, "cases": found})


# ------------------------------------------------------------------------------------------------- chat templates

TEMPLATES = {
    "marks": """{%- for message in messages %}
<|start|>{{ message.role }}
{{ message['content'] | trim }}<|end|>
{% endfor %}
{%- if add_generation_prompt %}
<|start|>assistant
{% endif %}""",
    "brackets": """{% if messages[0]['role'] == 'system' %}
    {% set system = '<<' + messages[0]['content'] + '>>\n' %}{% set turns = messages[1:] %}
{% else %}
    {% set system = '' %}{% set turns = messages %}
{% endif %}
{% for message in turns %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('user and assistant must alternate') }}
  {% endif %}
  {% if message['role'] == 'user' %}
{{ bos_token + '[' + (system if loop.first else '') + message['content'].strip() + ']' }}
  {%- elif message.role == 'assistant' -%}
{{ ' ' ~ message.content ~ eos_token }}
  {% endif %}
{% endfor %}""",
    "namespace": """{# counts #}{% set ns = namespace(count=0, last='none') %}
{%- for m in messages -%}
{%- set ns.count = ns.count + 1 %}{% if not loop.last and m.role is defined and m.role in ['user', 'system'] %}
{{ ns.count }}/{{ messages | length }} {{ m.role | upper }}: {{ m.content }}
{% else %}{% set ns.last = m.role %}{% endif %}
{%- endfor %}
{{ ns.last }} {{ ns.count }} {{ tools is not defined }} {{ messages[-1].content }}""",
}
MESSAGES = (
    [("user", " Hi\n")],
    [("system", "Be kind."), ("user", "naïve {{ 🙂 }}"), ("assistant", "Yes. "), ("user", "  two  ")],
    [("user", "a"), ("user", "b")],
)


def write_templates(out: Path) -> None:
    """What Jinja makes of chat templates, with the settings of transformers."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(text: str) -> None:
        raise TemplateError(text)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    tokens, cases = {"bos_token": "<s>", "eos_token": "</s>"}, []
    for name, source in TEMPLATES.items():
        for turns in MESSAGES:
            for prompt in (True, False):
                messages = [{"role": role, "content": content} for role, content in turns]
                try:
                    template = environment.from_string(source)
                    text = template.render(messages=messages, add_generation_prompt=prompt, **tokens)
                except TemplateError:
                    text = None
                cases.append({"template": name, "messages": messages, "prompt": prompt, "text": text})
    write_json(out / "templates.json", {"templates": TEMPLATES, "cases": cases})


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
