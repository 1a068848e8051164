"""Parts of the engine that ``torch.compile`` makes one kernel of, where it is asked to.

They are functions of tensors that write nothing: a compiled write would copy the counts of all
rows.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

import torch

FUSE: Final = "TORCHREC_FREQ_FUSE"
"""Environment variable that, where it is 1, has them compiled. Off by default: nobody has measured
it on a GPU."""

P = ParamSpec("P")
T = TypeVar("T")


@functools.cache
def _choose(function: Callable[..., object]) -> Callable[..., object]:
    if os.environ.get(FUSE) != "1":
        return function
    # Beyond torch's limit of variants (settings, empty batches) it runs as it is.
    return torch.compile(function, dynamic=True)


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, compiled where :data:`FUSE` said so when it was first used."""
    return _choose(function)  # type: ignore[return-value]
