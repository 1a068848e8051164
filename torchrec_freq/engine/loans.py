"""What is lent to FBGEMM's kernel for a batch, and what it has added to it: arithmetic alone."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchrec_freq.config import FrequencyConfig
from torchrec_freq.engine.counters import counted
from torchrec_freq.engine.lookups import Lookups
from torchrec_freq.rule import entering_squares, lent_squares


@dataclass
class Loan:
    """What the sums of squares of a batch's rows were before they were lent, and what was lent.

    Attributes:
        before_L: int32 [lookups] the counts.
        after_L: int32 [lookups] the counts once the step is done.
        occurrences_L: int32 [lookups] trained occurrences of the row in the batch.
        lent_L: float32 [lookups]; None until it is.
        thread: whose backward it is.
    """

    lookups: Lookups
    before_L: Tensor
    after_L: Tensor | None = None
    occurrences_L: Tensor | None = None
    lent_L: Tensor | None = None
    thread: int = field(default_factory=threading.get_ident)


def lent(
    config: FrequencyConfig,
    memory_R: Tensor,
    rows_L: Tensor,
    feature_L: Tensor,
    before_L: Tensor,
    per_count_F: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is to be lent to the rows of a batch.

    Args:
        memory_R: int32 [rows] counts, to which the batch has been added.
        per_count_F: float32 [features] of :func:`torchrec_freq.rule.predicted_squares`.

    Returns:
        ``after_L``, ``occurrences_L`` and ``lent_L`` of :class:`Loan`.
    """
    now_L = memory_R.index_select(0, rows_L)
    occurrences_L = now_L - before_L
    after_L = counted(config.count, before_L, now_L)
    unit_L = None
    if config.normalize is not None:
        unit_L = (per_count_F / config.own_weight).index_select(0, feature_L)
    return after_L, occurrences_L, lent_squares(config, after_L, unit_L)


def entering(
    config: FrequencyConfig,
    memory_R: Tensor,
    rows_L: Tensor,
    feature_L: Tensor,
    trained_L: Tensor | None,
    occurrences_L: Tensor,
    lent_L: Tensor,
    limit_F: Tensor,
) -> Tensor:
    """What a batch adds to its tables' sums of squares, from what the kernel has added to a loan.

    Args:
        memory_R: int32 [rows], of which those of the batch have the bits of the kernel's float32.
        limit_F: float32 [features] ``limit`` of :func:`torchrec_freq.rule.entering_squares`.

    Returns:
        float32 [lookups].
    """
    squares_L = memory_R.index_select(0, rows_L).view(torch.float32) - lent_L
    if config.normalize is None:
        return torch.zeros_like(squares_L)  # not seen beside what was lent
    limit_L = limit_F.index_select(0, feature_L)
    entering_L = entering_squares(squares_L, occurrences_L, limit_L)
    return entering_L if trained_L is None else entering_L * trained_L
