"""What ends a run with a line instead of a traceback, on all ranks."""

import contextlib
import sys
from datetime import timedelta
from functools import partial
from typing import Final

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from benchmarks.common import ranks


class Refused(ValueError):
    """Data, settings or a loss that this program cannot go on with; a line says why."""


together: Final = partial(ranks.together, lambda _, why: Refused(why), ValueError, OSError)
"""A body that may fail on some ranks with a ValueError or OSError; then all are `Refused`."""


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
