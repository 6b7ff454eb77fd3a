"""A server from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from ..loading import load
from .address import ServeError, is_loopback
from .app import Access, Front
from .engine import Engine, Room
from .metrics import Metrics
from .served import Limits, Served
from .states import States
from .worker import Worker

log = logging.getLogger("mlx_ttt.serve")


@dataclass(frozen=True)
class Settings:
    """How a server is started.

    Attributes:
        models: NAME=DIR, or DIR, whose name is its last part.
        find: the directory of what is given as DIR, which can be a repository.
        chat_template: a file with a chat template, for models that have none.
        states: the folder of saved states; None: none are kept.
        quota: bytes of all saved states of a model.
        drain: seconds that running requests have when the server is told to end.
        stuck_after: seconds without a token after which /health says so.
    """

    models: Sequence[str | None] = (None,)
    find: Callable[[str | None], Path | str | None] = lambda name: name
    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = None
    origins: tuple[str, ...] = ()
    chat_template: Path | None = None
    states: Path | None = None
    quota: int = 10 << 30
    drain: float = 30.0
    stuck_after: float = 120.0
    room: Room = field(default_factory=Room)
    limits: Limits = field(default_factory=Limits)


def front(settings: Settings) -> Front:
    """Load the models, and make the application of them. Its worker runs already.

    Raises:
        ServeError: two models have the same name.
        TTTError: a model cannot be loaded, or its folder of states cannot be used.
    """
    metrics, engines = Metrics(), {}
    for given in settings.models:
        name, path = _named(given)
        if name in engines:
            raise ServeError(f"--model {given}: there is another model of this name; give one as NAME=DIR")
        engines[name] = _engine(settings, name, path, metrics)
    worker = Worker(list(engines.values()), metrics, settings.stuck_after)
    created = int(time.time())
    served = [Served(name, engine, worker, settings.limits, created) for name, engine in engines.items()]
    hosts = None
    if is_loopback(settings.host) and settings.key is None:
        hosts = frozenset({"localhost", "127.0.0.1", "::1", settings.host})
    access = Access(settings.key, settings.origins, hosts)
    return Front(served, worker, metrics, access, settings.limits)


def _named(given: str | None) -> tuple[str, str | None]:
    """A model's name and its directory."""
    if given is None:
        return "shakespeare-ttt-linear", None
    name, equals, path = given.partition("=")
    if equals and re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII):
        return name, path
    return Path(given).resolve().name if Path(given).exists() else given, given


def _engine(settings: Settings, name: str, path: str | None, metrics: Metrics) -> Engine:
    model, tokenizer = load(settings.find(path))
    states = None
    if settings.states is not None:
        folder = settings.states / re.sub(r"[^\w.-]", "-", name, flags=re.ASCII).lstrip(".")
        states = States(folder, settings.quota, model, tokenizer)
    engine = Engine(model, tokenizer, room=settings.room, states=states, metrics=metrics)
    if settings.chat_template is not None:
        try:
            engine.vocabulary.use_chat_template(settings.chat_template.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"--chat-template {settings.chat_template}: {error}") from error
    return engine


class _Server(uvicorn.Server):
    """uvicorn's server, which tells the front when it is to end, and ends quietly.

    Attributes:
        received: the first signal that came, or 0.
    """

    def __init__(self, config: uvicorn.Config, front: Front):
        super().__init__(config)
        self._front, self.received = front, 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: object) -> None:
        """End when the running requests have ended; at a second signal, at once."""
        self.received = self.received or sig
        self._front.draining = True
        self.force_exit = self.should_exit
        self.should_exit = True


def run(front: Front, listener: socket.socket, drain: float) -> int:
    """Answer until a signal comes, then let the running requests end. Returns the signal."""
    config = uvicorn.Config(
        front.app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=max(round(drain), 1),
        timeout_keep_alive=30,
    )
    server = _Server(config, front)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        front.worker.stop()
    return server.received
