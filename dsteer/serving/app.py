"""The endpoint: OpenAI's routes over one engine.

Built on FastAPI rather than on ``transformers serve``: that server refuses fields it does not know
(``steering`` among them) inside handlers that are no public interface, loads whatever model a
request names, and generates by managers of its own, where a request's hooks have no place.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from dsteer.errors import ConfigError
from dsteer.serving.engine import Engine, Job
from dsteer.serving.protocol import Asked, Defaults, Kind, Refusal, Shapes, read_request
from dsteer.steering.answer import Answer

_LOOK = 0.1
"""Seconds between two looks whether a client is still there."""

_LOG = logging.getLogger("uvicorn.error")
"""The server's own."""

_BROKEN = Refusal(500, "the server failed; its log says why")

_GRACE = 5
"""Seconds that answers have to end after Ctrl-C."""


def make_app(
    engine: Engine, name: str, *, defaults: Defaults | None = None, api_key: str | None = None
) -> FastAPI:
    """The application.

    Args:
        engine: runs the model; closed when the application shuts down.
        name: what the model is called.
        defaults: what requests leave open.
        api_key: a key that requests must carry, as ``Authorization: Bearer KEY``.
    """
    defaults = defaults or Defaults()

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise Refusal(
                401,
                "the request carries no key, or a wrong one; send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    app = FastAPI(title="dsteer", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(Refusal, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _fail)
    keyed = [Depends(check)]
    created = int(time.time())

    def card() -> dict[str, Any]:
        steering = {
            dial.name: {"site": dial.site, "strength": dial.strength, "norm": dial.vector.norm}
            for dial in engine.dials.values()
        }
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "dsteer",
            "steering": steering,
        }

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "requests": engine.jobs}

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model:path}", dependencies=keyed)
    async def model(model: str) -> dict[str, Any]:
        if model != name:
            raise Refusal(
                404,
                f"model {model!r} is not served here; expected {name!r}",
                param="model",
                code="model_not_found",
            )
        return card()

    @app.post("/v1/chat/completions", dependencies=keyed)
    async def chat(request: Request) -> Response:
        return await _respond(request, "chat")

    @app.post("/v1/completions", dependencies=keyed)
    async def completions(request: Request) -> Response:
        return await _respond(request, "text")

    async def _respond(request: Request, kind: Kind) -> Response:
        try:
            body = await request.json()
        except (ValueError, RecursionError) as error:  # endless numbers and depths too
            raise Refusal(400, f"the body is no JSON ({error}); expected an object") from None
        asked = read_request(body, kind, name, engine.dials, defaults)
        shapes = Shapes(kind, name, asked.strengths, secrets.token_hex(12), int(time.time()))
        job = engine.submit(asked)
        try:
            begun = await _next(job, request)
            assert isinstance(begun, int)
            if asked.stream:
                pieces = _stream(job, request, shapes, begun)
                return StreamingResponse(
                    pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
                )
            while not isinstance(event := await _next(job, request), list):
                pass
            return JSONResponse(shapes.whole(event, begun))
        except BaseException as error:
            job.cancel()
            if isinstance(error, Refusal) or not isinstance(error, Exception):
                raise
            # told here: raised further, the connection would be closed under the client's answer
            _LOG.error("a request failed", exc_info=error)
            return JSONResponse(_BROKEN.body, _BROKEN.status)

    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes one that is free.

    Raises:
        ConfigError: the address can't be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{host}:{port} can't be served on ({error}); choose another --host or --port"
        ) from None


def run(app: FastAPI, listening: socket.socket) -> None:
    """Serve until Ctrl-C; then answers have some seconds to end."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


async def _next(job: Job, request: Request) -> int | tuple[int, str] | list[Answer]:
    """The job's next event, while its client is there.

    Raises:
        Refusal: the client went, or the job was refused.
    """
    while True:
        try:
            event = await asyncio.wait_for(job.events.get(), _LOOK)
        except TimeoutError:
            if await request.is_disconnected():
                raise Refusal(499, "the client went away") from None
            continue
        if isinstance(event, BaseException):
            raise event
        return event


async def _stream(
    job: Job, request: Request, shapes: Shapes, prompt_tokens: int
) -> AsyncIterator[str]:
    """The events of a stream; whatever ends it ends the job."""
    asked: Asked = job.asked
    try:
        for index in range(asked.n * len(asked.prompts)):
            if (opening := shapes.opening(index)) is not None:
                yield _event(opening)
        while not isinstance(event := await _next(job, request), list):
            assert isinstance(event, tuple)
            yield _event(shapes.piece(*event))
        for index, answer in enumerate(event):
            yield _event(shapes.closing(index, answer))
        if asked.usage:
            yield _event(shapes.counts(event, prompt_tokens))
        yield "data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001  # it is told and logged
        yield _event((error if isinstance(error, Refusal) else _BROKEN).body)
        if not isinstance(error, Refusal):
            _LOG.error("a request failed", exc_info=error)
    finally:
        job.cancel()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _refuse_route(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, str(error.detail))
    return JSONResponse(refusal.body, refusal.status, headers=dict(error.headers or {}))


async def _fail(_request: Request, _error: Exception) -> Response:
    return JSONResponse(_BROKEN.body, _BROKEN.status)
