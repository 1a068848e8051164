"""What the ranks do together: they agree on errors, so that none waits for one that has failed."""

import contextlib
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


class Refused(ValueError):
    """Data, settings or a loss that this program cannot go on with; a line says why."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A body that may fail on some ranks; then all of them raise.

    Every rank must enter it, and the body may not wait for other ranks.

    Raises:
        Refused: the same on every rank: what the body raised as a ValueError or OSError.
    """
    failure: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = error
    messages = gather(None if failure is None else str(failure))
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed:
        message = messages[failed[0]]
        if set(messages) != {message}:
            message = f"on rank {failed[0]} ({len(failed)} of {len(messages)} failed): {message}"
        raise Refused(message) from failure


def say_error(message: str) -> None:
    """Prints why this rank ends: once, where all ranks end for the same reason."""
    rank, line = dist.get_rank(), " ".join(message.split("\n"))
    said = None
    with contextlib.suppress(Exception):  # others may have ended already
        store = dist.PrefixStore("errors", _get_default_store())
        if rank == 0:
            store.set("0", line)
        else:
            store.wait(["0"], timedelta(seconds=5))
            said = store.get("0").decode()
    if said != line:
        print(f"error: {line}", file=sys.stderr, flush=True)


def gather(value: Any) -> list[Any]:
    """The values of all ranks, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
