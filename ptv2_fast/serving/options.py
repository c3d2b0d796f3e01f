"""What a server is told at its start."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServeOptions:
    """Limits of a server.

    Attributes:
        max_batch_tokens: of the texts that run together.
        max_wait_ms: milliseconds that a text waits for others to run with.
        max_queue: texts that are taken and not answered yet.
        max_client_batch: texts of one request, once for each adapter that reads it.
        max_body_bytes: of a request.
        adapter_root: folder of the adapters that may be loaded while the server runs; None = none
            may be loaded or unloaded.
        api_key: that requests must bring; None = none.
    """

    max_batch_tokens: int = 16384
    max_wait_ms: float = 5.0
    max_queue: int = 1024
    max_client_batch: int = 64
    max_body_bytes: int = 2_000_000
    adapter_root: Path | None = None
    api_key: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_queue", "max_client_batch", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_wait_ms <= 60_000:
            raise ValueError(
                f"max_wait_ms: expected milliseconds of at most a minute, got {self.max_wait_ms}"
            )
        if self.adapter_root is not None and not self.adapter_root.is_dir():
            raise ValueError(f"adapter_root: expected a folder, got {str(self.adapter_root)!r}")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("PTV2_FAST_API_KEY: expected a key, got nothing but blanks")
