"""The rule's arithmetic, its settings and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import torchrec_freq
from torchrec_freq import FrequencyConfig, FrequencySGD
from torchrec_freq.rule import row_multiplier


def expected(config: FrequencyConfig, count: int, steps: int, inverse_scale: float) -> float:
    effective = count * (1 + config.coherence * count / steps)
    scale = inverse_scale if config.normalize else 1.0
    return scale / math.sqrt(max(effective, config.min_count))


@pytest.mark.parametrize("coherence", [0.0, 0.2, 3.0])
@pytest.mark.parametrize("normalize", ["table", None])
@pytest.mark.parametrize("min_count", [1, 7.5])
def test_multiplier(coherence: float, normalize: Any, min_count: float) -> None:
    config = FrequencyConfig(coherence=coherence, normalize=normalize, min_count=min_count)
    counts = [0, 1, 2, 1000, torchrec_freq.COUNT_CEILING]
    got = row_multiplier(
        config,
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor([50]),
        torch.tensor([4.0]),
    )
    want = torch.tensor([expected(config, count, 50, 4.0) for count in counts])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_papers_rule_alone() -> None:
    config = FrequencyConfig(coherence=0, min_count=1, normalize=None)
    got = row_multiplier(config, torch.tensor([1, 4, 100]))
    torch.testing.assert_close(got, torch.tensor([1.0, 0.5, 0.1]))


def test_unknown_scale_updates_nothing() -> None:
    got = row_multiplier(
        FrequencyConfig(), torch.tensor([1]), torch.tensor([1]), torch.tensor([0.0])
    )
    assert got.tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -0.1}, ["lr", "-0.1", ">= 0"]),
        ({"lr": math.nan}, ["lr", "nan", "finite"]),
        ({"lr": "fast"}, ["lr", "'fast'", "finite"]),
        ({"min_count": 0}, ["min_count", "0", ">= 1"]),
        ({"min_count": math.inf}, ["min_count", "inf"]),
        ({"coherence": -1e-3}, ["coherence", "-0.001", ">= 0"]),
        ({"coherence": True}, ["coherence", "True"]),
        ({"count": "rows"}, ["count", "'rows'", "samples, batches, frozen"]),
        ({"normalize": "row"}, ["normalize", "'row'", "'table' or None"]),
        ({"half_life": 0}, ["half_life", "0", "at least 1"]),
        ({"half_life": 1.5}, ["half_life", "1.5", "whole number"]),
        ({"half_life": 10, "count": "frozen"}, ["half_life", "10", "do not age"]),
        ({"weight_decay": 0.1}, ["weight_decay", "options are lr, count"]),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], words: list[str]) -> None:
    arguments = {"lr": 0.1, **options}
    with pytest.raises(ValueError) as by_class:
        FrequencySGD([torch.nn.Parameter(torch.zeros(2, 2))], **arguments)
    with pytest.raises(ValueError) as by_sharder:
        torchrec_freq.fused_params(**arguments)
    for error in (by_class, by_sharder):
        for word in words:
            assert word in str(error.value)


def test_parameter_that_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3\]"):
        FrequencySGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
