"""What every request passes: the key, the size of its body, and the count of answers."""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.responses import JSONResponse

from ptv2_fast.serving.errors import RequestError, error_body

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

# What needs no key: whether the server is there, and pages that hold nothing of it.
_OPEN = ("/", "/health", "/docs", "/openapi.json")


class Gate:
    """An ASGI middleware.

    Args:
        api_key: that requests bring as `Authorization: Bearer …`; None = none.
        max_body_bytes: of a request; one that says it is longer is not read, others until they are.
        count: is told of each answer: the path and the status.
    """

    def __init__(
        self,
        app: Application,
        api_key: str | None,
        max_body_bytes: int,
        count: Callable[[str, int], None],
    ) -> None:
        self.app, self.count, self.max_body_bytes = app, count, max_body_bytes
        self._wanted = None if api_key is None else b"Bearer " + api_key.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"])
            await send(message)

        headers = dict(scope["headers"])
        error = self._refusal(scope["path"], headers)
        if error is not None:
            more = {"WWW-Authenticate": "Bearer"} if error.status_code == 401 else {}
            body = error_body(error.detail, error.kind)
            await JSONResponse(body, error.status_code, more)(scope, receive, counted)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message: Any = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise self._too_large()
            return message

        await self.app(scope, limited, counted)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> RequestError | None:
        """Why a request is not let in, by its head alone."""
        if self._wanted is not None and path not in _OPEN:
            if not hmac.compare_digest(headers.get(b"authorization", b""), self._wanted):
                message = "authorization: expected 'Bearer' and the key of this server"
                return RequestError(401, "unauthorized", message)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> RequestError:
        return RequestError(
            413, "validation", f"body: expected at most {self.max_body_bytes} bytes, got more"
        )
