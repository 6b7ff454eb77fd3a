"""Watches whether the other machines are still there, so that losing one is an error and not a hang.

MLX's ring raises an error when a connection is closed. It waits forever for a machine that is unplugged or hangs, and
so does RDMA (JACCL) for one that has died. So each process keeps TCP connections of its own to its neighbours, and
sends a byte over them every second. A connection that is closed without a goodbye, or silent for half a minute, is a
lost machine. Then this process ends with one line and status 2: its main thread may stand in a sum that will never
come. Its own neighbours notice that, and so on.

Where the neighbours are is in what `mlx.launch` gives to each process. The ports are those of MLX plus 1000.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DistributedError

JOIN_LIMIT = 50.0  # seconds until all must be there: less than a minute, but a slow start, of Python and a disk
SILENCE_LIMIT = 30.0  # seconds without a byte until a machine counts as lost
PORT_OFFSET = 1000
_BEAT, _GOODBYE = b".", b"!"
_BEAT_INTERVAL, _CLOSE_INTERVAL = 1.0, 0.2  # seconds

Address = tuple[str, int]


@dataclass(frozen=True)
class Links:
    """Who connects to whom.

    Attributes:
        rank, size: of this process, and how many there are.
        listens: where this process waits for the others; None: nowhere.
        expects: how many connect to it.
        connects: to which rank it connects, and where that listens; None: to nobody.
    """

    rank: int
    size: int
    listens: Address | None
    expects: int
    connects: tuple[int, Address] | None


def links(environment: Mapping[str, str]) -> Links | None:
    """From what `mlx.launch` has set. None: one process only, or MPI, whose launcher ends all if one dies.

    In MLX's ring each process knows a way to the next one. With JACCL all know a way to the first.
    """
    if "MLX_RANK" not in environment:
        return None
    rank = int(environment["MLX_RANK"])
    if hosts := _json_file(environment.get("MLX_HOSTFILE")):
        addresses = [_address(host[0]) for host in hosts]
        after = (rank + 1) % len(addresses)
        return Links(rank, len(addresses), addresses[rank], 1, (after, addresses[after]))
    if devices := _json_file(environment.get("MLX_IBV_DEVICES")):
        first, size = _address(environment["MLX_JACCL_COORDINATOR"]), len(devices)
        return Links(rank, size, first, size - 1, None) if rank == 0 else Links(rank, size, None, 0, (0, first))
    return None


def _json_file(path: str | None) -> list:
    if not path:
        return []
    text = Path(path).read_text()
    return json.loads(text) if text.strip() else []


def _address(text: str) -> Address:
    """Of our own connection, beside one of MLX's at "ip:port"."""
    ip, port = text.rsplit(":", 1)
    return ip, int(port) + PORT_OFFSET


class Peers:
    """The neighbours of this process, watched by a thread from the moment it is made until `close`.

    Raises:
        DistributedError: not all processes come within `JOIN_LIMIT`, or a port is taken.
    """

    def __init__(self, links: Links):
        deadline = time.monotonic() + JOIN_LIMIT
        self._neighbours = _connect(links, deadline)
        _meet(self._neighbours, links.size, deadline)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def close(self, goodbye: bool) -> None:
        """Stop watching. Without a goodbye, the others take this process as lost."""
        self._closing.set()
        self._thread.join()
        for connection in self._neighbours:
            with contextlib.suppress(OSError):
                if goodbye:
                    connection.send(_GOODBYE)
                connection.shutdown(socket.SHUT_WR)
            if not goodbye:
                connection.close()
        # After a goodbye they stay open until the process ends: closing now could overtake the goodbye.

    def _watch(self) -> None:
        heard = dict.fromkeys(self._neighbours, time.monotonic())
        next_beat = 0.0
        while heard and not self._closing.is_set():
            for connection in select.select(list(heard), [], [], _CLOSE_INTERVAL)[0]:
                received = _receive(connection)
                heard[connection] = time.monotonic()
                if received.endswith(_GOODBYE):
                    del heard[connection]
                elif not received:
                    _end(self._neighbours[connection], "has stopped")
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + _BEAT_INTERVAL
                for connection in heard:
                    with contextlib.suppress(OSError):  # what is wrong is seen when reading
                        connection.send(_BEAT)
            for connection, since in heard.items():
                if now - since > SILENCE_LIMIT:
                    _end(self._neighbours[connection], f"has been silent for {SILENCE_LIMIT:.0f} seconds")


def _receive(connection: socket.socket) -> bytes:
    """What has come; empty: the connection is closed."""
    try:
        return connection.recv(4096)
    except BlockingIOError:
        return _BEAT
    except OSError:
        return b""


def _end(rank: int, what: str) -> None:
    """End this process at once: its main thread may wait for the lost one in MLX, where no exception reaches it.

    The message begins a line: there may be a progress bar, or half a line of MLX's ring.
    """
    message = f"\nerror: the process with rank {rank} {what}; the others stop, too: start all again\n"
    os.write(2, message.encode())
    os._exit(2)


def _connect(links: Links, deadline: float) -> dict[socket.socket, int]:
    """Connections to the neighbours, with their ranks."""
    found: dict[socket.socket, int] = {}
    server = None if links.listens is None else _listen(links.listens)
    try:
        if links.connects is not None:
            rank, address = links.connects
            connection = _reach(rank, address, deadline)
            connection.sendall(links.rank.to_bytes(4, "big"))
            found[connection] = rank
        for _ in range(links.expects):
            assert server is not None
            connection, rank = _accept(server, deadline)
            found[connection] = rank
    finally:
        if server is not None:
            server.close()
    return found


def _meet(neighbours: dict[socket.socket, int], size: int, deadline: float) -> None:
    """Wait until all processes are there, not only the neighbours.

    In each round a process sends a byte to its neighbours and waits for theirs. After n rounds, all that are n
    connections away are there. Then MLX connects them, each at its first attempts: it tries only a few times, and no
    byte of ours is sent in the meantime, since it holds Python's lock.
    """
    for _ in range(size):
        for connection in neighbours:
            with contextlib.suppress(OSError):  # what is wrong is seen when reading
                connection.sendall(_BEAT)
        for connection, rank in neighbours.items():
            connection.settimeout(max(deadline - time.monotonic(), 0.1))
            try:
                received = connection.recv(1)
            except TimeoutError:
                raise DistributedError(f"not all processes came within {JOIN_LIMIT:.0f} seconds: do all run?") from None
            except OSError:
                received = b""
            if not received:
                raise DistributedError(f"the process with rank {rank} has stopped; start all again")
    for connection in neighbours:
        connection.setblocking(False)


def _listen(address: Address) -> socket.socket:
    try:
        return socket.create_server(address, backlog=16)
    except OSError as error:
        place = f"{address[0]} port {address[1]}"
        raise DistributedError(f"cannot listen at {place} ({error.strerror}): give mlx.launch another -p") from error


def _reach(rank: int, address: Address, deadline: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.1))
        except OSError as error:
            if time.monotonic() >= deadline:
                raise DistributedError(
                    f"the process with rank {rank} cannot be reached at {address[0]} port {address[1]}"
                    f" ({error.strerror or error}): does it run, and is there no firewall between?"
                ) from error
            time.sleep(0.1)


def _accept(server: socket.socket, deadline: float) -> tuple[socket.socket, int]:
    server.settimeout(max(deadline - time.monotonic(), 0.1))
    try:
        connection, _ = server.accept()
        connection.settimeout(max(deadline - time.monotonic(), 0.1))
        rank = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
    except OSError as error:
        raise DistributedError(f"a process did not come within {JOIN_LIMIT:.0f} seconds: do all run?") from error
    return connection, rank
