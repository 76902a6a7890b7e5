"""Errors of the HTTP interface, in OpenAI's shape."""

from typing import Any

from grpocem_jax.utils.terminal import one_line

MOST_CHARACTERS = 600
"""Of a message; what is longer loses its middle."""

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
      status: the HTTP status, from 400 to 599.
      message: one sentence that names the field, its value and the fix.
      param: the field of the request that is to blame, if one is.
      code: a word for programs, such as ``model_not_found``.
      retry_after: seconds after which the same request may succeed, for the header Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        text = one_line(message)
        if len(text) > MOST_CHARACTERS:  # of what a library says of damaged input
            text = f"{text[: MOST_CHARACTERS - 200]}…{text[-199:]}"
        super().__init__(text)
        self.status, self.param, self.code = status, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """What is sent: ``{"error": {"message", "type", "param", "code"}}``."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": _KINDS.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def brief(value: Any) -> str:
    """A value as messages show it, at most 60 characters."""
    text = repr(value[:80] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= 60 else f"{text[:59]}…"
