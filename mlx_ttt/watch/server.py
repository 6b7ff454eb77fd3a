"""The live page over HTTP: the page, its events, and what it asks for.

The model runs in one thread, and all that is asked of it waits there in line. A request that is wrong in any way is
answered with one line; nothing that a client sends ends the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import math
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import TTTError
from ..serve.address import is_loopback
from .live import SIDES, START, Event, Session, Turn

MOST_BYTES = 4 << 20  # of a request
MOST_EVENTS = 20_000  # that wait for a page that does not read them
MOST_LEARNING = 10.0
MOST_WRITTEN = 4096
ALIVE = 15  # seconds without an event, after which a comment is sent: a page that is gone is noticed

log = logging.getLogger(__name__)


class Refused(Exception):
    """A request that is not answered: the status, and a line that says why."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


class Hub:
    """Carries events from the model's thread to the pages."""

    def __init__(self) -> None:
        self._pages: dict[asyncio.Queue[Event | None], asyncio.AbstractEventLoop] = {}

    def publish(self, event: Event) -> None:
        """From any thread."""
        for page, loop in list(self._pages.items()):
            with contextlib.suppress(RuntimeError):  # the loop has been closed: the server is ending
                loop.call_soon_threadsafe(self._put, page, event)

    def join(self, page: asyncio.Queue[Event | None]) -> None:
        self._pages[page] = asyncio.get_running_loop()

    def leave(self, page: asyncio.Queue[Event | None]) -> None:
        self._pages.pop(page, None)

    def _put(self, page: asyncio.Queue[Event | None], event: Event) -> None:
        if page in self._pages and page.qsize() < MOST_EVENTS:
            page.put_nowait(event)
        elif page in self._pages:
            self.leave(page)
            page.put_nowait(None)  # it ends, comes again and is told everything anew


class Watcher:
    """The application's parts: a session, its thread, and the pages that look on."""

    def __init__(self, make_session: Callable[[Callable[[Event], None]], tuple[Session, str]]):
        """
        Args:
            make_session: called in the model's thread, with what publishes events. Returns the session and the page.
        """
        self._hub = Hub()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._session, self._page = self._thread.submit(make_session, self._hub.publish).result()
        self._busy = False

    def application(self, host: str) -> Starlette:
        """The pages and requests of a server at this address."""
        actions = {
            "turn": self._turn,
            "stop": self._stop,
            "learning": self._learning,
            "remember": self._remember,
            "forget": self._forget,
            "back": self._back,
        }
        routes = [Route("/", self._show_page), Route("/events", self._show_events)]
        routes += [Route(f"/{name}", _answering(action), methods=["POST"]) for name, action in actions.items()]
        return Starlette(routes=routes, middleware=[Middleware(OnlyTrustedHosts, host=host)])

    async def _show_page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})

    async def _show_events(self, request: Request) -> Response:
        return StreamingResponse(self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _events(self) -> AsyncIterator[str]:
        page: asyncio.Queue[Event | None] = asyncio.Queue()
        try:
            for event in self._session.snapshot(lambda: self._hub.join(page)):
                yield _sent(event)
            yield _sent({"kind": "busy", "busy": self._busy})
            while True:
                try:
                    next_event = await asyncio.wait_for(page.get(), ALIVE)
                except asyncio.TimeoutError:
                    yield ": still here\n\n"
                    continue
                if next_event is None:
                    return
                yield _sent(next_event)
        finally:
            self._hub.leave(page)

    # ---- Requests ----------------------------------------------------------------------------------------------------

    def begin(self, text: str) -> None:
        """Read a text on side A, as a page would ask for it."""
        self._start_turn(["A"], Turn(text))

    async def _turn(self, asked: dict[str, Any]) -> None:
        sides = asked.get("sides")
        if not isinstance(sides, list) or not sides or not all(side in SIDES for side in sides):
            raise Refused(400, f"sides is {sides!r}, expected a list of A and B")
        text = asked.get("text", "")
        if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
            raise Refused(400, "text is not a text")
        tokens = _number(asked, "tokens", 0, MOST_WRITTEN)
        turn = Turn(text, int(tokens), _number(asked, "temperature", 0, 10), int(_number(asked, "seed", 0, 2**32)))
        if not text and not turn.max_tokens:
            raise Refused(400, "nothing to read and nothing to write")
        if self._busy:
            raise Refused(409, "the model is reading or writing: stop it first")
        self._start_turn(sorted(set(sides)), turn)

    def _start_turn(self, sides: list[str], turn: Turn) -> None:
        self._busy = True
        self._hub.publish({"kind": "busy", "busy": True})

        def take() -> None:
            try:
                self._session.take_turn(sides, turn)
            finally:
                self._busy = False
                self._hub.publish({"kind": "busy", "busy": False})

        self._in_thread(take)

    async def _stop(self, asked: dict[str, Any]) -> None:
        self._session.stopping.set()

    async def _learning(self, asked: dict[str, Any]) -> None:
        self._session.set_learning(_side(asked), _number(asked, "learning", 0, MOST_LEARNING))

    async def _remember(self, asked: dict[str, Any]) -> None:
        side, name = _side(asked), asked.get("name", "")
        if not isinstance(name, str) or len(name) > 80:
            raise Refused(400, "name is not a short text")
        self._in_thread(lambda: self._session.remember(side, name))

    async def _forget(self, asked: dict[str, Any]) -> None:
        id = asked.get("state")
        if isinstance(id, bool) or not isinstance(id, int):
            raise Refused(400, f"state is {id!r}, expected a number")
        self._in_thread(lambda: self._session.forget(id))

    async def _back(self, asked: dict[str, Any]) -> None:
        side, to = _side(asked), asked.get("state")
        if isinstance(to, bool) or not (isinstance(to, int) or to in (START, *SIDES)):
            raise Refused(400, f"state is {to!r}, expected a number, {START!r}, 'A' or 'B'")
        if self._busy:
            raise Refused(409, "the model is reading or writing: stop it first")
        self._in_thread(lambda: self._session.go_back(side, to))

    def _in_thread(self, action: Callable[[], None]) -> None:
        """Have the model's thread do something. What goes wrong there is told to the pages."""

        def run() -> None:
            try:
                action()
            except TTTError as error:
                self._hub.publish({"kind": "error", "message": str(error)})
            except Exception as error:  # whatever it is, the server goes on
                log.exception("in the model's thread")
                self._hub.publish({"kind": "error", "message": f"{type(error).__name__}: {error}"})

        self._thread.submit(run)

    def end(self) -> None:
        self._session.stopping.set()
        self._thread.shutdown(cancel_futures=True)


def _answering(action: Callable[[dict[str, Any]], Any]) -> Callable[[Request], Any]:
    """An endpoint that passes a JSON object on, and answers with one line where something is wrong."""

    async def endpoint(request: Request) -> Response:
        try:
            await action(await _json(request))
        except Refused as error:
            return JSONResponse({"error": str(error)[:300]}, error.status)
        except ClientDisconnect:
            return JSONResponse({"error": "gone"}, 400)
        return JSONResponse({"ok": True}, 202)

    return endpoint


async def _json(request: Request) -> dict[str, Any]:
    """The body. Only our own page can send JSON: for other sites, a browser asks us first, and we do not answer."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise Refused(415, "expected application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise Refused(
                413, f"a request may have {MOST_BYTES >> 20} MB; read a longer text with `mlx-ttt watch FILE`"
            )
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the request is not JSON") from None
    if not isinstance(asked, dict):
        raise Refused(400, "the request is not a JSON object")
    return asked


def _side(asked: dict[str, Any]) -> str:
    if asked.get("side") not in SIDES:
        raise Refused(400, f"side is {asked.get('side')!r}, expected A or B")
    return asked["side"]


def _number(asked: dict[str, Any], name: str, low: float, high: float) -> float:
    """A number in this range; `low` where none is given."""
    value = asked.get(name, low)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value != value or value in (math.inf, -math.inf):  # isfinite fails for a huge whole number
        raise Refused(400, f"{name} is {value!r}, expected a number")
    if not low <= value <= high:
        raise Refused(400, f"{name} is {value}, expected {low:g} to {high:g}")
    return value


def _sent(event: Event) -> str:
    return f"data: {json.dumps(event)}\n\n"


class OnlyTrustedHosts:
    """Refuses requests that were sent to another name, or by a page of another site.

    A foreign page can make its own name point to this machine, and would then read what the model says. It cannot do
    that with an address that is a number, nor with the names that mean this machine.
    """

    def __init__(self, app: ASGIApp, host: str):
        self._app, self._loopback_only = app, is_loopback(host)
        self._names = {"localhost", host.lower()}
        if not self._loopback_only:
            name = socket.gethostname().lower()
            self._names |= {name, f"{name}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Request(scope).headers
            host, origin = headers.get("host", ""), headers.get("origin")
            if not self._trusts(host) or (origin is not None and origin not in (f"http://{host}", f"https://{host}")):
                refusal = JSONResponse({"error": "not meant for this server: open it by its own address"}, 403)
                return await refusal(scope, receive, send)
        await self._app(scope, receive, send)

    def _trusts(self, header: str) -> bool:
        name = header.lower()
        name = name[: name.index("]") + 1].strip("[]") if name.startswith("[") and "]" in name else name.split(":")[0]
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._loopback_only


def serve(watcher: Watcher, at: socket.socket, host: str) -> None:
    """Answer until Ctrl-C."""
    config = uvicorn.Config(watcher.application(host), log_level="warning", timeout_graceful_shutdown=1, lifespan="off")
    try:
        uvicorn.Server(config).run(sockets=[at])
    finally:
        watcher.end()
