"""Whose turn it is to read or write state that backwards, copies and checkpoints share."""

from __future__ import annotations

import threading
from typing import Any, Final

import torch
from torch import Tensor

# One for all: what needs two turns, tables and their totals, may take them in any order.
_LOCK: Final = threading.RLock()


def used_here(tensor: Tensor) -> Tensor:
    """The tensor, whose memory no other stream gets before the current one has used it."""
    if tensor.is_cuda and torch.cuda.is_initialized():
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


class Turn:
    """One after another: threads by a lock, CUDA streams by waiting for the last one's event."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        _LOCK.acquire()
        if self._event is not None:
            self._event.wait()

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_initialized():
            self._event = torch.cuda.Event()
            self._event.record()
        _LOCK.release()

    def __reduce__(self) -> Any:
        return Turn, ()  # a copy of the state has its own
