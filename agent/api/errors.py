"""Typed errors to the error objects and statuses of OpenAI's API."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from protocol.errors import AuthError, ContextFull, Overloaded, RequestError, StoreError, UnknownAnswer, UnknownModel

log = logging.getLogger(__name__)

_OUTCOMES = {401: "unauthorised", 404: "not_found", 413: "too_large", 429: "overloaded"}


@dataclass(frozen=True, slots=True)
class Failure:
    """What a client is told of an error."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def outcome(self) -> str:
        """The label of `skerry_requests_total`."""
        return _OUTCOMES.get(self.status, "error" if self.status >= 500 else "bad_request")


def describe(error: Exception) -> Failure:
    """What went wrong, without details where it is not the client's doing."""
    match error:
        case ContextFull():
            return Failure(400, str(error), code="context_length_exceeded", param=error.param)
        case UnknownAnswer():
            return Failure(404, str(error), code="answer_not_found", param=error.param)
        case RequestError():
            return Failure(400, str(error), code="invalid_value", param=error.param)
        case UnknownModel():
            return Failure(404, str(error), code="model_not_found", param="model")
        case AuthError():
            return Failure(401, str(error), code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        case Overloaded():
            wait = {"Retry-After": str(math.ceil(error.retry_after))}
            return Failure(429, str(error), type="rate_limit_error", code="overloaded", headers=wait)
        case StoreError():
            return Failure(503, str(error), type="server_error", code="store_failed")
        case web.HTTPRequestEntityTooLarge():
            return Failure(413, "the request's body is over the limit (api.body_bytes)", code="request_too_large")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return Failure(
                405, f"this endpoint takes {allowed} only", code="method_not_allowed", headers={"Allow": allowed}
            )
        case web.HTTPNotFound():
            return Failure(404, "no such endpoint: see docs/http.md", code="unknown_url")
        case web.HTTPException() if error.status < 500:
            return Failure(error.status, error.reason)
        case TimeoutError():
            return Failure(408, "the request's body did not arrive in time", code="request_timeout")
        case _:
            return Failure(500, "internal error: see the agent's log", type="server_error", code="internal_error")


def respond(failure: Failure) -> web.Response:
    return web.json_response(failure.body, status=failure.status, headers=failure.headers)


def log_unexpected(error: Exception, failure: Failure) -> None:
    """Where an inner failure happened, but not its message, which may quote what the client sent."""
    if failure.status < 500:
        return
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "unknown"
    log.error("a request failed: %s at %s", type(error).__name__, where)
