"""The application: every route behind one gate."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from runtimes.errors import ReftError
from runtimes.serving.adapter_routes import adapter_routes
from runtimes.serving.doors import Doors
from runtimes.serving.gate import Gate, log_to_stderr
from runtimes.serving.page import page
from runtimes.serving.refusals import Refusal, error_content, json_response, refusal_of, refusal_of_validation
from runtimes.serving.server import TextServer
from runtimes.serving.text_routes import text_routes
from runtimes.version import VERSION


def create_app(server: TextServer, *, log: Callable[[str], None] = log_to_stderr) -> Gate:
    """An ASGI application; ``server``'s batcher runs. ``log``: as of ``Gate``.

    Example::

        with Batcher(session, tokenizer, bank) as batcher:
            uvicorn.run(create_app(TextServer(batcher, bank, tokenizer, ServeSettings())))
    """
    app = operated(server)
    app.include_router(text_routes(server))
    app.include_router(adapter_routes(server))
    return Gate(app, server, log)


def operated(server: Doors) -> FastAPI:
    """The routes that say how ``server`` is, and what becomes of errors."""
    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="reft-export", version=VERSION, docs_url=None, redoc_url=None)

    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        return page()

    @app.get("/health", tags=["operation"], summary="Whether the process lives")
    async def health() -> Response:
        return json_response({"status": "ok"})

    @app.get("/ready", tags=["operation"], summary="Whether requests are taken")
    async def ready() -> Response:
        return json_response({"status": "stopping"}, 503) if server.stopping else json_response({"status": "ready"})

    @app.get("/metrics", tags=["operation"], summary="For Prometheus")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> Response:
        if isinstance(error, Refusal):
            return error.response()
        return json_response(error_content(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> Response:
        return refusal_of_validation(error).response()

    @app.exception_handler(ReftError)
    def failed(_: Request, error: ReftError) -> Response:
        return refusal_of(error, server.retry_after).response()

    @app.exception_handler(Exception)
    def broke(_: Request, error: Exception) -> Response:
        return refusal_of(error).response()  # and the gate is told why

    return app
