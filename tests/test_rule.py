"""The rule's arithmetic, its settings and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import torchrec_freq
from torchrec_freq import COUNT_CEILING, FrequencyConfig, FrequencySGD
from torchrec_freq.rule import (
    cap_squares,
    kernel_counts,
    kernel_factor,
    mean_square,
    row_multiplier,
)

COUNTS = [0, 1, 2, 1000, COUNT_CEILING]
SUMS = [0.0, 4.0, 1e-12, 30.0, 1e9]


@pytest.mark.parametrize("prior_count", [0, 1, 10.0, 1e6, math.inf])
@pytest.mark.parametrize("square", [0.0, 1e-12, 0.3, 40.0])
def test_multiplier(prior_count: float, square: float) -> None:
    config = FrequencyConfig(prior_count=prior_count, eps=1e-3)
    counts, rho = torch.tensor(COUNTS, dtype=torch.int32), torch.tensor(0.25)
    got = row_multiplier(config, counts, torch.tensor(SUMS), rho, torch.tensor(square))
    want = []
    for count, own in zip(COUNTS, SUMS, strict=True):
        prior = 1.0 if prior_count == math.inf else prior_count / max(count + prior_count, 1e-9)
        past = (1 - prior) * own + prior * 0.25 * (count + 1)
        want.append(1 / (math.sqrt(past + square) + 1e-3))
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=0)


def test_papers_rule() -> None:
    """Alone, and as FBGEMM's row-wise Adagrad has it: a row's own square vanishes beside it."""
    squares = torch.tensor([0.0, 1e-4, 20.0, 1e6, 1e20])
    for config in (
        FrequencyConfig(normalize=None),
        FrequencyConfig(normalize=None, min_count=25, eps=1e-2),
    ):
        want = [1 / (math.sqrt(max(c, config.min_count)) + config.eps) for c in COUNTS]
        got = row_multiplier(config, torch.tensor(COUNTS))
        torch.testing.assert_close(got, torch.tensor(want), rtol=1e-6, atol=0)
        factor = kernel_factor(config)
        root = (kernel_counts(config, torch.tensor(COUNTS)) + squares).sqrt()
        kernel = factor / (root + config.eps * factor)
        torch.testing.assert_close(kernel, torch.tensor(want), rtol=1e-6, atol=0)


def test_mean_square() -> None:
    got = mean_square(torch.tensor([6.0, 0.0, 5.0]), torch.tensor([3.0, 0.0, 0.0]))
    assert got.tolist() == [2.0, 0.0, 0.0]


def test_the_cap_of_a_step() -> None:
    totals = torch.tensor([100.0, 100.0, 100.0, 7.0, 0.0])
    steps = torch.tensor([10.0, 50.0, 3.0, 2.0, 0.0])
    got = cap_squares(totals, steps).tolist()
    assert got == pytest.approx([30.0, 10.0, 100.0, math.inf, math.inf])


PAPER: dict[str, Any] = {"normalize": None}
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"lr": -0.1}, ["lr", "-0.1", ">= 0"]),
    ({"lr": math.nan}, ["lr", "nan", "finite"]),
    ({"lr": "fast"}, ["lr", "'fast'", "finite"]),
    ({"prior_count": -1}, ["prior_count", "-1", ">= 0"]),
    ({"prior_count": math.nan}, ["prior_count", "nan"]),
    ({"prior_count": -math.inf}, ["prior_count", "-inf"]),
    ({"prior_count": True}, ["prior_count", "True"]),
    ({"prior_count": 3, **PAPER}, ["prior_count", "3", "leave it out"]),
    ({"admit": 0}, ["admit", "0", ">= 1", "occurrences"]),
    ({"admit": 2.5}, ["admit", "2.5", "whole number"]),
    ({"min_count": 0, **PAPER}, ["min_count", "0", ">= 1"]),
    ({"min_count": math.inf, **PAPER}, ["min_count", "inf"]),
    ({"min_count": 3}, ["min_count", "3", "normalize=None"]),
    ({"eps": 0}, ["eps", "0", "1e-30"]),
    ({"eps": math.nan}, ["eps", "nan"]),
    ({"count": "rows"}, ["count", "'rows'", "'samples' or 'frozen'"]),
    ({"count": "frozen"}, ["count", "'frozen'", "normalize=None"]),
    ({"count": "batches"}, ["count", "'batches'", "since version 0.3", "'samples'"]),
    ({"own_weight": 5}, ["own_weight", "since version 0.3", "Leave it out", "prior_count"]),
    ({"normalize": "row"}, ["normalize", "'row'", "'table' or None"]),
    ({"half_life": 0}, ["half_life", "0", ">= 1"]),
    ({"half_life": 1.5}, ["half_life", "1.5", "whole number"]),
    ({"half_life": 10, "count": "frozen", **PAPER}, ["half_life", "10", "do not age"]),
    ({"weight_decay": 0.1}, ["no option 'weight_decay'", "prior_count"]),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_wrong_values_are_refused(options: dict[str, Any], words: list[str]) -> None:
    """By the class, by its parameter groups, and by a sharder's fused params."""
    table, arguments = torch.nn.Parameter(torch.zeros(2, 2)), {"lr": 0.1, **options}
    errors = []
    with pytest.raises(ValueError) as by_class:
        FrequencySGD([table], **arguments)
    errors.append(str(by_class.value))
    with pytest.raises(ValueError) as by_group:
        FrequencySGD([{"params": [table], **options}], lr=0.1)
    errors.append(str(by_group.value))
    with pytest.raises(ValueError) as by_sharder:
        torchrec_freq.fused_params(**arguments)
    errors.append(str(by_sharder.value))
    for error in errors:
        assert all(word in error for word in words), error


def test_parameter_that_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3\]"):
        FrequencySGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
