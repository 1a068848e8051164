"""Counts: what a batch adds, saturation instead of wrapping, what cannot be a count."""

from __future__ import annotations

import pytest
import torch
from torchrec_freq.engine.counters import count_occurrences_, counted, halve_

from torchrec_freq import COUNT_CEILING
from torchrec_freq.config import CountMode
from torchrec_freq.counts.state import check_counts


def count(mode: CountMode, start: list[int], rows: list[int], trained: list[int]) -> list[int]:
    counts_R = torch.tensor(start, dtype=torch.int32)
    now_R = count_occurrences_(
        counts_R.clone(), torch.tensor(rows), torch.tensor(trained, dtype=torch.int32)
    )
    after: list[int] = counted(mode, counts_R, now_R).tolist()
    return after


def test_modes() -> None:
    rows, trained = [0, 2, 2, 4, 2, 3], [1, 1, 1, 1, 1, 0]
    assert count("samples", [5, 5, 5, 0, 0], rows, trained) == [6, 5, 8, 0, 1]
    assert count("batches", [5, 5, 5, 0, 0], rows, trained) == [6, 5, 6, 0, 1]
    assert count("frozen", [5, 5, 5, 0, 0], rows, trained) == [5, 5, 5, 0, 0]
    everything = count_occurrences_(
        torch.zeros(3, dtype=torch.int32), torch.tensor([0, 2, 2]), None
    )
    assert everything.tolist() == [1, 0, 2]


@pytest.mark.parametrize("mode", ["samples", "batches"])
def test_saturates_instead_of_wrapping(mode: CountMode) -> None:
    start = [COUNT_CEILING, COUNT_CEILING - 1, 5]
    after = count(mode, start, [0, 0, 1, 1, 2], [1] * 5)
    assert after == [COUNT_CEILING, COUNT_CEILING, 6]
    # A batch as large as the headroom of int32.
    now = torch.tensor([2**31 - 1], dtype=torch.int32)
    assert counted("samples", torch.tensor([COUNT_CEILING]), now).tolist() == [COUNT_CEILING]


def test_halving_is_in_whole_numbers() -> None:
    counts = torch.tensor([7, 0, 1, COUNT_CEILING], dtype=torch.int32)
    halve_(counts)
    assert counts.tolist() == [3, 0, 0, COUNT_CEILING // 2]


def test_what_is_no_count() -> None:
    check_counts("t", torch.tensor([], dtype=torch.int32))
    for wrong in (
        torch.tensor([-1]),
        torch.tensor([COUNT_CEILING + 1]),
        torch.tensor([0.5]),
        torch.tensor([torch.nan]),
        torch.tensor([True]),
        torch.zeros(2, 2),
    ):
        with pytest.raises(ValueError, match="'t'"):
            check_counts("t", wrong)
