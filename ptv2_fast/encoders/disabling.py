"""Which attachments a thread has disabled, also where a part of its forward runs once more."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ptv2_fast.encoders.attachment import Attachment


class _Disabled(threading.local):
    """The attachments that the running thread has disabled."""

    attachments: "tuple[Attachment, ...]" = ()


_DISABLED = _Disabled()


@torch.compiler.disable
def is_disabled(attachment: "Attachment") -> bool:
    """Whether the running thread has disabled it."""
    return any(other is attachment for other in _DISABLED.attachments)


@contextlib.contextmanager
def disabling(attachment: "Attachment") -> Iterator[None]:
    """Within the context the attachment is disabled in this thread, beside what is already."""
    with _exactly((*_DISABLED.attachments, attachment)):
        yield


def keep_disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs with what is disabled now, whenever and in whatever thread it is called:
    a checkpointed layer runs again in the backward pass, which may be elsewhere."""
    if torch.compiler.is_compiling():
        return function
    return functools.partial(_call_with, _DISABLED.attachments, function)


def _call_with(
    attachments: "tuple[Attachment, ...]", function: Callable[..., Any], *args: Any
) -> Any:
    with _exactly(attachments):
        return function(*args)


@contextlib.contextmanager
def _exactly(attachments: "tuple[Attachment, ...]") -> Iterator[None]:
    """Within the context this thread has disabled these and no others."""
    before = _DISABLED.attachments
    _DISABLED.attachments = attachments
    for attachment in attachments:
        attachment.count_disabled(1)
    try:
        yield
    finally:
        for attachment in attachments:
            attachment.count_disabled(-1)
        _DISABLED.attachments = before
