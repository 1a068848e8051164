r"""Row-wise Adagrad's sums of squares as counts and squares of a table, and back.

Row-wise Adagrad moves row :math:`i` by :math:`\mathrm{lr}\, g_i / (\sqrt{A_i} + \mathrm{eps})` with
:math:`A_i` the sum of its :math:`\mathrm{mean}_d(g_i^2)`. Here :math:`P_i / 2 = G c_i / (2 C)`
stands in that place (:mod:`torchrec_freq.rule`), so a row keeps its rate with

.. math::
    c_i = \mathrm{round}(A_i / u), \qquad C = \textstyle\sum_i c_i, \qquad G = 2 u C

whatever the unit :math:`u` of a count; back, :math:`A_i = P_i / 2`. What differs from then on is
the weight of the row's own square of the step.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from torchrec_freq.config import require_number
from torchrec_freq.counts.state import COUNT_CEILING, check_form

LARGEST_COUNT: Final = COUNT_CEILING // 2
"""Of a table whose counts come from sums. As much is left for the occurrences to come."""

_CHUNK_ROWS: Final = 1 << 22
"""Rows that are float64 at once."""


def check_sums(table: str, sums_R: Tensor) -> None:
    """Refuses what cannot be the sums of squares of a table.

    Args:
        sums_R: [rows] of any dtype, on any device.

    Raises:
        ValueError: not numbers, finite and at least 0; the message names the table.
    """
    check_form(table, "sums", sums_R)
    for number, chunk_R in enumerate(sums_R.split(_CHUNK_ROWS)):
        wrong_R = ~(chunk_R.isfinite() & (chunk_R >= 0))
        if bool(wrong_R.any()):
            row = int(wrong_R.nonzero()[0])
            raise ValueError(
                f"Table {table!r}: sums must be finite and at least 0; got {chunk_R[row].item()} "
                f"in row {number * _CHUNK_ROWS + row}. Take them from a checkpoint before that."
            )


def check_lookups(table: str, lookups: float | None) -> None:
    """Refuses what cannot be the number of a table's occurrences.

    Raises:
        ValueError: not a finite number of at least 1; the message names the table.
    """
    if lookups is not None:
        require_number(f"lookups of {table!r}", lookups, minimum=1)


def counts_of_sums(sums_R: Tensor, lookups: float | None) -> tuple[Tensor, float]:
    r"""Counts and squares with which rows have the rates that row-wise Adagrad gave them.

    The sum of the counts is ``lookups``, but for the rounding, or the largest count is
    ``LARGEST_COUNT``, whichever gives the smaller ones. Rounding moves the past's part of a row of
    count :math:`c` by at most :math:`1 / (2 c)` of itself, its rate by half of that.

    Args:
        sums_R: [rows], as :func:`check_sums` wants them.
        lookups: occurrences that they stand for; None where unknown.

    Returns:
        int32 CPU tensor [rows], and the sum :math:`G`, 0 where all sums are.
    """
    counts_R = torch.zeros(len(sums_R), dtype=torch.int32)
    total = float(sums_R.sum(dtype=torch.float64))
    if total == 0:
        return counts_R, 0.0
    unit = float(sums_R.max()) / LARGEST_COUNT
    if lookups is not None:
        unit = max(unit, total / lookups)
    count = 0
    for of_R, from_R in zip(counts_R.split(_CHUNK_ROWS), sums_R.split(_CHUNK_ROWS), strict=True):
        of_R.copy_((from_R.double() / unit).round_())
        count += int(of_R.sum())
    return counts_R, 2 * unit * count


def sums_of_counts(counts_R: Tensor, totals: Tensor) -> Tensor:
    r""":math:`A_i = G c_i / (2 C)`, 0 where :math:`C` is.

    Args:
        counts_R: [rows] of any dtype.
        totals: float64 [4], as :mod:`torchrec_freq.counts.state` has them.

    Returns:
        float32 [rows].
    """
    _, squares, count, _ = totals.tolist()
    return counts_R.to(torch.float32).mul_(squares / (2 * count) if count else 0.0)
