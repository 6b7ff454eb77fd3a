"""The log, the picture, times in words."""

from __future__ import annotations

import sys

import pytest

from mlx_ttt.errors import OutputError, TrainingError
from mlx_ttt.training.report import Clock, Log, duration, plot

BANDS = [
    {"start": 0, "stop": 2048, "mean": 4.0, "half_width": 0.1},
    {"start": 2048, "stop": 2049, "mean": 3.0, "half_width": None},
]
ENTRIES = [
    {"step": 0, "held_out": 6.0, "bands": BANDS},
    {"step": 1, "loss": 5.0},
    {"step": 2, "loss": None},
    {"step": 2, "held_out": 5.0, "bands": BANDS},
    {"step": 3, "loss": 4.0},
]


class TestLog:
    def test_going_back(self, tmp_path):
        log = Log(tmp_path / "log.jsonl")
        assert log.entries() == []
        for entry in ENTRIES:
            log.append(entry)
        with log.file.open("a") as file:
            file.write('{"step": 4, "lo')  # killed while writing
        assert log.entries() == ENTRIES
        log.go_back(2, evaluated=0)
        assert log.entries() == ENTRIES[:3]
        log.append(ENTRIES[4])
        assert log.entries() == [*ENTRIES[:3], ENTRIES[4]]

    def test_no_space(self, tmp_path):
        (tmp_path / "log.jsonl").symlink_to("/dev/full")
        with pytest.raises(OutputError, match=r"log\.jsonl: cannot be written: No space left"):
            Log(tmp_path / "log.jsonl").append({})


class TestPicture:
    @pytest.mark.slow
    @pytest.mark.parametrize("count", [0, 1, 2, 5])
    def test_any_log(self, count, tmp_path):
        pytest.importorskip("matplotlib")
        plot(ENTRIES[:count], tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    def test_without_matplotlib(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(TrainingError, match=r"pip install 'mlx-ttt\[bench\]'"):
            plot(ENTRIES, tmp_path / "x.png")


def test_times_in_words():
    times = [12, 99, 150, 3 * 3600 + 60, 50 * 3600, float("inf")]
    assert [duration(t) for t in times] == ["12 s", "99 s", "2 min", "3 h 1 min", "2 d 2 h", "?"]


def test_clock(monkeypatch):
    times = iter([0.0, 2.0, 10.0, 11.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock()
    clock.count(100)
    clock.start()
    clock.count(50)
    assert clock.tokens_per_second == 50
