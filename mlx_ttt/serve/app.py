"""The HTTP side: paths, bodies, errors, and clients that leave."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import TTTError
from .chat import Chat, Respond
from .completions import Completion
from .errors import APIError
from .metrics import Metrics
from .schema import (
    BranchRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponseRequest,
    TokenizeRequest,
    parse,
)
from .served import Limits, Served
from .states import StateRefused
from .worker import Worker

log = logging.getLogger("mlx_ttt.serve")

T = TypeVar("T")
DEFAULT = "default_model"  # a name for the first model
_BODY_SECONDS = 60.0  # in which a request's body must come


class _Reply(Protocol):
    """A request on its way to its answer; see `Completion`."""

    def asks(self) -> list[Any]: ...

    async def answer(self, exchange: Any, asks: list[Any]) -> dict[str, Any]: ...

    def stream(self, exchange: Any, asks: list[Any]) -> AsyncIterator[dict[str, Any]]: ...


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        key: what a client must send as its bearer token; None: nothing.
        origins: web pages of which origins may ask; "*": all.
        hosts: by which names the server may be asked for; None: any. So no page elsewhere can pass itself off as ours
            by pointing its own name to this machine.
    """

    key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None


class Front:
    """The application, made of the models and their worker."""

    def __init__(self, models: Sequence[Served], worker: Worker, metrics: Metrics, access: Access, limits: Limits):
        self.models = {model.name: model for model in models}
        self.first, self.worker, self.metrics, self.limits = models[0], worker, metrics, limits
        self.draining = False
        self.running = 0  # requests
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/responses", self.responses, methods=["POST"]),
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.show_model, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/v1/states", self.list_states, methods=["GET"]),
            Route("/v1/states/{name}", self.show_state, methods=["GET"]),
            Route("/v1/states/{name}", self.delete_state, methods=["DELETE"]),
            Route("/v1/states/{name}/content", self.download, methods=["GET"]),
            Route("/v1/states/{name}/content", self.upload, methods=["PUT"]),
            Route("/v1/states/{name}/branch", self.branch, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
        ]
        self.paths = {route.path for route in routes}
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
        )
        handlers: Mapping[Any, Callable[[Request, Any], Response]] = {
            APIError: _api_error,
            StateRefused: _state_refused,
            TTTError: _ttt_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _broken,
        }
        self.app = Starlette(
            routes=routes,
            middleware=[*([cors] if access.origins else []), Middleware(_Door, front=self, access=access)],
            exception_handlers=handlers,
        )

    # Generation

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionRequest, Completion.of)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, ChatRequest, Chat.of)

    async def responses(self, request: Request) -> Response:
        return await self._generate(request, ResponseRequest, Respond.of, named=True)

    async def _generate(
        self, request: Request, kind: Any, prepare: Callable[[Served, Any], Awaitable[_Reply]], named: bool = False
    ) -> Response:
        """Answer a request at once or as a stream; `named` gives each event of the stream its type's name."""
        body = parse(kind, await self._body(request))
        served = self._model(body.model)
        reply = await prepare(served, body)
        asks = reply.asks()
        exchange = served.exchange(asks)
        try:
            if not body.stream:
                answer = await _unless_gone(request, reply.answer(exchange, asks))
                return JSONResponse(answer)
            events = reply.stream(exchange, asks)
            first = await _unless_gone(request, _first(events))
        except BaseException as error:
            exchange.leave()
            if isinstance(error, ClientDisconnect):
                self.metrics.client_left()
            raise
        stream = self._events(first, events, exchange, named)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _events(
        self, first: dict[str, Any], events: AsyncIterator[dict[str, Any]], exchange: Any, named: bool
    ) -> AsyncIterator[str]:
        """A stream's events, as they are sent."""
        complete = False
        try:
            yield _event(first, named)
            async for event in events:
                yield _event(event, named)
            complete = True
        except APIError as error:
            complete = True
            yield _event({"type": "error", **error.body} if named else error.body, named)
        finally:
            exchange.leave()
            if not complete:
                self.metrics.client_left()
        if not named:
            yield "data: [DONE]\n\n"

    def _model(self, name: str | None) -> Served:
        """One of the models that the server was started with. No request has another one loaded."""
        if name is None or name == DEFAULT:
            return self.first
        if name not in self.models:
            message = f"model: this server has no model {ascii(name)[:200]}; it has {', '.join(self.models)}"
            raise APIError(404, message, param="model", code="model_not_found")
        return self.models[name]

    async def _body(self, request: Request) -> bytes:
        """A request's body, if it is not too large and comes in time."""
        chunks: list[bytes] = []

        async def receive() -> None:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
                if size > self.limits.body:
                    raise APIError(413, f"the body has more than {self.limits.body:,} bytes", code="too_large")
                chunks.append(chunk)

        await _in_time(receive())
        return b"".join(chunks)

    async def _json(self, request: Request, kind: type[BaseModel]) -> Any:
        return parse(kind, await self._body(request))

    # Models and tokens

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_as_json(model) for model in self.models.values()]})

    async def show_model(self, request: Request) -> Response:
        return JSONResponse(_as_json(self._model(request.path_params["name"])))

    async def tokenize(self, request: Request) -> Response:
        body = await self._json(request, TokenizeRequest)
        encode = self._model(body.model).engine.vocabulary.encode
        tokens = await asyncio.to_thread(encode, body.prompt, special=body.add_special_tokens)
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def detokenize(self, request: Request) -> Response:
        body = await self._json(request, DetokenizeRequest)
        served = self._model(body.model)
        served.check_prompt(body.tokens, "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(served.engine.vocabulary.decode, body.tokens)})

    # States

    async def list_states(self, request: Request) -> Response:
        states = self._states(request)
        infos = [await self._call(_told(states, name)) for name in await asyncio.to_thread(states.names)]
        return JSONResponse({"object": "list", "data": infos, "bytes": states.nbytes, "quota": states.quota})

    async def show_state(self, request: Request) -> Response:
        states, name = self._states(request), request.path_params["name"]
        states.existing(name)
        return JSONResponse(await self._call(lambda: states.info(name).as_json()))

    async def delete_state(self, request: Request) -> Response:
        states, name = self._states(request), request.path_params["name"]
        await asyncio.to_thread(states.delete, name)
        return JSONResponse({"id": name, "object": "state", "deleted": True})

    async def branch(self, request: Request) -> Response:
        states, name = self._states(request), request.path_params["name"]
        body = await self._json(request, BranchRequest)
        states.existing(name)
        await asyncio.to_thread(states.branch, name, body.name)
        return JSONResponse(await self._call(lambda: states.info(body.name).as_json()))

    async def download(self, request: Request) -> Response:
        states, name = self._states(request), request.path_params["name"]
        return FileResponse(states.existing(name), media_type="application/octet-stream", filename=f"{name}.state")

    async def upload(self, request: Request) -> Response:
        states, name = self._states(request), request.path_params["name"]
        states.path(name)
        with states.incoming() as incoming:
            file = Path(incoming) / "state"
            await _in_time(self._receive(request, file, states.quota), 10 * _BODY_SECONDS)
            info = await self._call(lambda: states.take_in(file, name))
        return JSONResponse(info.as_json())

    async def _receive(self, request: Request, file: Path, most: int) -> None:
        """Write a request's body to a file."""
        size = 0
        with file.open("wb") as out:
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    raise APIError(413, f"the state has more than the {most:,} bytes of all states", code="too_large")
                await asyncio.to_thread(out.write, chunk)

    def _states(self, request: Request) -> Any:
        return self._model(request.query_params.get("model")).states

    async def _call(self, function: Callable[[], T]) -> T:
        """Have the generation thread do what needs the model's arrays."""
        return await asyncio.wrap_future(self.worker.call(function))

    # How the server is

    async def health(self, request: Request) -> Response:
        problem = "the server is shutting down" if self.draining else self.worker.problem()
        if problem is not None:
            error = APIError(503, problem)
            return JSONResponse({"status": "unavailable", **error.body}, 503, headers=error.headers)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        engines = self.worker.engines
        gauges = {
            "running": ("Texts that are read or written.", sum(engine.running for engine in engines)),
            "waiting": ("Prompts that wait.", sum(engine.waiting for engine in engines)),
            "requests_running": ("Requests that are not answered yet.", self.running),
        }
        states = [engine.states for engine in engines if engine.states is not None]
        gauges["states"] = ("Saved states.", sum(len(s.names()) for s in states))
        gauges["states_bytes"] = ("Bytes that they take.", sum(s.nbytes for s in states))
        text: str = self.metrics.text(gauges)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


class _Door:
    """Who may come in, and how many at a time; counts and logs the answers."""

    def __init__(self, app: ASGIApp, front: Front, access: Access):
        self._app, self._front, self._access = app, front, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        front, status, started = self._front, 500, time.monotonic()
        front.running += 1

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            error = self._refusal(Request(scope))
            if error is not None:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, note)
            else:
                await self._app(scope, receive, note)
        finally:
            front.running -= 1
            route = scope.get("route")  # what was asked for, not the names in it: those would be endless
            path = route.path if isinstance(route, Route) else "other"
            front.metrics.request(path, status)
            log.info("%s %s %d %.2f s", scope["method"], ascii(scope["path"]), status, time.monotonic() - started)

    def _refusal(self, request: Request) -> APIError | None:
        access, path, headers = self._access, request.url.path, request.headers
        if access.hosts is not None and _hostname(headers.get("host", "")) not in access.hosts:
            return APIError(403, "this server is asked for as localhost only; for others, start it with --host")
        origin = headers.get("origin")
        if origin is not None and "*" not in access.origins and origin not in access.origins:
            return APIError(403, "web pages of this origin may not ask: start the server with --cors-origin ORIGIN")
        if path == "/health":
            return None
        if access.key is not None:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), access.key.encode()):
                return APIError(401, "the API key is missing or wrong", code="invalid_api_key")
        if self._front.draining:
            return APIError(503, "the server is shutting down", code="shutting_down")
        if self._front.running > self._front.limits.requests:
            return APIError(503, "too many requests at a time; come again later", code="overloaded")
        return None


def _hostname(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


async def _first(events: AsyncIterator[T]) -> T:
    return await events.__anext__()


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """Wait for an answer, unless the client leaves.

    Raises:
        ClientDisconnect: it has.
    """
    work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _in_time(work: Coroutine[Any, Any, None], seconds: float = _BODY_SECONDS) -> None:
    try:
        await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        raise APIError(408, f"the body did not come within {seconds:.0f} seconds") from None


def _told(states: Any, name: str) -> Callable[[], dict[str, Any]]:
    """What a list says of a state. It may be damaged, or may have gone meanwhile."""

    def tell() -> dict[str, Any]:
        try:
            return states.info(name).as_json()
        except TTTError as error:
            return {"object": "state", "id": name, "error": str(error)}

    return tell


def _as_json(model: Served) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "mlx_ttt"}


def _event(content: dict[str, Any], named: bool) -> str:
    """A server-sent event."""
    name = f"event: {content['type']}\n" if named else ""
    return f"{name}data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


def _api_error(request: Request, error: APIError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _state_refused(request: Request, error: StateRefused) -> Response:
    return _api_error(request, APIError(error.status, str(error), param="state"))


def _ttt_error(request: Request, error: TTTError) -> Response:
    log.error("%s", error)
    return _api_error(request, APIError(500, str(error)))


def _http_error(request: Request, error: HTTPException) -> Response:
    what = {404: "there is nothing at this path", 405: "this path does not take this method"}
    answer = APIError(error.status_code, what.get(error.status_code, error.detail))
    return JSONResponse(answer.body, error.status_code, {**(error.headers or {}), **answer.headers})


def _broken(request: Request, error: Exception) -> Response:
    return _api_error(request, APIError(500, "the server failed on this request; its log says why"))


def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it; it is for the log and the count
