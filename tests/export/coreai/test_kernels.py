"""Our Metal kernels in a saved program: taken out of it and run on the host, against the model in MLX.

The program does not load without a GPU of Apple's. So Apple's runtime runs all of the saved file but the kernels, and
the host harness runs these, as the file has them. See embedded.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import mlx_ttt
from mlx_ttt.backends.metal import rule as metal
from mlx_ttt.cli.convert import convert
from mlx_ttt.errors import CheckpointError, TTTError
from mlx_ttt.export.coreai import kernels
from mlx_ttt.export.coreai.bundle import read_bundle
from mlx_ttt.export.coreai.program import build as build_program
from mlx_ttt.export.coreai.program import build_with_kernels, outside, save
from mlx_ttt.export.coreai.runtime import Runtime, start_session, zeros
from mlx_ttt.export.coreai.state import apart_shapes
from mlx_ttt.export.functions import FUNCTIONS, IDS, SIGNALS, Options
from mlx_ttt.export.layout import StateLayout
from mlx_ttt.export.session import Session

from ...backends.metal.host import check_source, lint, why_unavailable
from ...models import KINDS, build, configuration
from ..observing import compare, uneven
from ..texts import error, expected, feed, singly
from .embedded import WithHostKernels, cut, embedded, host_source

EXACT = 1e-5  # of the largest absolute logit, and of the largest number of the state
on_host = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@contextmanager
def running(
    model, folder: Path, options: Options, steps: bool = True, weights: str = "float32"
) -> Iterator[tuple[Session, WithHostKernels]]:
    """A text before its first token, and what runs the functions of the model's saved program with kernels."""
    save(build_with_kernels(model, weights, options), folder / "model.aimodel")
    cut(folder / "model.aimodel", folder / "cut.aimodel")
    with Runtime(folder / "cut.aimodel") as runtime:
        functions = WithHostKernels(folder / "model.aimodel", runtime, (model.args.mini_batch_size - 1) * steps)
        learning = uneven(model) if options.learning else None
        yield start_session(functions, StateLayout.of(model.args), outside(options.compute), learning), functions


def text(model, n: int) -> list[int]:
    return [int(id) for id in np.random.default_rng(0).integers(1, model.args.vocab_size, n)]


@on_host
@pytest.mark.slow
@pytest.mark.parametrize("steps", [True, False], ids=["step", "decode"])
@pytest.mark.parametrize("flags", ["111", "000"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_with_scale_and_signals(kind, flags, steps, tmp_path):
    """Prefills, whole and in part, and single tokens at every phase: logits, state and signals."""
    model = build(kind, flags, hidden_size=32)
    ids = text(model, 4 * model.args.mini_batch_size + 1)
    with running(model, tmp_path, Options(compute="float32", learning=True, signals=True), steps) as (
        session,
        functions,
    ):
        compare(model, session, ids, uneven(model), EXACT)
    assert min(functions.called["decode"], functions.called["prefill"]) >= 2
    assert (functions.called["step"] > 0) == steps


@on_host
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["float16", "int8", "int4", "lut4"])
def test_formats_beside_operations(weights, tmp_path):
    """The same functions in operations, on Apple's runtime: the two programs store the same numbers."""
    model, options = build("mlp", "110", hidden_size=32), Options(compute="float32")
    layout, K = StateLayout.of(model.args), model.args.mini_batch_size
    save(build_program(model, weights, options, FUNCTIONS), tmp_path / "operations.aimodel")
    ids = text(model, 3 * K + 2)
    parts = ids[: K + 2], *singly(ids[K + 2 : 2 * K + 1]), ids[2 * K + 1 :]
    with_kernels, operations = running(model, tmp_path, options, weights=weights), tmp_path / "operations.aimodel"
    with with_kernels as (session, _), Runtime(operations) as runtime:
        other = start_session(runtime, layout, np.float32)
        (_, found), (_, wanted) = feed(session, *parts), feed(other, *parts)
        assert error(found, wanted) <= EXACT
        assert error(session.state, other.state) <= EXACT


@on_host
@pytest.mark.slow
def test_tokens_that_do_not_count(tmp_path):
    """Their signals are zero, whatever they are; and a call may count none."""
    model = build("linear", "000", hidden_size=32)
    layout, K = StateLayout.of(model.args), model.args.mini_batch_size
    with running(model, tmp_path, Options(compute="float32", signals=True)) as (_, functions):
        for length in (2, 0):
            states = functions.start(zeros(apart_shapes(layout), np.float32))
            inputs = {IDS: np.array([text(model, K)], np.int32), "length": np.array([length], np.int32)}
            outputs = functions.call("prefill", inputs, states)
            for name in SIGNALS:
                assert outputs[name][0, :, :length].all()  # the second layer's t is zero at the end: it writes nothing
                assert not outputs[name][..., length:].any()
            rows = functions.arrays(states)["k.0"]
            assert rows[:, :, :length].any() == (length > 0)
            assert not rows[:, :, length:].any()


@on_host
@pytest.mark.slow
def test_the_bundled_model(tmp_path):
    """Heads of 64 and mini-batches of 16, without signals."""
    model, _ = mlx_ttt.load_model()
    ids = text(model, 37)
    wanted, state = expected(model, ids)
    with running(model, tmp_path, Options(compute="float32")) as (session, functions):
        positions, logits = feed(session, ids[:16], *singly(ids[16:32]), ids[32:])
        assert error(logits, wanted[positions]) <= EXACT
        assert error(session.state, state) <= EXACT
    assert functions.called == {"prefill": 2, "step": 15, "decode": 1}


@on_host
@pytest.mark.slow
@pytest.mark.parametrize(("compute", "number"), [("mixed", np.float32), ("float16", np.float16)])
def test_half_precision(compute, number, tmp_path):
    """Tokens of the kernels in float32 and in float16. The bounds are those of test_program.py."""
    model = build("mlp", "111", hidden_size=32)
    ids = text(model, 23)
    wanted, state = expected(model, ids)
    with running(model, tmp_path, Options(compute=compute)) as (session, functions):
        positions, logits = feed(session, ids[:6], *singly(ids[6:15]), ids[15:])
        assert 1e-5 < error(logits, wanted[positions]) <= 0.02
        assert error(session.state, state) <= 0.02
    assert {kind for one in functions.kernels["step"] for _, kind in one.inputs[:4]} == {number}


@pytest.mark.slow
@pytest.mark.parametrize(("D", "K"), [(16, 5), (64, 16), (128, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_metal_would_accept_it(kind, D, K, tmp_path):
    """As far as the harness can tell; and at most 31 parameters, all of one layer shared by the next."""
    model = build(kind, "000", hidden_size=2 * D, mini_batch_size=K)
    save(build_with_kernels(model, "float32", Options(signals=True)), tmp_path / "model.aimodel")
    found = embedded(tmp_path / "model.aimodel")
    assert [one.function for one in found] == [name for name in kernels.FORMS for _ in model.layers]
    assert len({one.source for one in found}) == 3
    for one in found[::2]:
        assert len(one.parameters) <= 31
        assert one.threadgroup[0] <= 1024
        assert one.grid == (one.threadgroup[0] * 2, 1, 1)
        if why_unavailable() is None:
            check_source(host_source(one))
            assert {finding.rule for finding in lint(one.source)} == {"after-metal-3.1"}  # tensors came with Metal 4


class TestBadInput:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"hidden_size": 96}, "a head dimension of 48, only for 16, 32, 64, 96, 128"),
            ({"hidden_size": 32, "mini_batch_size": 33}, "mini-batches of 33 tokens, only up to 32"),
        ],
    )
    def test_sizes_without_kernels(self, sizes, message):
        with pytest.raises(TTTError, match=message):
            kernels.check(configuration("linear", "000", **sizes))

    @pytest.mark.slow
    def test_one_line_and_nothing_left(self, model_dirs, monkeypatch, tmp_path):
        monkeypatch.setattr(metal, "HEAD_DIMENSIONS", (16, 32))
        result = CliRunner().invoke(convert, ["coreai", str(model_dirs("trained")), str(tmp_path / "out"), "--kernels"])
        assert result.exit_code == 2
        assert re.fullmatch(
            r"error: --kernels: there are none for a head dimension of 64, only for 16, 32;[^\n]*\n", result.stderr
        )
        assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "out"
    command = ["coreai", str(mlx_ttt.bundled_model()), str(out), "--compute", "float32", "--kernels"]
    result = CliRunner().invoke(convert, command)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.slow
class TestBundle:
    def test_an_app_can_choose(self, exported):
        facts = read_bundle(exported).facts["kernels"]
        content = json.loads((exported / "metadata.json").read_text())
        assert (exported / facts["asset"] / "main.mlirb").is_file()
        assert facts["asset"] != content["assets"]["main"]
        assert content["assets"] == {"main": content["assets"]["main"]}  # Apple's runner sees the other one only
        assert facts["functions"] == ["step", "decode", "prefill"]
        assert facts["unit"] == "gpu"
        assert facts["asset"] in (exported / "README.md").read_text()
        assert {one.function for one in embedded(exported / facts["asset"])} == set(facts["functions"])
        assert embedded(exported / content["assets"]["main"]) == []

    def test_it_does_not_load_without_a_gpu(self, exported):
        """If this fails, the runtime has learned it: then run it here."""
        asset = exported / read_bundle(exported).facts["kernels"]["asset"]
        with Runtime(asset) as runtime, pytest.raises(RuntimeError, match="metal4_kernel"):
            runtime.function("decode")

    def test_verify_says_what_it_did_not_run(self, exported):
        command = ["verify", str(exported), "--against", str(mlx_ttt.bundled_model()), "--tokens", "64"]
        result = CliRunner().invoke(convert, command)
        assert result.exit_code == 0, result.output
        assert "Not run: the kernels of" in result.stdout

    def test_a_changed_byte(self, exported, tmp_path):
        copy = Path(shutil.copytree(exported, tmp_path / "copy"))
        program = copy / read_bundle(copy).facts["kernels"]["asset"] / "main.mlirb"
        data = bytearray(program.read_bytes())
        data[len(data) // 2] ^= 1
        program.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"kernels\.aimodel: damaged"):
            read_bundle(copy)
