"""Runs that are too long to wait for: state set to what they have come to, and a few steps more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    DenseTableBatchedEmbeddingBagsCodegen,
)
from reference import ReferenceTable
from torch import Tensor

from torchrec_freq import COUNT_CEILING, FrequencyConfig, FrequencySGD
from torchrec_freq.counts.state import ROW_COUNTER, TABLE_TOTALS
from torchrec_freq.engine.replicated import ReplicatedTBE
from torchrec_freq.engine.tbe import FrequencyTBE
from torchrec_freq.engine.totals import HOLD_STEPS

ROWS, COLUMNS, LR = 5, 8, 0.1
IDS = [0] * 20 + [1, 1, 2]
OFFSETS = torch.tensor([0, len(IDS)])
GRADIENT = torch.linspace(0.2, 1.0, COLUMNS)
OTHERS = {1: 1000, 2: 3, 3: 70}


class Fused:
    """A table of FBGEMM's."""

    def __init__(self) -> None:
        place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
        self.tbe: Any = FrequencyTBE(
            [(ROWS, COLUMNS, *place)], frequency=FrequencyConfig(), learning_rate=LR
        )
        self.weight = self.tbe.split_embedding_weights()[0]

    def set(self, counts: Tensor, totals: Tensor, age: int) -> None:
        self.tbe.counts_of(0).copy_(counts)
        self.tbe.totals.values[0] = totals
        self.tbe.totals.ages[0] = age

    def step(self) -> None:
        (self.tbe(torch.tensor(IDS), OFFSETS) * GRADIENT).sum().backward()

    def state(self) -> tuple[Tensor, Tensor]:
        self.tbe.totals.settle()
        return self.tbe.settled_counts(0), self.tbe.totals.values[0]


class Replicated(Fused):
    """A data-parallel table, of one rank."""

    def __init__(self) -> None:
        dense = DenseTableBatchedEmbeddingBagsCodegen([(ROWS, COLUMNS)], use_cpu=True)
        self.tbe = ReplicatedTBE.adopt(dense, FrequencyConfig(), [0], LR, None)
        self.weight = self.tbe.weights.data.view(ROWS, COLUMNS)

    def step(self) -> None:
        super().step()
        self.tbe.apply(self.tbe.weights.grad)
        self.tbe.weights.grad = None


class Unsharded:
    """A parameter that is stepped."""

    def __init__(self) -> None:
        self.table = torch.nn.EmbeddingBag(ROWS, COLUMNS, mode="sum", sparse=True)
        self.weight = self.table.weight.data
        self.optimizer = FrequencySGD(self.table.parameters(), lr=LR)
        self.step()  # makes the state

    def set(self, counts: Tensor, totals: Tensor, age: int) -> None:
        state = self.optimizer.state[self.table.weight]
        state[ROW_COUNTER].copy_(counts)
        state[TABLE_TOTALS].copy_(totals)
        state["row_counter_age"].fill_(age)

    def step(self) -> None:
        self.optimizer.zero_grad()
        (self.table(torch.tensor(IDS), OFFSETS[:-1]) * GRADIENT).sum().backward()
        self.optimizer.step()

    def state(self) -> tuple[Tensor, Tensor]:
        state = self.optimizer.state[self.table.weight]
        return state[ROW_COUNTER], state[TABLE_TOTALS]


KINDS: list[Callable[[], Any]] = [Fused, Replicated, Unsharded]


def long_run(make: Callable[[], Any], lookups: int, age: int = 0) -> tuple[Any, ReferenceTable]:
    """A table whose row 0 has been looked up so often, and the reference, which has no ceiling."""
    table = make()
    reference = ReferenceTable(torch.zeros(ROWS, COLUMNS), ["f"])
    reference.counts = Counter({0: lookups, **OTHERS})
    reference.total = float(sum(reference.counts.values()))
    reference.occurrences, reference.squares = reference.total, 0.3 * reference.total
    totals = [2.0, reference.squares, reference.total, reference.occurrences]
    counts = reference.count_tensor().clamp(max=COUNT_CEILING)
    table.set(counts.int(), torch.tensor(totals, dtype=torch.float64), age)
    table.weight.zero_()
    return table, reference


def step_both(table: Any, reference: ReferenceTable) -> None:
    table.step()
    reference.update([("f", row, GRADIENT.double()) for row in IDS], LR)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lookups", [COUNT_CEILING - 30, COUNT_CEILING, 10**10])
def test_a_row_beyond_the_ceiling_leaves_the_rates_of_the_others(
    lookups: int, kind: Callable[[], Any]
) -> None:
    table, reference = long_run(kind, lookups)
    for _ in range(3):
        table.weight.zero_()
        reference.weight.zero_()
        step_both(table, reference)
        torch.testing.assert_close(
            table.weight[1:].double(), reference.weight[1:], rtol=1e-6, atol=0
        )
    counts, totals = table.state()
    assert int(counts[0]) == COUNT_CEILING
    assert counts[1:].tolist() == reference.count_tensor()[1:].tolist()
    # Its own rate rises by what its share is taken too small.
    short = (COUNT_CEILING / reference.counts[0]) ** 0.5
    torch.testing.assert_close(
        table.weight[0].double() * short, reference.weight[0], rtol=1e-4, atol=0
    )
    assert float(totals[2]) == reference.total


@pytest.mark.parametrize("kind", KINDS)
def test_squares_go_on_by_their_mean_once_float32_does_not_show_them(
    kind: Callable[[], Any],
) -> None:
    table, reference = long_run(kind, 10**9, age=HOLD_STEPS + 1)
    per_occurrence = reference.squares / reference.occurrences
    for _ in range(3):
        step_both(table, reference)
    _, totals = table.state()
    assert float(totals[1]) / float(totals[3]) == pytest.approx(per_occurrence, rel=1e-12)
    assert float(totals[3]) == reference.occurrences
