"""What a request is answered with when it cannot be served."""

from fastapi import HTTPException

_LISTED = 20  # adapters that a message names


class RequestError(HTTPException):
    """A request that cannot be served.

    Attributes:
        kind: a word for programs: "validation", "not_found", "overloaded", …
    """

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(status, message)
        self.kind = kind


def unknown_adapter(name: str, known: list[str]) -> RequestError:
    """404: no adapter of this name is loaded."""
    shown = ", ".join(known[:_LISTED]) + (", …" if len(known) > _LISTED else "")
    message = f"adapter: expected one of those that are loaded ({shown}), got {name!r:.140}"
    return RequestError(404, "not_found", message)


def unloaded(name: str) -> RequestError:
    """404: the adapter of this name went while the request waited."""
    message = f"adapter: {name!r:.140} was unloaded while the request waited for it"
    return RequestError(404, "not_found", message)


def error_body(message: str, kind: str) -> dict[str, str]:
    """The one shape of all errors, TEI's."""
    return {"error": message.encode(errors="replace").decode(), "error_type": kind}
