"""What is answered when a request is refused or fails: OpenAI's error body."""

from __future__ import annotations

from typing import Any

RETRY_AFTER = 1  # seconds, for clients that are to come again

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        param: the field that is wrong.
        code: for programs, what is wrong.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message = status, " ".join(message.split())
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_AFTER)}
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {}
