"""The benchmarks: what is compared, who runs when, what is skipped, and the arithmetic of the tables."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest

from benchmarks import models, report, training
from benchmarks.__main__ import main, plan
from benchmarks.measure import Comparison, Contender, Effort
from benchmarks.mlx_worker import Model
from benchmarks.protocol import Worker, WorkerError

TINY = models.SIZES["tiny"]


@pytest.mark.parametrize("size", ["125M", "350M", "1.3B"])
@pytest.mark.parametrize("name", models.OTHERS)
def test_others_have_as_many_parameters(size, name):
    ours, other = (models.parameters(models.configuration(n, models.SIZES[size])) for n in ("TTT-Linear", name))
    assert abs(other / ours - 1) < 0.02


def test_configurations_are_the_released_ones():
    config = models.configuration("TTT-MLP", models.SIZES["1.3B"])
    released = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 32}
    assert config.items() >= released.items()
    assert config["pre_conv"] and config["share_qk"] and config["use_gate"]
    assert config["ttt_base_lr"] == 0.1
    assert 1.25e9 < models.parameters(models.configuration("TTT-Linear", models.SIZES["1.3B"])) < 1.35e9


def test_others_are_what_their_names_say():
    transformer, mamba2, gdn = (
        models.build(models.configuration(n, TINY)) for n in ("Transformer", "Mamba2", "Gated DeltaNet")
    )
    assert [type(c).__name__ for c in transformer.make_cache()] == ["KVCache"] * TINY.layers
    assert {type(layer.mixer).__name__ for layer in mamba2.layers} == {"Mamba2Block"}
    assert {type(layer.linear_attn).__name__ for layer in gdn.layers} == {"GatedDeltaNet"}


def test_half_precision_halves_the_weights_that_follow_it():
    config = models.configuration("TTT-Linear", models.SIZES["125M"])
    assert models.weight_bytes(config, "float32") == 4 * models.parameters(config)
    inner = 12 * (12 * 64 * 64 + 12 * 64 + 12 * 768 + 12 + 16 + 2 * 768)  # W1, b1, learning rate, token_idx, norm
    assert models.weight_bytes(config, "bfloat16") == 2 * models.parameters(config) + 2 * inner


def test_prefill_flops():
    """Of the projections, of the scan, and of one position's logits, counted by hand."""
    config = models.configuration("TTT-Linear", TINY)
    D, K, C, V = 16, 16, 64, 512
    in_matrices = 4 * C * C + 3 * C * 160 + 4 * C  # the last: learning rates of 4 heads
    scan = 4 * (3 * 2 * D * D + 2 * 2 * K * D)
    expected = 100 * 2 * (2 * in_matrices + scan) + 2 * V * C
    flops = models.prefill_flops(config, 100)
    assert expected < flops < 1.05 * expected  # norms and convolutions are counted in


def test_attention_is_quadratic():
    config = models.configuration("Transformer", models.SIZES["125M"])
    once, twice = (models.prefill_flops(config, n) for n in (10_000, 20_000))
    assert twice - 2 * once == pytest.approx(12 * 2 * 768 * (20_000**2 - 2 * 10_000**2), rel=1e-3)


def test_memory_estimate_holds_the_weights_and_grows_with_keys_only():
    config = {name: models.configuration(name, models.SIZES["1.3B"]) for name in ("TTT-MLP", "Transformer")}
    for c in config.values():
        assert models.memory_estimate(c, "float32", 128) > 4 * models.parameters(c)
    long, longer = 8192, 32768
    assert models.memory_estimate(config["TTT-MLP"], "float32", long) == models.memory_estimate(
        config["TTT-MLP"], "float32", longer
    )
    keys_and_values = 2 * 24 * 8 * 64 * 4 * (longer - long)
    more = models.memory_estimate(config["Transformer"], "float32", longer) - models.memory_estimate(
        config["Transformer"], "float32", long
    )
    assert more >= keys_and_values


# Who runs when


class Stub:
    """A worker that answers at once and writes down who was called, in the order of calls."""

    calls: ClassVar[list] = []

    def __init__(self, name, seconds=1.0):
        self.name, self.seconds, self.alive = name, seconds, False
        self.seconds_of = {}

    def call(self, method, **arguments):
        self.alive = True
        if method == "measure":
            return {"bytes_per_second": 1e10, "flops_per_second": 1e11}
        Stub.calls.append((self.name, method, arguments.get("tokens") if method == "prefill" else arguments["context"]))
        if isinstance(self.seconds, Exception):
            raise self.seconds
        seconds = self.seconds_of.get(arguments["tokens"], self.seconds)
        return {"seconds": seconds, "peak_bytes": 2e6, "state_bytes": 1e6, "resident_bytes": 5e6}

    def stop(self):
        self.alive = False


@pytest.fixture
def compare():
    def run(workers, prompts, contexts, effort=None, model="TTT-Linear"):
        Stub.calls = []
        lines = []
        config = models.configuration(model, TINY)
        contenders = [Contender(w.name, config, "float32", w) for w in workers]
        comparison = Comparison("tiny", contenders, Stub("limits"), effort or Effort(rounds=2), lines.append)
        return comparison.run(prompts, contexts), lines

    return run


def test_contenders_take_turns(compare):
    result, _ = compare([Stub("TTT-Linear"), Stub("Mamba2")], [16, 32], [16])
    order = [("TTT-Linear", "prefill"), ("Mamba2", "prefill")] * 4 + [
        ("TTT-Linear", "decode"),
        ("Mamba2", "decode"),
    ] * 2
    assert [call[:2] for call in Stub.calls] == order
    assert len(result["read"]["Mamba2"]["32"]) == 2
    assert len(result["limits"]) == 12


def test_a_model_that_does_not_fit_is_skipped_with_a_line(compare, monkeypatch):
    monkeypatch.setattr("benchmarks.machine.available_memory", lambda: 10_000_000)
    result, lines = compare([Stub("TTT-Linear")], [16], [16])
    assert result["read"] == {} and Stub.calls == []
    assert "TTT-Linear, 16 tokens: skipped, needs about 0.5 GB of memory, 0.0 GB are free" in result["skipped"]
    assert lines[0] == f"tiny: {result['skipped'][0]}"
    assert "skipped, needs about 0.5 GB" in report.text({"machine": MACHINE, "comparisons": [result], "seconds": 1})


def test_models_that_do_not_fit_together_run_alone(compare, monkeypatch):
    needs = models.memory_estimate(models.configuration("TTT-Linear", TINY), "float32", 16)
    workers = [Stub("TTT-Linear"), Stub("Mamba2")]
    alive = []
    call = Stub.call

    def watch(self, method, **arguments):
        if self in workers:  # and not the one that measures the machine
            alive.append(sum(w.alive for w in workers if w is not self))
        return call(self, method, **arguments)

    monkeypatch.setattr(Stub, "call", watch)
    monkeypatch.setattr("benchmarks.machine.available_memory", lambda: needs + 100_000)
    compare(workers, [], [16, 16])
    assert max(alive) == 0
    # Each reads anew for its turn, and writes as often as it was asked to.
    assert [c[:2] for c in Stub.calls[:4]] == [("TTT-Linear", m) for m in ("prefill", "decode", "decode")] + [
        ("Mamba2", "prefill")
    ]


def test_slow_ones_are_skipped_and_others_go_on(compare):
    effort = Effort(rounds=1, patience=100)
    result, _ = compare([Stub("TTT-Linear", 1.0), Stub("Mamba", 30.0)], [16, 64], [64], effort)
    assert "Mamba, 64 tokens: skipped, would take about 120 s, longer than --patience 100" in result["skipped"]
    assert set(result["decode"]) == {"TTT-Linear"}
    assert set(result["read"]["TTT-Linear"]) == {"16", "64"}


def test_what_grows_faster_than_the_prompt_is_predicted_so(compare):
    transformer = Stub("Transformer")
    transformer.seconds_of = {16: 1.0, 32: 4.0}
    effort = Effort(rounds=1, patience=15)
    result, _ = compare([transformer], [16, 32, 64], [64], effort, "Transformer")
    assert result["skipped"] == ["Transformer, 64 tokens: skipped, would take about 16 s, longer than --patience 15"]
    # It writes after them nevertheless: keys and values need not be read.
    assert Stub.calls[-1] == ("Transformer", "decode", 64)
    assert ("Transformer", "prefill", 64) not in Stub.calls


def test_a_worker_that_fails_is_skipped(compare):
    result, _ = compare([Stub("Mamba2", WorkerError("the process ended: killed")), Stub("TTT-Linear")], [16], [16])
    assert result["skipped"] == ["Mamba2, 16 tokens: skipped, the process ended: killed"]
    assert len(result["decode"]["TTT-Linear"]["16"]) == 2


def test_no_round_begins_after_the_budget(compare):
    for budget, rounds in ((0, 1), (60, 9)):
        result, _ = compare([Stub("TTT-Linear")], [16], [], Effort(rounds=9, budget=budget))
        assert len(result["read"]["TTT-Linear"]["16"]) == rounds


# Workers


def test_a_worker_says_why_it_failed():
    worker = Worker("no_worker", {}, threads=1)
    with pytest.raises(WorkerError, match=r"the process ended: .*No module named benchmarks\.no_worker"):
        worker.call("prefill")
    assert not worker.alive


@pytest.mark.slow
def test_errors_of_a_call_leave_the_worker_alive():
    worker = Worker("limits_worker", {"dtype": "float32", "threads": 1}, threads=1)
    try:
        with pytest.raises(WorkerError, match=r"AttributeError: .* has no attribute 'prefill'"):
            worker.call("prefill")
        assert worker.call("measure").keys() == {"bytes_per_second", "flops_per_second"}
    finally:
        worker.stop()


def test_a_state_is_as_large_as_it_says_and_stays_as_it_was():
    config = models.configuration("TTT-Linear", TINY)
    model = Model(config, "float32")
    read = model.prefill(33)
    before = [c.offset for c in model.states[33]]
    written = model.decode(33, 16)
    assert read["state_bytes"] == written["state_bytes"] == state_bytes(config)
    assert [c.offset for c in model.states[33]] == before
    assert 4 * models.parameters(config) < read["peak_bytes"] < read["resident_bytes"]
    with pytest.raises(ValueError, match="no prompt of 99 tokens has been read"):
        model.decode(99, 1)


def test_other_states_do_not_count_in_peak_memory():
    model = Model(models.configuration("Transformer", TINY), "float32")
    alone = model.prefill(64)["peak_bytes"]
    other = model.decode(20_000, 1)["state_bytes"]
    assert other > 5e6
    # Which intermediates are there together depends on the threads: 0.3 MB at most.
    assert model.prefill(64)["peak_bytes"] < alone + other / 5


def test_keys_and_values_need_not_be_read():
    model = Model(models.configuration("Transformer", TINY), "float32")
    sizes = {model.decode(1000, 8)["state_bytes"] for _ in range(3)}  # 1024 are allocated: they are cut back each time
    assert sizes == {2 * 2 * 16 * 1024 * 4}  # 2 layers, keys and values, 1 head of 16


def state_bytes(config: dict) -> int:
    """W1, b1, 16 rows (k, e) of every head, and 3 inputs of 2 convolutions, in every layer."""
    H, D, C = 4, 16, 64
    return config["num_hidden_layers"] * 4 * (H * (D * D + D + 16 * 2 * D) + 2 * 3 * C)


# Tables

MACHINE = {
    "device": "a chip",
    "cores": 2,
    "threads": 2,
    "memory_bytes": 2**34,
    "system": "an OS",
    "blas": "a BLAS",
    "compiler": "g++",
    "mlx": "1",
    "mlx-lm": "2",
    "numpy": "3",
    "python": "4",
    "commit": None,
}


def test_ratio_is_of_the_same_round():
    assert report.ratio([2.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == "3.00 (2.00…4.00)"
    assert report.ratio([3.0], [2.0]) == "1.50"


def test_table_is_markdown():
    assert report.table(["a", "bcd"], [["efgh", "1"]]) == "| a    | bcd |\n| ---- | --: |\n| efgh |   1 |"


def test_a_report_of_known_figures(compare):
    """Ten times as many tokens in the same time; limits of 1e10 bytes and 1e11 operations per second."""
    result, _ = compare([Stub("TTT-Linear", 0.5), Stub("Mamba2", 1.0)], [100, 1000], [100, 1000])
    text = report.text({"machine": MACHINE, "comparisons": [result], "seconds": 120})
    flops = models.prefill_flops(models.configuration("TTT-Linear", TINY), 1000)
    assert f"2,000 ({0.5 / (flops / 1e11):.2f})" in text
    nbytes = 4 * models.parameters(models.configuration("TTT-Linear", TINY)) + 1e6
    assert f"64.0 ({0.5 / 32 / (nbytes / 1e10):.2f})" in text
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| Mamba2")]
    assert ["2.00 (2.00…2.00)"] * 2 in [[cell.strip() for cell in line[1:]] for line in lines]
    assert "1 000 : 100" in text
    assert "Measured in 2 minutes" in text


def test_against_torch():
    def answers(seconds, **more):
        return [{"seconds": s, "state_bytes": 1, "resident_bytes": 3e6, "tokens": 32, **more} for s in seconds]

    read = {"TTT-MLP": {"64": answers([1.0, 2.0])}}
    read["PyTorch TTT-MLP"] = {
        "64": answers([3.0, 4.0], resident_bytes=6e6, resident_bytes_all_logits=1e7, seconds_all_logits=8.0)
    }
    decode = {"TTT-MLP": {"64": answers([1.0])}, "PyTorch TTT-MLP": {"64": answers([0.5])}}
    rows = report.torch_rows("TTT-MLP", read, decode)
    assert [row[-1] for row in rows] == ["2.50 (2.00…3.00)", "6.00 (4.00…8.00)", "0.50", "0.30", "0.50"]
    assert report.torch_rows("TTT-Linear", read, decode) == []


# The command


def test_plan_on_a_cpu():
    assert plan("125M", on_cpu=True) == plan("1.3B", on_cpu=False)
    assert plan("350M", on_cpu=True)[0] == (128, 512, 2048)
    assert plan("1.3B", on_cpu=True) == ((), (128, 128))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", "7B"], "'7B' is none of"),
        (["--models", "TTT-Linear,GPT"], "'GPT' is none of"),
        (["--torch-reference", "nothing.py"], "nothing.py: no such file"),
        (["--only", "torch"], "--only torch needs --torch-reference FILE"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_measures_and_reports(tmp_path, capsys):
    """The real thing on the tiny model; then the tables again, from its JSON."""
    main(["--quick", "--only", "models", "--models", "TTT-MLP", "--threads", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    (comparison,) = json.loads((tmp_path / "results.json").read_text())["comparisons"]
    assert comparison["skipped"] == []
    for what in ("read", "decode"):
        short, long = (comparison[what]["TTT-MLP"][n][0] for n in ("32", "128"))
        assert short["state_bytes"] == long["state_bytes"]
    assert printed == (tmp_path / "results.md").read_text() + "\n"
    assert "1 threads; BLAS: " in printed
    again = tmp_path / "again"
    main(["--report", str(tmp_path / "results.json"), "--out", str(again)])
    assert (again / "results.md").read_text() == (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_plots(compare, tmp_path):
    plots = pytest.importorskip("benchmarks.plots")
    result, _ = compare([Stub("TTT-Linear", 0.5), Stub("Mamba2", 1.0)], [100, 1000], [100, 1000])
    plots.write({"comparisons": [result]}, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.png", "tiny.svg"]
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")


# A training step


class StepStub:
    """A worker that answers at once: a step of T tokens takes T / `speed` seconds and T KB beside the weights."""

    def __init__(self, calls, name, speed=100.0, error=None):
        self.calls, self.name, self.speed, self.error = calls, name, speed, error

    def call(self, method, tokens):
        self.calls.append((self.name, tokens))
        if self.error:
            raise WorkerError(self.error)
        seconds = tokens / self.speed
        sizes = {"peak_bytes": 2e9 + 1e3 * tokens, "weight_bytes": 2e9, "resident_bytes": 3e9 + 1e3 * tokens}
        return {"seconds": seconds, "busy_seconds": 2 * seconds, "loss": 1.0} | sizes

    def stop(self):
        self.calls.append((self.name, "stop"))


def steps(calls, **speeds):
    ways = {"ours": training.IN_SEGMENTS, "plain": training.AT_ONCE}
    return [
        training.Case(ways[name], tokens, StepStub(calls, name, speed))
        for tokens in (1000, 4000)
        for name, speed in speeds.items()
    ]


def test_training_steps_take_turns_and_are_compared_within_a_round():
    calls = []
    cases = steps(calls, ours=100.0, plain=50.0)
    assert training.compare(cases, 2, 1e9, str) == []
    in_turns = [("ours", 1000), ("plain", 1000), ("ours", 4000), ("plain", 4000)]
    assert calls[:8] == 2 * in_turns
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in training.text("", cases).splitlines()[2:8]]
    assert rows[2] == ["gradients", "1 000", "2.00 GB", "0.00 GB", "3.00 GB", "100", "50", ""]
    assert rows[5][2:] == ["2.00 GB", "0.00 GB", "3.00 GB", "50", "25", "0.50 (0.50…0.50)"]
    assert "at 4 000 tokens, 1.00 (1.00…1.00) times the tokens/s at 1 000" in training.text("", cases)


def test_training_steps_that_are_too_much_are_left_out(monkeypatch):
    monkeypatch.setattr("benchmarks.machine.available_memory", lambda: 9e9)
    calls = []
    cases = steps(calls, ours=100.0, plain=100.0)
    lines = training.compare(cases, 1, 1e9, str)
    assert lines == ["value_and_grad, 4000 tokens: left out, needs about 12.0 GB of memory, 9.0 GB are free"]
    assert ("ours", 4000) in calls and ("plain", 4000) not in calls
    assert training.compare(steps([], ours=100.0), 1, 39, str) == [
        "gradients, 4000 tokens: left out, would take about 40 s, longer than --patience 39"
    ]
    failing = [training.Case(training.IN_SEGMENTS, 10, StepStub([], "ours", error="no room"))]
    assert training.compare(failing, 2, 1e9, str) == ["gradients, 10 tokens: left out, no room"]
    assert "Nothing was measured" in training.text("", failing)


@pytest.mark.parametrize(
    "arguments, message",
    [(["--models", "7B"], "'7B' is none of bundled"), (["--beside", "nothing.py"], "nothing.py: no such file")],
)
def test_bad_arguments_of_the_training_benchmark(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        training.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_measures_training_steps(tmp_path):
    """The real thing: every way computes the same loss of the same text."""
    beside = tmp_path / "beside.py"
    beside.write_text("from mlx_ttt.training import gradients\n")
    given = training.options().parse_args(["--lengths", "40", "--threads", "1", "--beside", str(beside)])
    cases = training.plan("tiny", given)
    assert training.compare(cases, 1, 60, str) == []
    assert [case.way for case in cases] == [*training.WAYS, "beside.py"]
    assert len({round(case.answers[0]["loss"], 4) for case in cases}) == 1
