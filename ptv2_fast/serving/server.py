"""Running the application until it is told to end."""

import socket
import sys

import uvicorn
from fastapi import FastAPI

_SLOWEST = 300  # seconds that a shutdown waits for clients who do not read or write


def run(app: FastAPI, host: str, port: int) -> None:
    """Serve until a signal; what was taken by then is answered.

    Raises:
        OSError: for an address that cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=2048) as listener:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_SLOWEST,
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"serving on http://{shown}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        uvicorn.Server(config).run(sockets=[listener])
