"""Quantized model directories: bit for bit what MLX and mlx-lm make of the same weights."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

from mlx_ttt.checkpoint import convert as convert_module
from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.checkpoint.inspection import inspect
from mlx_ttt.checkpoint.parameters import Parameters
from mlx_ttt.checkpoint.quantization import Quantization, Scheme
from mlx_ttt.checkpoint.tensor import dtype_name
from mlx_ttt.cli import main
from mlx_ttt.errors import CheckpointError, QuantizationError
from mlx_ttt.loading import load_model
from mlx_ttt.model import Model

from ..models import BOUND, in_calls, largest_error
from .test_convert import ARGS as TINY
from .test_convert import GATE, loaded, official, save

# Of the group sizes, only 16 and 32 divide the rows of down_proj.
ARGS = replace(TINY, hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
MATRIX = re.compile(r"(model\.embed_tokens|lm_head|.*\.mlp\.(gate|up|down)_proj|.*\.seq_modeling_block\.[qkvog]_proj)")
SCHEMES = [
    *(Scheme(group_size=32, bits=bits) for bits in (2, 3, 4, 5, 6, 8)),
    *(Scheme(group_size=64, bits=4), Scheme(mode="mxfp4"), Scheme(mode="mxfp8"), Scheme(mode="nvfp4")),
]
IDS = mx.array([[i % 37 for i in range(17)]])
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("source") / "model", official(ARGS), vars(ARGS))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def quantized(source, out) -> Path:
    convert(source, out, quantize=Scheme(32, 4))
    return out


def mlx_lm_load(path: Path) -> tuple[Model, dict]:
    return mlx_lm_utils.load_model(path, trust_remote_code=True)


def in_mlx_lm(source: Path, tmp_path: Path, dtype: mx.Dtype, scheme: Scheme, **options) -> tuple[dict, dict]:
    """The weights and the config that mlx-lm's own quantization makes of the unquantized checkpoint."""
    convert(source, tmp_path / "float", dtype=dtype)
    model, config = mlx_lm_load(tmp_path / "float")
    with mx.stream(mx.cpu):
        model, config = mlx_lm_utils.quantize_model(
            model, config, scheme.group_size, scheme.bits, mode=scheme.mode, **options
        )
        mx.eval(model.parameters())
    return dict(tree_flatten(model.parameters())), config


def assert_identical(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert mx.array_equal(found[name], array).item(), name


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_mlx_lm_would_write(source, out, tmp_path, scheme):
    dtype = mx.float16 if scheme.bits == 3 else mx.bfloat16 if scheme.bits % 4 == 0 else mx.float32
    convert(source, out, dtype=dtype, quantize=scheme)
    expected, config = in_mlx_lm(source, tmp_path, dtype, scheme)
    found = loaded(out)
    assert_identical(found, expected)
    written = json.loads((out / "config.json").read_text())
    assert written["quantization"] == written["quantization_config"] == config["quantization"]
    assert written["torch_dtype"] == str(dtype).removeprefix("mlx.core.")


@pytest.mark.parametrize("recipe", QUANT_RECIPES)
def test_recipes_of_mlx_lm(source, out, tmp_path, recipe):
    convert(source, out, quantize=Scheme(32), recipe=recipe)
    predicate = mixed_quant_predicate_builder(recipe, Model(ARGS), 32)
    expected, config = in_mlx_lm(source, tmp_path, mx.float32, Scheme(32), quant_predicate=predicate)
    assert_identical(loaded(out), expected)
    assert json.loads((out / "config.json").read_text())["quantization"] == config["quantization"]
    model, _ = load_model(out)
    assert len({layer.mlp.down_proj.bits for layer in model.layers}) == 2


def test_what_is_quantized(quantized, source):
    """Projections and embeddings are quantized; everything else is unchanged."""
    arrays = loaded(quantized)
    names = official(ARGS).keys()
    matrices = {name.removesuffix(".scales") for name in arrays if name.endswith(".scales")}
    assert matrices == {
        name.removesuffix(".weight") for name in names if MATRIX.fullmatch(name.removesuffix(".weight"))
    }
    assert len(matrices) == 2 + 2 * 7
    for name, array in official(ARGS).items():
        if name.removesuffix(".weight") not in matrices:
            kept = array.swapaxes(1, 2) if array.ndim == 3 and ".conv" in name else array
            assert mx.array_equal(arrays[name], mx.array(kept)).item(), name


def unpack(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """The definition: little-endian fields of `bits` bits, times their group's scale, plus its bias."""
    stream = np.unpackbits(packed.astype("<u4").view(np.uint8), axis=1, bitorder="little")
    fields = stream.reshape(len(packed), -1, bits) @ (1 << np.arange(bits))
    return fields * np.repeat(scales, group_size, axis=1) + np.repeat(biases, group_size, axis=1)


@pytest.mark.parametrize(
    "scheme, dtype",
    [
        (Scheme(32, 8), mx.float32),
        (Scheme(64, 4), mx.float16),
        (Scheme(32, 3), mx.bfloat16),
        (Scheme(32, 6), mx.float32),
    ],
    ids=str,
)
def test_logits(source, out, scheme, dtype):
    """The quantized model, loaded by us and by mlx-lm, against a model with the dequantized matrices."""
    convert(source, out, quantize=scheme, dtype=dtype)
    arrays = {name: a.astype(mx.float32) if a.dtype != mx.uint32 else a for name, a in loaded(out).items()}
    weights = {}
    for name, array in arrays.items():
        path, _, part = name.rpartition(".")
        if f"{path}.scales" not in arrays:
            weights[name] = array
        elif part == "weight":
            parts = [np.array(arrays[f"{path}.{part}"]) for part in ("weight", "scales", "biases")]
            weights[name] = mx.array(unpack(*parts, scheme.bits, scheme.group_size).astype(np.float32))
    reference = Model(ARGS)
    reference.load_weights(list(weights.items()))
    expected = reference(IDS)
    for model, _ in [load_model(out), mlx_lm_load(out)][: 2 if dtype == mx.float32 else 1]:
        assert isinstance(model.layers[0].mlp.up_proj, nn.QuantizedLinear)
        assert largest_error(in_calls(model, IDS, [1, 3, 8]), expected) <= BOUND


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_logits_of_other_modes(source, tmp_path, mode):
    """Against the dequantized directory, whose bfloat16 holds all values of these modes exactly."""
    convert(source, tmp_path / "quantized", dtype=mx.float16, quantize=Scheme(mode=mode))
    convert(tmp_path / "quantized", tmp_path / "float", dequantize=True, dtype=mx.float32)
    quantized, dequantized = (load_model(tmp_path / name)[0] for name in ("quantized", "float"))
    assert largest_error(quantized(IDS), dequantized(IDS)) <= BOUND


def test_every_shard_holds_what_it_says(source, out, tmp_path, monkeypatch):
    """The parts of a matrix may lie in different files."""
    convert(source, tmp_path / "whole", quantize=Scheme(32, 4))
    monkeypatch.setattr(convert_module, "LARGEST_SHARD", 3000)
    convert(source, out, quantize=Scheme(32, 4))
    assert len(list(out.glob("model-*.safetensors"))) > 20
    assert_identical(loaded(out), loaded(tmp_path / "whole"))
    load_model(out)


def test_a_matrix_is_loaded_once(source, out, monkeypatch):
    loads = []
    as_parameter = Parameters.as_parameter

    def counted(self, name, tensor, *args):
        return as_parameter(self, name, replace(tensor, load=lambda: loads.append(name) or tensor.load()), *args)

    monkeypatch.setattr(Parameters, "as_parameter", counted)
    convert(source, out, quantize=Scheme(32, 4))
    assert sorted(loads) == sorted(official(ARGS))


def test_report_and_inspection(source, quantized, tmp_path):
    report = convert(source, tmp_path / "again", quantize=Scheme(32, 4))
    weights = official(ARGS)
    assert report.parameters == sum(w.size for w in weights.values())
    arrays = loaded(quantized).values()
    assert report.nbytes == sum(array.nbytes for array in arrays)
    assert report.bytes_by_dtype["uint32"] == sum(array.nbytes for array in arrays if array.dtype == mx.uint32)
    found = inspect(quantized)
    assert found.problems == () and found.quantization == Quantization(Scheme(32, 4))
    assert (found.parameters, found.bytes_by_dtype) == (report.parameters, report.bytes_by_dtype)
    assert found.tensors == len(arrays)
    assert inspect(source).quantization is None


class TestUnfitMatrices:
    def test_some(self, source, out, tmp_path):
        report = convert(source, out, quantize=Scheme(64, 4))
        assert [w for w in report.warnings if "2 of 16 matrices are not quantized" in w and "rows of 96" in w]
        assert loaded(out)["model.layers.1.mlp.down_proj.weight"].shape == (64, 96)
        load_model(out)

    def test_some_of_a_recipe(self, source, out):
        convert(source, out, quantize=Scheme(64), recipe="mixed_4_6")
        assert "model.layers.0.mlp.down_proj" not in json.loads((out / "config.json").read_text())["quantization"]
        load_model(out)
        mlx_lm_load(out)

    def test_all(self, source, out):
        with pytest.raises(
            QuantizationError, match="no matrix can be quantized: rows of 64 do not divide into groups of"
        ):
            convert(source, out, quantize=Scheme(128, 4))
        assert not out.exists()


class TestAgain:
    def test_dequantized(self, quantized, tmp_path):
        arrays = loaded(quantized)
        convert(quantized, tmp_path / "float", dequantize=True)
        found = loaded(tmp_path / "float")
        assert found.keys() == official(ARGS).keys()
        for name, array in found.items():
            path = name.removesuffix(".weight")
            if f"{path}.scales" in arrays:
                parts = [np.array(arrays[f"{path}.{part}"]) for part in ("weight", "scales", "biases")]
                np.testing.assert_allclose(array, unpack(*parts, 4, 32), rtol=1e-5, atol=1e-6)
            else:
                assert mx.array_equal(array, arrays[name]).item()
        assert (
            not {"quantization", "quantization_config"}
            & json.loads((tmp_path / "float" / "config.json").read_text()).keys()
        )

    @pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
    def test_dequantized_to_what_it_was(self, source, tmp_path, dtype):
        """The dtype from before quantization is kept, though MLX dequantizes this mode to bfloat16."""
        convert(source, tmp_path / "quantized", dtype=dtype, quantize=Scheme(mode="mxfp4"))
        report = convert(tmp_path / "quantized", tmp_path / "float", dequantize=True)
        assert report.bytes_by_dtype.keys() == {dtype_name(dtype), "float32"}

    def test_quantized_again(self, source, tmp_path):
        convert(source, tmp_path / "eight", quantize=Scheme(32, 8))
        convert(tmp_path / "eight", tmp_path / "float", dequantize=True)
        convert(tmp_path / "float", tmp_path / "expected", quantize=Scheme(64, 4))
        report = convert(tmp_path / "eight", tmp_path / "four", quantize=Scheme(64, 4))
        assert_identical(loaded(tmp_path / "four"), loaded(tmp_path / "expected"))
        assert [w for w in report.warnings if "quantized before (8 bits in groups of 32, affine)" in w]

    def test_what_mlx_lm_wrote(self, source, out, tmp_path):
        """A directory that mlx-lm quantized by a recipe can be dequantized."""
        predicate = mixed_quant_predicate_builder("mixed_2_6", Model(ARGS), 32)
        convert(source, tmp_path / "float")
        model, config = mlx_lm_load(tmp_path / "float")
        model, config = mlx_lm_utils.quantize_model(model, config, 32, 4, quant_predicate=predicate)
        mlx_lm_utils.save_model(tmp_path / "theirs", model)
        mlx_lm_utils.save_config(config, tmp_path / "theirs" / "config.json")
        load_model(tmp_path / "theirs")
        convert(tmp_path / "theirs", out, dequantize=True)
        assert loaded(out).keys() == official(ARGS).keys()

    def test_nothing_is_guessed(self, source, quantized, tmp_path):
        with pytest.raises(
            QuantizationError, match=r"are quantized \(4 bits in groups of 32, affine\): say --dequantize"
        ):
            convert(quantized, tmp_path / "again")
        with pytest.raises(QuantizationError, match="are not quantized; leave out --dequantize"):
            convert(source, tmp_path / "again", dequantize=True)
        with pytest.raises(QuantizationError, match="not both"):
            convert(quantized, tmp_path / "again", dequantize=True, quantize=Scheme())
        assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 7}, "bits is 7; the quantization mode affine allows 2, 3, 4, 5, 6, 8"),
        ({"bits": 4.0}, "bits is 4.0; the"),
        ({"bits": True}, "bits is True; the"),
        ({"group_size": 48}, "group_size is 48; the quantization mode affine allows 32, 64, 128"),
        ({"mode": "mxfp4", "bits": 8}, "bits is 8; the quantization mode mxfp4 allows 4"),
        ({"mode": "nvfp4", "group_size": 32}, "group_size is 32; the quantization mode nvfp4 allows 16"),
        ({"mode": "int4"}, "mode is int4, none of affine, mxfp4, mxfp8, nvfp4"),
    ],
)
def test_what_mlx_has_not(options, message):
    with pytest.raises(QuantizationError, match=message):
        Scheme(**options)


VALUES = st.none() | st.booleans() | st.integers(-1, 65) | st.floats() | st.sampled_from(["affine", "mxfp4", "\n"])
ENTRIES = st.dictionaries(st.sampled_from(["bits", "group_size", "mode", "quant_method", UP]), VALUES | st.just({}))


@given(entry=ENTRIES | VALUES | st.lists(VALUES) | ENTRIES.map(lambda own: {"bits": 4, UP: own}))
def test_any_config(entry):
    """It is understood, or refused in one line that names the file."""
    try:
        found = Quantization.of_config({"quantization": entry}, Path("config.json"))
        assert found is None or found.config()["quantization"]["bits"] in (2, 3, 4, 5, 6, 8)
    except CheckpointError as error:
        assert re.fullmatch(r"config\.json: [^\n]+", str(error))


def test_recipes_that_there_are_not(source, out):
    with pytest.raises(QuantizationError, match=r"mixed_9_9 is none of mixed_2_6, "):
        convert(source, out, quantize=Scheme(), recipe="mixed_9_9")
    with pytest.raises(QuantizationError, match="mixed_4_6 is for the quantization mode affine, not mxfp4"):
        convert(source, out, quantize=Scheme(mode="mxfp4"), recipe="mixed_4_6")


def test_defaults_are_those_of_mlx():
    for mode in ("affine", "mxfp4", "mxfp8", "nvfp4"):
        layer = nn.QuantizedLinear(128, 2, mode=mode)
        assert Scheme(mode=mode) == Scheme(layer.group_size, layer.bits, mode)


def test_not_a_number(source, tmp_path, out):
    weights = official(ARGS)
    weights[GATE][3, 4] = np.nan
    with pytest.raises(CheckpointError, match=rf"{GATE} has 1 values that are NaN"):
        convert(save(tmp_path / "bad", weights, vars(ARGS)), out, quantize=Scheme(32))
    assert not out.exists()


class TestDamage:
    """Loading, converting and inspecting refuse a quantized directory that does not match its config."""

    @pytest.fixture
    def damage(self, quantized):
        def damage(change_arrays=lambda arrays: arrays, **change_config):
            arrays = loaded(quantized)
            mx.save_safetensors(str(quantized / "model.safetensors"), change_arrays(arrays) or arrays)
            file = quantized / "config.json"
            config = json.loads(file.read_text()) | change_config
            file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
            return quantized

        return damage

    @staticmethod
    def assert_refused(folder: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as error:
            load_model(folder)
        assert "\n" not in str(error.value)
        with pytest.raises(CheckpointError, match=message):
            convert(folder, folder.parent / "again", dequantize=True)
        assert re.search(message, inspect(folder).problems[0])

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda a: a.pop(f"{UP}.biases"), rf"{UP} has scales \(96, 2\) float32, weight .* as the config says"),
            (lambda a: a.pop(f"{UP}.weight"), rf"{UP} has biases"),
            (lambda a: a.pop("lm_head.biases"), "lm_head has"),
            (lambda a: a.update({f"{UP}.scales": mx.zeros((96, 3))}), rf"{UP} has .* not a matrix of 4 bits in groups"),
            (lambda a: a.update({f"{UP}.scales": mx.zeros((5, 2, 2))}), rf"{UP} has scales of shape \(5, 2, 2\)"),
            (lambda a: a.update({f"{UP}.weight": mx.zeros((96, 8))}), rf"{UP} has .* weight \(96, 8\) float32"),
            (lambda a: a.update({f"{UP}.scales": mx.zeros((96, 2), mx.uint8)}), rf"{UP} has"),
            (
                lambda a: a.update({f"{UP}.{p}": a[f"{UP}.{p}"][:50] for p in ("weight", "scales", "biases")}),
                rf"{UP}.weight has shape \(50, 64\), the config asks for \(96, 64\)",
            ),
            (
                lambda a: [a.pop(f"{UP}.{p}") for p in ("weight", "scales", "biases")] and None,
                rf"{UP}.weight is missing",
            ),
            (lambda a: a.pop(f"{UP}.scales"), rf"{UP}.biases is not in a model"),
            (lambda a: a.update({"model.norm.scales": mx.zeros((1, 2))}), "model.norm has"),
        ],
    )
    def test_tensors(self, damage, change, message):
        def change_arrays(arrays):
            change(arrays)
            return arrays

        self.assert_refused(damage(change_arrays), message)

    @pytest.mark.parametrize(
        "entry, message",
        [
            (
                {"group_size": 32, "bits": 8},
                r"has .* not a matrix of 8 bits in groups of 32, affine, as the config says",
            ),
            ({"group_size": 32, "bits": 7}, r"config\.json: bits is 7; the quantization mode affine allows"),
            ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "not a matrix of 4 bits in groups of 32, mxfp4"),
            ({"group_size": 32, "bits": 4, UP: {"bits": 2, "group_size": 32}}, rf"{UP} has .* 2 bits in groups of 32"),
            ({"group_size": 32, "bits": 4, UP: {"bits": 4, "global_scale": True}}, "but not by MLX"),
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "but not by MLX; use the original"),
            ("4 bits", "but not by MLX"),
            ([4], "but not by MLX"),
        ],
    )
    def test_config(self, damage, entry, message):
        self.assert_refused(damage(quantization=entry, quantization_config=entry), message)

    def test_another_tools_quantization(self, damage):
        self.assert_refused(damage(quantization=None, quantization_config={"quant_method": "gptq"}), "but not by MLX")

    def test_only_the_entry_that_mlx_lm_does_not_read(self, damage):
        entry = {"group_size": 32, "bits": 4, "mode": "affine"}
        self.assert_refused(damage(quantization=None, quantization_config=entry), "but not by MLX")

    def test_no_word_of_it(self, damage):
        folder = damage(quantization=None, quantization_config=None)
        with pytest.raises(CheckpointError, match=r"biases, .* not in a model of this config"):
            load_model(folder)


class TestCommandLine:
    def run(self, *args: object):
        return CliRunner().invoke(main, ["convert", *map(str, args)])

    def test_options(self, source, quantized, tmp_path):
        result = self.run("mlx", source, tmp_path / "again", "--bits", 4, "--group-size", 32)
        assert result.exit_code == 0 and re.search(r" MB, \d+\.\d\d bits per weight$", result.stdout)
        assert_identical(loaded(tmp_path / "again"), loaded(quantized))
        shown = self.run("inspect", quantized).stdout
        assert "quantized:   4 bits in groups of 32, affine\n" in shown and "problem" not in shown
        result = self.run("mlx", quantized, tmp_path / "float", "--dequantize", "--dtype", "float16")
        assert result.exit_code == 0 and loaded(tmp_path / "float")[GATE].dtype == mx.float16

    @pytest.mark.parametrize(
        "options, entry",
        [
            ({"--mode": "nvfp4"}, {"group_size": 16, "bits": 4, "mode": "nvfp4"}),
            ({"--group-size": 32}, {"group_size": 32, "bits": 4, "mode": "affine"}),
            ({"--quant-predicate": "mixed_3_6"}, {"group_size": 64, "bits": 4, "mode": "affine"}),
        ],
    )
    def test_defaults(self, source, out, options, entry):
        """They are mlx-lm's: any one of these options asks for quantization."""
        result = self.run("mlx", source, out, *itertools.chain(*options.items()))
        assert result.exit_code == 0
        written = json.loads((out / "config.json").read_text())["quantization"]
        assert {name: value for name, value in written.items() if not isinstance(value, dict)} == entry
        assert (len(written) > 3) == ("--quant-predicate" in options)

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--bits", 7], "bits is 7; the quantization mode affine allows 2, 3, 4, 5, 6, 8"),
            (["--bits", 0], "bits is 0; the"),
            (["--group-size", 0], "group_size is 0; the"),
            (["--mode", "mxfp4", "--bits", 8], "bits is 8; the quantization mode mxfp4 allows 4"),
            (["--quant-predicate", "mixed_4_6", "--bits", 4], "chooses the bits of each matrix: leave out --bits"),
            (["--group-size", 128], "no matrix can be quantized: rows of 64 do not divide into groups of 128"),
            (["--dequantize"], "its weights are not quantized; leave out --dequantize"),
            (["--dequantize", "--bits", 4], "not both"),
        ],
    )
    def test_errors(self, source, out, options, message):
        result = self.run("mlx", source, out, *options)
        assert result.exit_code == 2 and result.stdout == ""
        assert re.fullmatch(rf"error: [^\n]*{re.escape(message)}[^\n]*\n", result.stderr), result.stderr
        assert not out.exists()

    def test_choices(self):
        """The choices that `--help` lists, without importing MLX, are those of MLX and mlx-lm."""
        options = {option.name: option.type for option in main.commands["convert"].commands["mlx"].params}
        assert list(options["recipe"].choices) == list(QUANT_RECIPES)
        for mode in options["mode"].choices:
            Scheme(mode=mode)
