"""The rule's arithmetic, its settings and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import torchrec_freq
from torchrec_freq import COUNT_CEILING, FrequencyConfig, FrequencySGD
from torchrec_freq.rule import (
    entering_squares,
    kernel_factor,
    lent_squares,
    row_multiplier,
    squares_per_count,
)

COUNTS = [0, 1, 2, 1000, COUNT_CEILING]


@pytest.mark.parametrize("own_weight", [1, 5.0, 30])
@pytest.mark.parametrize("square", [1e-12, 0.3, 40.0])
def test_multiplier(own_weight: float, square: float) -> None:
    config = FrequencyConfig(own_weight=own_weight, eps=1e-3)
    got = row_multiplier(
        config,
        torch.tensor(COUNTS, dtype=torch.int32),
        torch.full((5,), square),
        torch.tensor([0.25]),
    )
    want = [1 / (math.sqrt((0.25 * c + own_weight * square) / 2) + 1e-3) for c in COUNTS]
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-6, atol=0)


@pytest.mark.parametrize("own_weight", [1, 5, 10])
def test_no_row_moves_further_than_its_bound(own_weight: float) -> None:
    """However rare it is and whatever its gradient, and a row without a past just so far."""
    config = FrequencyConfig(own_weight=own_weight)
    squares = torch.logspace(-8, 8, 17)
    bound = math.sqrt(2 / own_weight)
    for per_count in (0.0, 1e-3, 10.0):
        moved = row_multiplier(config, torch.ones(17), squares, torch.tensor(per_count)) * (
            squares.sqrt()
        )
        assert moved.max() <= bound * (1 + 1e-6)
    first = row_multiplier(config, torch.ones(17), squares, torch.tensor(0.0)) * squares.sqrt()
    torch.testing.assert_close(first, torch.full((17,), bound), rtol=1e-3, atol=0)


def test_papers_rule_alone() -> None:
    got = row_multiplier(FrequencyConfig(normalize=None), torch.tensor([0, 1, 4, 100]))
    torch.testing.assert_close(got, torch.tensor([1.0, 1.0, 0.5, 0.1]))
    bounded = FrequencyConfig(normalize=None, min_count=25)
    torch.testing.assert_close(row_multiplier(bounded, torch.tensor([4])), torch.tensor([0.2]))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"own_weight": 5, "eps": 1e-2},
    {"normalize": None, "min_count": 3, "eps": 1e-2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_kernel_form_is_the_rule(options: dict[str, Any]) -> None:
    """FBGEMM's row-wise Adagrad with what is lent moves a row as the rule says."""
    config = FrequencyConfig(**options)
    counts = torch.tensor(COUNTS)
    squares = torch.tensor([0.3, 1e-4, 20.0, 2.0, 0.0])
    per_count = torch.tensor(0.7)
    factor = kernel_factor(config)
    lent = lent_squares(config, counts, per_count / config.own_weight)
    kernel = factor / ((lent + squares).sqrt() + config.eps * factor)
    wanted = row_multiplier(config, counts, squares, per_count)
    torch.testing.assert_close(kernel, wanted, rtol=1e-5, atol=0)
    assert lent.isfinite().all() and math.isfinite(factor)


def test_squares_per_count() -> None:
    got = squares_per_count(torch.tensor([6.0, 0.0, 5.0]), torch.tensor([3.0, 0.0, 0.0]))
    assert got.tolist() == [2.0, 0.0, 0.0]


def test_what_enters_the_sum() -> None:
    squares = torch.tensor([6.0, 1e9, math.nan, math.inf, 8.0, 1e30])
    occurrences = torch.tensor([3, 2, 1, 1, 0, 1])
    got = entering_squares(squares, occurrences, torch.tensor(1000.0))
    assert got.tolist() == [2.0, 1000.0, 0.0, 0.0, 0.0, 1000.0]
    first = entering_squares(squares, occurrences, torch.tensor(math.inf))
    assert first.tolist() == [2.0, 5e8, 0.0, 0.0, 0.0, pytest.approx(1e30)]


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"lr": -0.1}, ["lr", "-0.1", ">= 0"]),
    ({"lr": math.nan}, ["lr", "nan", "finite"]),
    ({"lr": "fast"}, ["lr", "'fast'", "finite"]),
    ({"min_count": 0, "normalize": None}, ["min_count", "0", ">= 1"]),
    ({"min_count": math.inf, "normalize": None}, ["min_count", "inf"]),
    ({"min_count": 3}, ["min_count", "3", "normalize=None"]),
    ({"own_weight": 0}, ["own_weight", "0", "> 0"]),
    ({"own_weight": -1e-3}, ["own_weight", "-0.001"]),
    ({"own_weight": True}, ["own_weight", "True"]),
    ({"own_weight": 3, "normalize": None}, ["own_weight", "3", "normalize='table'"]),
    ({"eps": 0}, ["eps", "0", "1e-30"]),
    ({"eps": math.nan}, ["eps", "nan"]),
    ({"coherence": 0.03}, ["coherence=0.03", "since version 0.2", "own_weight"]),
    ({"coherence": 0}, ["coherence=0"]),
    ({"count": "rows"}, ["count", "'rows'", "samples, batches, frozen"]),
    ({"normalize": "row"}, ["normalize", "'row'", "'table' or None"]),
    ({"half_life": 0}, ["half_life", "0", "at least 1"]),
    ({"half_life": 1.5}, ["half_life", "1.5", "whole number"]),
    ({"half_life": 10, "count": "frozen"}, ["half_life", "10", "do not age"]),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_wrong_values_are_refused(options: dict[str, Any], words: list[str]) -> None:
    arguments = {"lr": 0.1, **options}
    with pytest.raises(ValueError) as by_class:
        FrequencySGD([torch.nn.Parameter(torch.zeros(2, 2))], **arguments)
    with pytest.raises(ValueError) as by_sharder:
        torchrec_freq.fused_params(**arguments)
    for error in (by_class, by_sharder):
        for word in words:
            assert word in str(error.value)


def test_an_option_that_does_not_exist_is_refused() -> None:
    table = torch.nn.Parameter(torch.zeros(2, 2))
    options: dict[str, Any] = {"weight_decay": 0.1}
    with pytest.raises(TypeError, match="weight_decay"):
        FrequencySGD([table], lr=0.1, **options)
    with pytest.raises(TypeError, match="weight_decay"):
        torchrec_freq.fused_params(lr=0.1, **options)
    with pytest.raises(ValueError, match="no option 'weight_decay'"):
        FrequencySGD([{"params": [table], **options}], lr=0.1)


def test_parameter_that_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3\]"):
        FrequencySGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
