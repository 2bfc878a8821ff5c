"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import Response

from runtimes.batching import QueueFull
from runtimes.errors import AdapterError, BundleError, ReftError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
UNUSABLE = (AdapterError, BundleError)
"""Of files on the server, whose places are told to its log alone."""
LONGEST = 600
"""Characters of a message: what it quotes is a stranger's."""


class Refusal(HTTPException):
    """Ends a request. ``param``: the field that is wrong; ``code``: what a program may ask for."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.content = error_content(status, message, code=code, param=param)

    def response(self) -> Response:
        return json_response(self.content, self.status_code, self.headers)


def error_content(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    said = message if len(message) <= LONGEST else f"{message[:LONGEST]}.."
    return {"error": {"message": said, "type": kind, "param": param, "code": code}}


def json_text(content: Any) -> str:
    """In ASCII: half of a surrogate pair, which a client may send, is told as it came."""
    return json.dumps(content, separators=(",", ":"))


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_text(content), status, dict(headers or {}), media_type="application/json")


def refusal_of(error: BaseException, retry_after: int = 1) -> Refusal:
    """What a client is told of an error of ours; of any other no more than that there was one."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, QueueFull):
        return Refusal(429, str(error), code="queue_full", headers={"Retry-After": str(retry_after)})
    if isinstance(error, UNUSABLE):
        return Refusal(500, "this adapter cannot be used; the server's log says why", code="adapter_unusable")
    if isinstance(error, ReftError) and error.exit_code == 2:
        return Refusal(400, str(error), code="context_length_exceeded" if "exceed the context" in str(error) else None)
    return Refusal(500, "the server failed to answer; its log says why", code="internal_error")


def refusal_of_validation(error: RequestValidationError) -> Refusal:
    """The first field that is wrong, in one line, without its value."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = where[0] if where else None
    said = str(first["msg"]).removeprefix("Value error, ")
    return Refusal(400, f"{'.'.join(where)}: {said}" if where else said, param=param, code="invalid_value")
