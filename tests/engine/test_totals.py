"""The tables' totals by hand, on one process; the plan tests compare them on several."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from torchrec_freq import FrequencyConfig
from torchrec_freq.engine.totals import TableTotals
from torchrec_freq.rule import sample_weight


def totals_of(tables: int = 1, **options: Any) -> TableTotals:
    return TableTotals([FrequencyConfig(**options)] * tables)


def step(totals: TableTotals, squares: float, occurrences: int, table: int = 0) -> None:
    if totals.sampled():
        one = torch.tensor([table])
        totals.add(one, torch.tensor([squares]), torch.tensor([occurrences]))
    totals.end_step()


def test_rates_are_those_of_the_steps_before() -> None:
    totals = totals_of()
    assert totals.rho().tolist() == [0.0]
    step(totals, 6.0, 3)
    assert totals.rho().tolist() == [2.0]
    step(totals, 1.0, 4)
    assert totals.rho().tolist() == [1.0]
    totals.values[0] = torch.tensor([3.0, 9.0, 3.0, 2.0])  # as loading does
    assert totals.rho().tolist() == [3.0]


def test_shards_and_features_of_a_table_add_up() -> None:
    totals = totals_of(2)
    numbers = torch.tensor([3, 4, 5])
    for _ in range(2):
        totals.add(torch.tensor([0, 0, 1]), torch.tensor([1.0, 10.0, 100.0]), numbers)
    totals.end_step()
    assert totals.values.tolist() == [[3.0, 22.0, 14.0, 1.0], [3.0, 200.0, 10.0, 1.0]]


def test_a_bad_step_enters_as_three_usual_ones() -> None:
    """At most three mean steps, or a tenth of the sum."""
    totals = totals_of()
    for squares in (1e9, 1.0, 1.0):  # without a past there is nothing to go by
        step(totals, squares, 1)
    totals.values[0, 1] = 12.0
    for squares, sum_ in ((1e30, 24.0), (math.inf, 42.0), (2.0, 44.0)):
        step(totals, squares, 1)
        assert float(totals.values[0, 1]) == pytest.approx(sum_)
    totals.values[0] = torch.tensor([3.0, 100.0, 100.0, 100.0])
    step(totals, 1e30, 1)
    assert totals.values.tolist() == [[3.0, 110.0, 101.0, 101.0]]


def test_half_life() -> None:
    totals = totals_of(half_life=3)
    halved: list[int] = []
    totals.listen(halved.append, lambda: None)
    for _ in range(3):
        assert not halved
        step(totals, 8.0, 4)
    assert halved == [0] and totals.ages.tolist() == [0]
    assert totals.values.tolist() == [[3.0, 12.0, 6.0, 1.5]]
    totals.ages.fill_(100)  # of another half-life: halved once
    step(totals, 8.0, 4)
    assert halved == [0, 0] and totals.ages.tolist() == [0]


def test_tables_of_different_ages_have_weights_of_their_own() -> None:
    late = next(age for age in range(1000, 2000) if sample_weight(age) == 8)
    unsampled = next(age for age in range(1000, 2000) if not sample_weight(age))
    totals = totals_of(3)
    totals.ages.copy_(torch.tensor([5, late, unsampled]))
    totals.add(torch.tensor([0, 1, 2]), torch.tensor([2.0, 2.0, 9.0]), torch.ones(3))
    totals.end_step()
    assert totals.values[:, 1:].tolist() == [[2.0, 1.0, 1.0], [16.0, 8.0, 8.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7, 8, 16])
def test_each_task_of_a_turn_is_sampled_as_often(stride: int) -> None:
    """An eighth of its steps, with weight 8, whichever the turn it takes."""
    assert all(sample_weight(step) == 1 for step in range(64))
    for task in range(stride):
        weights = [sample_weight(step) for step in range(64 + task, 64 + 2000 * stride, stride)]
        assert set(weights) == {0, 8}
        assert sum(weights) / len(weights) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_tables_that_are_trained_in_turn(stride: int) -> None:
    """Their mean squares are within 10 % of those of every step, though gradients get smaller."""
    totals, generator = totals_of(stride), random.Random(stride)
    squares, occurrences = [0.0] * stride, [0] * stride
    for number in range(4000):
        task, many = number % stride, generator.randint(20, 40)
        mean_square = generator.uniform(0.5, 1.5) * (task + 1) / (1 + number / 1000)
        step(totals, mean_square * many, many, task)
        squares[task] += mean_square * many
        occurrences[task] += many
    wanted = [g / c for g, c in zip(squares, occurrences, strict=True)]
    assert totals.rho().tolist() == pytest.approx(wanted, rel=0.1)
    assert totals.values[:, 2].tolist() == pytest.approx(occurrences, rel=0.2)
