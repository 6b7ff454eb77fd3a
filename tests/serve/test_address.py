"""Where a server may listen, and what it says where it cannot."""

from __future__ import annotations

import socket

import pytest

from mlx_ttt.serve.address import ServeError, is_loopback, listen


def test_a_port_in_use():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "a" * 64 + ".org"])
def test_an_address_that_is_not_here(host):
    with pytest.raises(ServeError, match=f"cannot listen on {host} port 0: "):
        listen(host, 0)


def test_clients_reach_it():
    with listen("localhost", 0) as listener, socket.create_connection(listener.getsockname()[:2], timeout=5):
        assert listener.accept()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host, loopback):
    assert is_loopback(host) is loopback
