"""The learning scale and the signals of a Core ML package, in the interpreter, against the model."""

from __future__ import annotations

import pytest

pytest.importorskip("coremltools", reason='needs coremltools: pip install "mlx-ttt[coreml]"')

import numpy as np
from coremltools.models.utils import load_spec

import mlx_ttt
from mlx_ttt.export.mil.package import export
from mlx_ttt.export.mil.program import Options
from mlx_ttt.export.mil.session import interpreted, read_metadata
from mlx_ttt.export.verify import verify

from ..observing import compare, uneven


def text(model, n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, model.args.vocab_size, n)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear-mamba", "mlp-mamba", "mlp-transformer"])
def test_the_graph_is_exact(packages, name):
    package = packages(name, saved=False, compute="float32", learning=True, signals=True)
    session = package.session(rounding=False)
    compare(
        package.model, session, text(package.model, 4 * package.model.args.mini_batch_size), uneven(package.model), 1e-4
    )


@pytest.fixture(scope="module")
def exported(model_dirs, tmp_path_factory):
    out = tmp_path_factory.mktemp("learning") / "Small.mlpackage"
    export(model_dirs("mlp-mamba"), out, options=Options(learning=True, signals=True), companions=False)
    return out


@pytest.mark.slow
class TestPackage:
    def test_half_precision(self, exported, model_dirs):
        """Signals are float32 also where all else is not."""
        model, _ = mlx_ttt.load_model(model_dirs("mlp-mamba"))
        session = interpreted(exported)()
        compare(model, session, text(model, 4 * model.args.mini_batch_size), uneven(model), 2e-2)
        assert {x.dtype for x in session.signals.values()} == {np.dtype(np.float32)}

    def test_the_scale_may_be_left_out(self, exported):
        """Core ML fills it in: the package says that it is optional, and 1 by default."""
        for function in load_spec(str(exported)).description.functions:
            (learning,) = [x for x in function.input if x.name == "learning"]
            assert learning.type.isOptional
            assert learning.type.multiArrayType.floatDefaultValue == 1
            assert not [x for x in function.input if x.name != "learning" and x.type.isOptional]
            assert {x.name for x in function.output} == {"logits", "loss", "lr", "writeNorm"}

    def test_metadata(self, exported, model_dirs):
        found = read_metadata(exported)
        assert found["learning"] == list(uneven(mlx_ttt.load_model(model_dirs("mlp-mamba"))[0]).shape)
        assert found["signals"] == ["loss", "lr", "writeNorm"]

    def test_without_the_options_there_is_neither(self, packages):
        for function in packages("mlp-mamba").functions.values():
            assert "learning" not in function.inputs
            assert [x.name for x in function.outputs] == ["logits"]

    def test_verify(self, exported, model_dirs):
        rounded, exact = verify(exported, model_dirs("mlp-mamba"), tokens=60)[:2]
        assert 0 < exact.signals <= rounded.signals <= 0.02


def test_in_and_out(packages):
    """Also where the state is an input and an output."""
    package = packages("linear-mamba", saved=False, compute="float32", learning=True, state_mode="io")
    function = package.functions["decode"]
    assert list(function.inputs) == ["inputIds", "position", "learning", "tttState"]
