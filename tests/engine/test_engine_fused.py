"""The engine compiled: the same to the last bit, in fewer kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from tables import make, same, train
from torch._inductor import metrics
from torch._inductor.graph import GraphLowering

from torchrec_freq import FrequencyConfig
from torchrec_freq.engine import fused, lookups

CONFIGS: dict[str, dict[str, Any]] = {
    "full": {},
    "paper": {"normalize": None},
    "batches": {"count": "batches"},
}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fused._choose.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setenv(fused.FUSE, "1")
    yield
    fused._choose.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("parted", [False, True])
@pytest.mark.parametrize("rule", CONFIGS)
def test_trains_as_without(
    rule: str, parted: bool, compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parted:  # as the lookups of large batches are
        monkeypatch.setattr(lookups, "_WHOLE", 1)
        monkeypatch.setattr(lookups, "_PART", 2)
    config = FrequencyConfig(**CONFIGS[rule])
    compiled_, plain = make(config), make(config)
    before = metrics.generated_kernel_count
    train(compiled_, range(5))
    assert metrics.generated_kernel_count > before, "nothing was compiled"
    monkeypatch.delenv(fused.FUSE)
    fused._choose.cache_clear()
    train(plain, range(5))
    same(compiled_, plain)


def test_a_kernel_each_that_copies_no_table(compiled: None) -> None:
    tbe = make()
    train(tbe, range(1))
    code: list[str] = []
    with mock.patch.object(GraphLowering, "save_output_code", code.append):
        torch._dynamo.reset()
        train(tbe, range(1, 2))
    assert len(code) == 5  # rates, rows, what is lent, what was added, the sums of the step
    for of in code:
        assert len(re.findall(r"^ +cpp_fused\w*\(", of, re.MULTILINE)) == 1
        assert "scatter" not in of
