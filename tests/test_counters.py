"""Counters: what a batch adds, ageing, and saturation instead of wrapping."""

from __future__ import annotations

import pytest
import torch

from torchrec_freq import COUNT_CEILING
from torchrec_freq.counters import RowCounters


def make(*rows: int) -> RowCounters:
    return RowCounters(rows)


def load(counters: RowCounters, index: int, counts: torch.Tensor, steps: int) -> None:
    counters.table(index).copy_(counts)
    counters.steps[index] = steps, 0


def test_four_bytes_a_row() -> None:
    counters = make(1000, 24)
    assert counters.counts.numel() * counters.counts.element_size() == 4 * 1024


def test_modes() -> None:
    rows = torch.tensor([0, 2, 2, 4, 2])
    samples, batches, frozen = make(3, 2), make(3, 2), make(3, 2)
    for _ in range(2):
        samples.add(rows, "samples")
        batches.add(rows, "batches")
        frozen.add(rows, "frozen")
    assert samples.saturated(0).tolist() == [2, 0, 6]
    assert samples.saturated(1).tolist() == [0, 2]
    assert samples.gather(rows).tolist() == [2, 6, 6, 2, 6]
    assert batches.saturated(0).tolist() == [2, 0, 2]
    assert frozen.counts.tolist() == [0] * 5


def test_nothing_to_count() -> None:
    counters = make(0, 1)
    counters.add(torch.empty(0, dtype=torch.int64), "samples")
    counters.add(torch.tensor([0]), "samples")
    assert counters.saturated(0).tolist() == [] and counters.saturated(1).tolist() == [1]


def test_saturates_instead_of_wrapping() -> None:
    counters = make(3)
    load(counters, 0, torch.tensor([COUNT_CEILING, COUNT_CEILING - 1, 5]), 1)
    rows = torch.tensor([0, 0, 1, 1, 2])
    counters.add(rows, "samples")
    assert counters.saturated(0).tolist() == [COUNT_CEILING, COUNT_CEILING, 6]
    assert counters.gather(torch.tensor([0, 2])).tolist() == [COUNT_CEILING, 6]


def test_clamps_before_int32_ends() -> None:
    counters = make(2)
    load(counters, 0, torch.tensor([COUNT_CEILING, 0]), 1)
    # Stands for the 2^30 lookups that it takes to come near the end of int32.
    counters.counts[0] = 2**31 - 2
    counters._bound = 2**31 - 2
    counters.add(torch.tensor([0, 0, 0, 1]), "samples")
    assert counters.counts.min() >= 0
    assert counters.saturated(0).tolist() == [COUNT_CEILING, 1]
    counters.add(torch.tensor([0, 1]), "batches")
    assert counters.saturated(0).tolist() == [COUNT_CEILING, 2]


def test_halving_is_by_table_and_in_whole_numbers() -> None:
    counters = make(2, 1)
    load(counters, 0, torch.tensor([7, 0]), 9)
    load(counters, 1, torch.tensor([7]), 9)
    counters.halve(0)
    assert counters.saturated(0).tolist() == [3, 0] and counters.saturated(1).tolist() == [7]
    assert counters.steps[:, 0].tolist() == [4, 9]


def test_a_saturated_count_ages_like_the_ceiling() -> None:
    counters = make(1)
    load(counters, 0, torch.tensor([COUNT_CEILING]), 1)
    counters.add(torch.zeros(100, dtype=torch.int64), "samples")
    counters.halve(0)
    assert counters.saturated(0).tolist() == [COUNT_CEILING // 2]


def test_half_life_counts_steps() -> None:
    counters = make(1)
    seen = []
    for _ in range(6):
        counters.begin_step("samples")
        counters.add(torch.zeros(4, dtype=torch.int64), "samples")
        counters.end_step(half_life=3)
        seen.append((int(counters.saturated(0)), counters.steps[0, 0]))
    assert seen == [(4, 1), (8, 2), (6, 1), (10, 2), (14, 3), (9, 2)]
    assert counters.device_steps.tolist() == [2]


def test_frozen_counts_must_be_loaded() -> None:
    counters = make(2)
    with pytest.raises(RuntimeError, match="load_row_counts"):
        counters.begin_step("frozen")
    load(counters, 0, torch.tensor([3, 4]), 10)
    counters.begin_step("frozen")
    assert counters.steps[:, 0].tolist() == counters.device_steps.tolist() == [10]
