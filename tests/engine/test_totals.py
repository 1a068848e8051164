"""The tables' totals by hand, on one process; the plan tests compare them on several."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torchrec_freq import FrequencyConfig
from torchrec_freq.engine.totals import HOLD_STEPS, TableTotals, TotalsTable
from torchrec_freq.rule import SQUARE_LIMIT

FIRST = torch.tensor([0])


def totals_of(**options: object) -> TableTotals:
    return TableTotals([TotalsTable(1, FrequencyConfig(**options))])  # type: ignore[arg-type]


def step(totals: TableTotals, squares: float, occurrences: int) -> None:
    totals.advance()
    many = torch.tensor([occurrences])
    totals.add(FIRST, torch.tensor([squares]), many, many)
    totals.end_backward([0])


def test_rates_are_those_of_the_steps_before() -> None:
    totals = totals_of()
    totals.advance()
    assert [rate.tolist() for rate in totals.rates()] == [[0.0], [math.inf]]
    step(totals, 6.0, 3)
    assert [rate.tolist() for rate in totals.rates()] == [[0.0], [math.inf]]
    step(totals, 1.0, 4)
    assert [rate.tolist() for rate in totals.rates()] == [[2.0], [2.0 * SQUARE_LIMIT]]
    totals.settle()
    assert totals.values.tolist() == [[2.0, 7.0, 7.0, 7.0]]
    assert totals.rates()[0].tolist() == [1.0]


def test_features_of_a_table_add_up() -> None:
    config = FrequencyConfig()
    totals = TableTotals([TotalsTable(2, config), TotalsTable(1, config)])
    assert [list(totals.slots(table)) for table in (0, 1)] == [[0, 1], [2]]
    totals.advance()
    numbers = torch.tensor([3, 4, 5])
    totals.add(torch.tensor([0, 1, 2]), torch.tensor([1.0, 10.0, 100.0]), numbers, numbers)
    totals.settle()
    assert totals.values[:, 1:].tolist() == [[11.0, 7.0, 7.0], [100.0, 5.0, 5.0]]


def test_a_feature_without_a_gradient_in_any_column() -> None:
    """Its lookups are not counted; one with a gradient in another shard's columns is."""
    config = FrequencyConfig()
    totals = TableTotals([TotalsTable(2, config, split_columns=True)])
    heard: list[Any] = []
    totals.listen(lambda untouched, due: heard.append(untouched))
    totals.advance()
    slots, lookups = torch.tensor([0, 1]), torch.tensor([3, 4])
    totals.add(slots, torch.zeros(2), lookups, lookups, torch.tensor([0.0, 0.0]))
    totals.add(slots, torch.tensor([0.0, 8.0]), 0 * lookups, 0 * lookups, torch.tensor([0.0, 4.0]))
    totals.settle()
    assert totals.values[0, 1:].tolist() == [8.0, 4.0, 4.0]
    assert heard[-1].tolist() == [True, False]


def test_half_life() -> None:
    totals = totals_of(half_life=3)
    heard: list[int] = []
    totals.listen(lambda _, due: heard.extend(due))
    for _ in range(3):
        step(totals, 8.0, 4)
    assert heard == [] and totals.ages.tolist() == [3]
    totals.settle()
    assert heard == [0] and totals.ages.tolist() == [0]
    assert totals.values[0, 1:].tolist() == [12.0, 6.0, 6.0]


def test_an_age_of_another_half_life_halves_once() -> None:
    totals = totals_of(half_life=3)
    totals.ages.fill_(100)
    totals.values[0, 1:] = 64.0
    step(totals, 0.0, 0)
    totals.settle()
    assert totals.values[0, 1:].tolist() == [32.0] * 3 and int(totals.ages[0]) < 3


def test_sums_go_on_as_before_when_float32_no_longer_shows_a_square() -> None:
    totals = totals_of()
    step(totals, 6.0, 3)
    totals.ages.fill_(HOLD_STEPS - 1)
    step(totals, 9.0, 3)  # the last one that is seen
    step(totals, 0.0, 5)
    totals.settle()
    assert totals.values[0, 1:].tolist() == pytest.approx([15.0 + 2.5 * 5, 11.0, 11.0])


def test_fractions_of_a_row_add_up() -> None:
    """Of a row that occurs in two features each adds a part of 1."""
    totals = TableTotals([TotalsTable(2, FrequencyConfig(count="batches"))])
    totals.advance()
    thirds = torch.tensor([1 / 3, 2 / 3], dtype=torch.float32)
    totals.add(torch.tensor([0, 1]), torch.zeros(2), thirds, torch.tensor([1, 2]))
    totals.settle()
    assert totals.values[0, 2:].tolist() == [1.0, 3.0]
