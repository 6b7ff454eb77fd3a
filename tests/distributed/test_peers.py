"""A process that dies, hangs, fails or never comes is an error on the others, not a hang."""

from __future__ import annotations

import json
import os
import signal

import pytest

from mlx_ttt.distributed.peers import PORT_OFFSET, Links, links

from .processes import run, start, wait

pytestmark = pytest.mark.slow


def survivors(tmp_path, size: int, arguments=(), act=lambda process: None):
    """How the others ended after something happened to rank 1. They all do, within a minute."""
    processes = start(tmp_path, size, "forever", *arguments)
    try:
        for process in processes:
            assert process.stdout.readline() == "running\n"
        act(processes[1])
        return wait([p for i, p in enumerate(processes) if i != 1], 60)
    finally:
        processes[1].kill()
        processes[1].communicate()


def assert_one_line(ended, words: str = ""):
    """One line of ours. MLX's ring writes lines of its own, piece by piece from its own thread, also into ours."""
    for e in ended:
        assert e.status == 2 and e.stderr.count("error: ") == 1 and "Traceback" not in e.stderr, e.stderr
    assert any(words in e.stderr for e in ended), [e.stderr for e in ended]


@pytest.mark.parametrize("size", [2, 4])
def test_one_is_killed(tmp_path, size):
    assert_one_line(survivors(tmp_path, size, act=lambda process: process.kill()))


@pytest.mark.parametrize("size", [2, 4])
def test_one_hangs(tmp_path, size):
    """As if its cable were unplugged: its connections stay open."""
    stop = lambda process: os.kill(process.pid, signal.SIGSTOP)  # noqa: E731
    assert_one_line(survivors(tmp_path, size, ["5"], stop), "with rank 1 has been silent for 5 seconds")


def test_one_fails(tmp_path):
    assert_one_line(survivors(tmp_path, 2, ["30", "yes"]))


def test_one_ends_before_the_other(tmp_path):
    run(tmp_path, 2, "uneven_ends")


def test_one_never_comes(tmp_path):
    processes = start(tmp_path, 2, "alone")
    processes[1].kill()
    processes[1].communicate()
    assert_one_line(wait(processes[:1], 60), "rank 1 cannot be reached at 127.0.0.1 port")


def test_one_dies_while_mlx_connects(tmp_path):
    first, _ = wait(start(tmp_path, 2, "one_dies_in_between"), 60)
    assert_one_line([first])


class TestLinks:
    def test_one_process(self):
        assert links({}) is None
        assert links({"MLX_RANK": "0"}) is None

    def test_ring(self, tmp_path):
        hosts = tmp_path / "hosts"
        hosts.write_text(json.dumps([["10.0.0.1:5000", "10.0.1.1:5001"], ["10.0.0.2:5002"], ["10.0.0.3:5003"]]))
        ports = [("10.0.0.1", 5000), ("10.0.0.2", 5002), ("10.0.0.3", 5003)]
        addresses = [(ip, port + PORT_OFFSET) for ip, port in ports]
        for rank, after in ((0, 1), (1, 2), (2, 0)):
            found = links({"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)})
            assert found == Links(rank, 3, addresses[rank], 1, (after, addresses[after]))

    def test_jaccl(self, tmp_path):
        devices = tmp_path / "devices"
        devices.write_text(json.dumps([[None, "a"], ["b", None]]))
        environment = {"MLX_IBV_DEVICES": str(devices), "MLX_JACCL_COORDINATOR": "10.0.0.1:5000"}
        address = ("10.0.0.1", 5000 + PORT_OFFSET)
        assert links(environment | {"MLX_RANK": "0"}) == Links(0, 2, address, 1, None)
        assert links(environment | {"MLX_RANK": "1"}) == Links(1, 2, None, 0, (0, address))
