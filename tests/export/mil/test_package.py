"""The finished package: what is in it, how large it is, what goes wrong and what is left behind then."""

from __future__ import annotations

import pytest

pytest.importorskip("coremltools", reason='needs coremltools: pip install "mlx-ttt[coreml]"')

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import coremltools as ct
import mlx.core as mx
import numpy as np
from click.testing import CliRunner
from coremltools.models.utils import load_spec
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models

import mlx_ttt
from mlx_ttt.cli.coreml import coreml as command
from mlx_ttt.errors import CheckpointError, OutputError, TokenizerError, TTTError
from mlx_ttt.export.layout import StateLayout
from mlx_ttt.export.metadata import model_name
from mlx_ttt.export.mil import conversion
from mlx_ttt.export.mil import package as room
from mlx_ttt.export.mil.interpreter import load
from mlx_ttt.export.mil.package import export
from mlx_ttt.export.mil.program import Options
from mlx_ttt.export.mil.session import interpreted, read_metadata

from ..texts import expected, feed, singly

ALLOWED = {
    *("abs", "add", "cast", "clip", "concat", "coreml_update_state", "equal", "expand_dims", "gather", "gelu", "less"),
    *("linear", "matmul", "maximum", "mul", "pad", "read_state", "real_div", "reduce_max", "reduce_mean"),
    *("reduce_sum", "reshape", "rsqrt", "sigmoid", "silu", "slice_by_size", "split", "square", "sub", "tanh"),
    "transpose",
}
IOS_18 = 9  # specification version
PREFIX = "com.mlx-ttt."


def changed_config(model: Path, copy: Path, **changes) -> Path:
    """A model directory with another configuration."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def weights_file(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/weights/weight.bin"


class TestStructure:
    def test_functions(self, exported):
        spec = load_spec(str(exported))
        assert spec.specificationVersion == IOS_18
        assert {f.name for f in spec.description.functions} == {"decode", "prefill"}
        assert spec.description.defaultFunctionName == "decode"
        assert {f.opset for f in spec.mlProgram.functions.values()} == {"CoreML8"}

    @pytest.mark.parametrize(("function", "where", "tokens"), [("decode", "position", 1), ("prefill", "length", 16)])
    def test_inputs_and_outputs(self, exported, function, where, tokens):
        spec = load_spec(str(exported))
        description = next(f for f in spec.description.functions if f.name == function)
        arrays = {x.name: x.type.multiArrayType for x in (*description.input, *description.output)}
        kinds = ct.proto.FeatureTypes_pb2.ArrayFeatureType
        assert {name: (list(x.shape), x.dataType) for name, x in arrays.items()} == {
            "inputIds": ([1, tokens], kinds.INT32),
            where: ([1], kinds.INT32),
            "logits": ([1, 1, 160], kinds.FLOAT16),
        }
        (state,) = description.state
        array = state.type.stateType.arrayType
        assert state.name == "tttState"
        # W1 and W2 take 4D rows, b1 four, b2 one, k and e2 K, e1 and x2 4K, the histories 3 each.
        assert list(array.shape) == [2, 1, 256 + 4 + 256 + 1 + 16 + 64 + 64 + 16 + 3 + 3, 64]
        assert array.dataType == kinds.FLOAT16

    @pytest.mark.parametrize("function", ["decode", "prefill"])
    def test_operations(self, exported, function):
        operations = [op for op in load(exported, function).operations if op.op_type != "const"]
        kinds = [op.op_type for op in operations]
        assert set(kinds) <= ALLOWED
        assert kinds.count("read_state") == kinds.count("coreml_update_state") == 1
        assert kinds.count("gather") == 1  # the embedding
        assert max(len(x.shape) for op in operations for x in op.outputs) <= 4
        assert kinds.count("transpose") == (0 if function == "decode" else 8)  # of two layers
        kinds_of_numbers = {
            ct.converters.mil.mil.types.builtin_to_string(x.dtype) for op in operations for x in op.outputs
        }
        assert kinds_of_numbers == {"fp16", "bool"}

    def test_metadata(self, exported):
        given = load_spec(str(exported)).description.metadata
        assert given.author == f"mlx-ttt {mlx_ttt.__version__}"
        assert given.license and given.shortDescription
        assert given.userDefined["co.huggingface.exporters.name"]
        assert given.userDefined[PREFIX + "format"] == "1"
        assert json.loads(given.userDefined[PREFIX + "mini_batch_size"]) == 16
        assert json.loads(given.userDefined[PREFIX + "prefill_tokens"]) == 16
        assert json.loads(given.userDefined[PREFIX + "vocab_size"]) == 160
        assert json.loads(given.userDefined[PREFIX + "bos_token_id"]) == 1
        assert json.loads(given.userDefined[PREFIX + "eos_token_id"]) == [2]
        assert given.userDefined[PREFIX + "weights"] == "float16"
        state = json.loads(given.userDefined[PREFIX + "state"])
        assert state["parts"]["e1"] == [256 + 4 + 256 + 1 + 16, 64]
        assert state["shape"] == list(
            load_spec(str(exported)).description.functions[0].state[0].type.stateType.arrayType.shape
        )

    def test_every_feature_is_described(self, exported):
        for function in load_spec(str(exported)).description.functions:
            assert all(x.shortDescription for x in (*function.input, *function.output, *function.state))

    def test_core_ml_tools_reads_it(self, exported):
        model = ct.models.MLModel(str(exported), skip_model_load=True, function_name="prefill")
        assert model.user_defined_metadata[PREFIX + "format"] == "1"


class TestMetadata:
    def test_ids_that_only_the_tokenizer_knows(self, tmp_path, monkeypatch):
        folder = changed_config(mlx_ttt.bundled_model(), tmp_path / "model", bos_token_id=None, eos_token_id=None)
        given = []

        def stop(name, model, ids, *_):
            given.append(ids)
            raise KeyboardInterrupt

        monkeypatch.setattr(room, "_metadata", stop)
        with pytest.raises(KeyboardInterrupt):
            export(folder, tmp_path / "out.mlpackage")
        with pytest.raises(KeyboardInterrupt):
            export(folder, tmp_path / "out.mlpackage", companions=False)
        assert given == [{"bos_token_id": 1, "eos_token_id": [2]}, {"bos_token_id": None, "eos_token_id": []}]

    @pytest.mark.parametrize(
        ("given", "name"),
        [("/home/me/secret/nice", "nice"), ("org/nice", "nice"), ("", "model"), (None, "model"), (5, "5")],
    )
    def test_name(self, model_dirs, given, name):
        folder = model_dirs("mlp-mamba")
        model, config = mlx_ttt.load_model(folder)
        config["_name_or_path"] = given
        found = room._metadata(model_name(folder, config), model, {}, "float16", Options())
        assert found["co.huggingface.exporters.name"] == name


class TestWeights:
    def test_both_functions_share_them(self, exported, model_dirs):
        model, _ = mlx_ttt.load_model(model_dirs("mlp-mamba"))
        once = 2 * sum(w.size for _, w in tree_flatten(model.parameters()))
        assert once < weights_file(exported).stat().st_size < 1.35 * once  # masks, alignment

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "weights", "bytes_each", "bound"),
        [("mlp-transformer", "int8", 1 + 2 / 32, 0.02), ("linear-transformer", "int4", 0.5 + 2 / 32, 0.3)],
    )
    def test_compressed(self, model_dirs, tmp_path, name, weights, bytes_each, bound):
        """The blocks' matrices and a head of its own, with a scale for every 32 weights; nothing else."""
        package = tmp_path / "small.mlpackage"
        export(model_dirs(name), package, weights=weights, companions=False)
        model, _ = mlx_ttt.load_model(model_dirs(name))
        parameters = tree_flatten(model.parameters())
        matrices = [w.size for name, w in parameters if re.search(r"(proj|lm_head)\.weight$", name)]

        compressed = [op for op in load(package, "decode").operations if op.op_type.startswith("constexpr")]
        assert {op.op_type for op in compressed} == {"constexpr_blockwise_shift_scale"}
        assert {child.op_type for op in compressed for child in op.outputs[0].child_ops} == {"linear"}
        assert {op.data.val.shape[1] // op.scale.val.shape[1] for op in compressed} == {32}
        assert sum(op.data.val.size for op in compressed) == sum(matrices)

        size = bytes_each * sum(matrices) + 2 * (sum(w.size for _, w in parameters) - sum(matrices))
        assert size < weights_file(package).stat().st_size < size + 50_000  # masks, biases, alignment

        ids = list(range(5, 30))
        positions, found = feed(interpreted(package)(), ids, *singly(ids[:5]))
        wanted = expected(model, ids + ids[:5])[0][positions]
        assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


class TestOptions:
    @pytest.mark.slow
    def test_separate(self, model_dirs, tmp_path, exported):
        report = export(model_dirs("mlp-mamba"), tmp_path / "Two.mlpackage", separate=True, companions=False)
        assert [path.name for path in report.packages] == ["Two-decode.mlpackage", "Two-prefill.mlpackage"]
        assert sorted(os.listdir(tmp_path)) == ["Two-decode.mlpackage", "Two-prefill.mlpackage"]
        assert read_metadata(report.packages[1])["mini_batch_size"] == 16
        ids = list(range(20, 60))
        answers = [
            feed(interpreted(path)(), ids[:20], *singly(ids[20:34]), ids[34:])[1]
            for path in (exported, tmp_path / "Two.mlpackage")
        ]
        assert np.array_equal(*answers)

    @pytest.mark.slow
    def test_long_blocks(self, model_dirs, tmp_path):
        steps = []
        export(
            model_dirs("linear-mamba"),
            tmp_path / "a.mlpackage",
            options=Options(prefill_tokens=24),
            companions=False,
            progress=lambda done, total: steps.append((done, total)),
        )
        assert load(tmp_path / "a.mlpackage", "prefill").inputs["inputIds"].shape == (1, 24)
        assert read_metadata(tmp_path / "a.mlpackage")["prefill_tokens"] == 24
        assert [done for done, _ in steps] == list(range(1, steps[-1][1] + 1))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestBytes:
    """Every process writes the same bytes, whatever order its sets and maps have."""

    CODE = """
import sys
from mlx_ttt.export.mil import require_coremltools
require_coremltools()
from mlx_ttt.export.mil.package import export
export(sys.argv[1], sys.argv[2], weights=sys.argv[3], separate=sys.argv[4] == "separate", companions=False)
"""

    def exported_with(self, seed: str, tmp_path: Path, model: Path, *settings: str) -> dict[str, bytes]:
        out = tmp_path / seed / "X.mlpackage"
        out.parent.mkdir()
        command = [sys.executable, "-c", self.CODE, str(model), str(out), *settings]
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(mlx_ttt.__file__).parents[1])}
        subprocess.run(command, check=True, env=environment)
        return files_of(out.parent)

    @pytest.mark.slow
    def test_of_another_process(self, model_dirs, tmp_path, exported):
        seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
        found = self.exported_with(seed, tmp_path, model_dirs("mlp-mamba"), "float16", "together")
        assert len(found) == 3
        assert {name.removeprefix("X.mlpackage/"): data for name, data in found.items()} == files_of(exported)

    @pytest.mark.slow
    @pytest.mark.parametrize(("weights", "form", "files"), [("float16", "together", 3), ("int8", "separate", 6)])
    def test_of_two_other_processes(self, model_dirs, tmp_path, weights, form, files):
        first, second = (
            self.exported_with(seed, tmp_path, model_dirs("linear-mamba"), weights, form) for seed in ("1", "2")
        )
        assert len(first) == files
        assert first == second

    @pytest.mark.slow
    def test_of_another_export_in_one_process(self, model_dirs, tmp_path, exported):
        export(model_dirs("mlp-mamba"), tmp_path / "Again.mlpackage", companions=False)
        assert files_of(tmp_path / "Again.mlpackage") == files_of(exported)

    def test_identifiers_follow_from_the_content(self, exported, tmp_path):
        def items(package: Path) -> dict[str, str]:
            manifest = json.loads((package / "Manifest.json").read_text())
            assert manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["name"] == "model.mlmodel"
            return {item["name"]: id for id, item in manifest["itemInfoEntries"].items()}

        changed = Path(shutil.copytree(exported, tmp_path / "Changed.mlpackage"))
        weights_file(changed).write_bytes(weights_file(exported).read_bytes() + b"\0")
        conversion._name_by_content(changed)
        before, after = items(exported), items(changed)
        assert before["model.mlmodel"] == after["model.mlmodel"]
        assert before["weights"] != after["weights"]


class TestSessions:
    def test_save_and_restore(self, exported):
        """A state saved after the prompt goes on in another session as in the first."""
        sessions = interpreted(exported)
        first, second = sessions(), sessions()
        prompt, rest = list(range(20, 43)), list(range(50, 80))
        feed(first, prompt)
        saved = first.state.astype(np.float16)
        assert np.array_equal(saved, first.state)  # nothing is lost in float16
        wanted = feed(first, rest)[1]
        second.restore(saved, len(prompt))
        assert np.array_equal(feed(second, rest)[1], wanted)
        assert np.array_equal(second.state, first.state)

    @pytest.mark.slow
    def test_sessions_do_not_disturb_each_other(self, exported):
        sessions = interpreted(exported)
        alone = feed(sessions(), range(20, 60))[1]
        one, other = sessions(), sessions()
        feed(other, range(90, 120))
        assert np.array_equal(feed(one, range(20, 60))[1], alone)


class TestBadInput:
    @pytest.fixture(autouse=True)
    def nothing_left(self, tmp_path):
        (tmp_path / "kept").mkdir()
        yield
        assert os.listdir(tmp_path) == ["kept"]

    @pytest.mark.parametrize(("model", "message"), [("nowhere", "no such model directory"), ("empty", r"config\.json")])
    def test_no_model(self, tmp_path, model, message):
        (tmp_path / "kept/empty").mkdir()
        with pytest.raises(CheckpointError, match=message):
            export(tmp_path / "kept" / model, tmp_path / "out.mlpackage")

    def test_no_tokenizer(self, model_dirs, tmp_path):
        with pytest.raises(TokenizerError, match="no tokenizer"):
            export(model_dirs("linear-mamba"), tmp_path / "out.mlpackage")

    @pytest.mark.parametrize(
        ("separate", "mode", "names"),
        [(True, "state", ["out-decode", "out-prefill"]), (False, "io", ["out"])],
    )
    def test_companions_are_told_of_the_packages(self, tmp_path, monkeypatch, separate, mode, names):
        def stop(folder, model_dir, *about):
            told.append((about[0], about[-1]))
            raise KeyboardInterrupt

        told = []
        monkeypatch.setattr(room, "write_companions", stop)
        with pytest.raises(KeyboardInterrupt):
            options = Options(state_mode=mode)
            export(mlx_ttt.bundled_model(), tmp_path / "out.mlpackage", options=options, separate=separate)
        assert told == [(names, mode == "state")]

    def test_a_tokenizer_that_cannot_be_used_is_found_before_converting(self, model_dirs, tmp_path, monkeypatch):
        folder = Path(shutil.copytree(model_dirs("linear-mamba"), tmp_path / "kept/model"))
        Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
        monkeypatch.setattr(room, "convert_function", lambda *_: pytest.fail("converts"))
        with pytest.raises(TokenizerError, match="no WordLevel model"):
            export(folder, tmp_path / "out.mlpackage")

    @pytest.mark.parametrize("eos", ["</s>", [2, None], 2.0])
    def test_end_tokens_that_are_no_ids(self, model_dirs, tmp_path, eos):
        folder = changed_config(model_dirs("linear-mamba"), tmp_path / "kept/model", eos_token_id=eos)
        with pytest.raises(CheckpointError, match=r"model: eos_token_id must be a token id or a list"):
            export(folder, tmp_path / "out.mlpackage", companions=False)

    @pytest.mark.parametrize("there", ["out.mlpackage", "out-companions"])
    def test_out_exists(self, tmp_path, there):
        (tmp_path / "kept" / there).mkdir()
        with pytest.raises(OutputError, match=f"{there}: exists already"):
            export(mlx_ttt.bundled_model(), tmp_path / "kept/out.mlpackage")
        assert os.listdir(tmp_path / "kept") == [there]

    def test_wrong_name(self, tmp_path):
        with pytest.raises(OutputError, match=r"ends in \.mlpackage"):
            export(mlx_ttt.bundled_model(), tmp_path / "out")

    def test_wrong_block(self, tmp_path):
        with pytest.raises(TTTError, match="multiple of the mini-batch size, 16"):
            export(mlx_ttt.bundled_model(), tmp_path / "out.mlpackage", options=Options(prefill_tokens=24))

    @pytest.mark.parametrize(
        ("factor", "message"),
        [(1e6, "does not fit float16"), (math.inf, "not a finite number"), (math.nan, "not a finite number")],
    )
    def test_a_weight_that_does_not_fit(self, tmp_path, model_dirs, factor, message):
        folder = Path(shutil.copytree(model_dirs("linear-mamba"), tmp_path / "kept/model"))
        weights = mx.load(str(folder / "model.safetensors"))
        weights["model.layers.1.mlp.up_proj.weight"] *= factor
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        with pytest.raises(CheckpointError, match=f"kept/model: a weight .*{message}"):
            export(folder, tmp_path / "out.mlpackage", companions=False)

    def test_a_full_disk_before(self, model_dirs, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OutputError, match="the disk is full"):
            export(model_dirs("linear-mamba"), tmp_path / "out.mlpackage", companions=False)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "failure",
        [
            OSError(errno.ENOSPC, "No space left"),
            pytest.param(RuntimeError("write failed"), marks=pytest.mark.slow),
        ],
    )
    def test_a_full_disk_while_writing(self, model_dirs, tmp_path, monkeypatch, failure):
        usage = shutil.disk_usage(tmp_path)

        def fill(*_):
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
            raise failure

        monkeypatch.setattr(conversion, "save_multifunction", fill)
        with pytest.raises(OutputError, match=r"disk is full|cannot be written, 0\.00 GB are free"):
            export(model_dirs("linear-mamba"), tmp_path / "out.mlpackage", companions=False)

    @pytest.mark.slow
    def test_interrupted(self, model_dirs, tmp_path):
        def interrupt(done, total):
            if done == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export(model_dirs("linear-mamba"), tmp_path / "out.mlpackage", companions=False, progress=interrupt)


class TestCommand:
    @pytest.mark.slow
    def test_export(self, tmp_path):
        out = tmp_path / "S.mlpackage"
        result = CliRunner().invoke(command, [str(mlx_ttt.bundled_model()), str(out), "--weights", "int8"])
        assert result.exit_code == 0, result.output
        assert sorted(os.listdir(tmp_path)) == ["S-companions", "S.mlpackage"]
        assert (tmp_path / "S-companions/tokenizer.json").is_file()
        layout = StateLayout.of(mlx_ttt.load_model()[0].args)
        assert f"state {layout.nbytes / 1e6:.2f} MB" in result.stdout
        assert re.search(r"peak memory \d+\.\d+ GB", result.stdout)

    def test_one_line_for_bad_input(self, tmp_path):
        result = CliRunner().invoke(command, [str(tmp_path / "nowhere"), str(tmp_path / "o.mlpackage")])
        assert result.exit_code == 2
        assert re.fullmatch(r"error: [^\n]+\n", result.stderr)

    @pytest.mark.parametrize(
        ("hidden", "message"),
        [
            ("coremltools", r'pip install "mlx-ttt\[coreml\]"'),
            ("coremltools.libmilstoragepython", "use Python 3.10 to"),
        ],
    )
    def test_without_coremltools(self, tmp_path, hidden, message):
        """In a process of its own, where an importer hides it."""
        code = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == {hidden!r} else found(name, package)
from mlx_ttt.cli.coreml import coreml
coreml([{str(tmp_path)!r}, "out.mlpackage"])
"""
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(mlx_ttt.__file__).parents[1]
        )
        assert result.returncode == 2
        assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
        assert re.search(message, result.stderr)
