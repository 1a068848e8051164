"""The lookups of each feature, in parts or whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tables import counts, make, train

from torchrec_freq import FrequencyConfig
from torchrec_freq.engine import lookups
from torchrec_freq.engine.lookups import Spans


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[7], [0], [0, 100, 0, 1], [50, 3, 0, 200, 0], [9] * 20])
def test_spans(monkeypatch: pytest.MonkeyPatch, lengths: list[int], dtype: torch.dtype) -> None:
    """Parted or not, the features and sums are those of a loop."""
    ends_F = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    values_L = torch.randint(-9, 9, (sum(lengths),), dtype=torch.int32)
    wanted = [int(part.sum()) for part in values_L.split(lengths)]
    features = [feature for feature, length in enumerate(lengths) for _ in range(length)]
    for whole, part in ((1 << 15, 1 << 12), (1, 1), (1, 2), (3, 4)):
        monkeypatch.setattr(lookups, "_WHOLE", whole)
        monkeypatch.setattr(lookups, "_PART", part)
        spans = Spans(ends_F, sum(lengths))
        assert spans.lengths_F.tolist() == lengths
        assert spans.feature_L().tolist() == features
        sums_F = spans.sum(values_L)
        assert sums_F.dtype == torch.int32 and sums_F.tolist() == wanted
        assert spans.sum(values_L.to(torch.float32)).tolist() == wanted


def test_parts_are_about_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    sums = torch.ops.fbgemm.segment_sum_csr

    def spied(each: int, ends_P: torch.Tensor, values_L: torch.Tensor) -> object:
        seen.append(ends_P)
        return sums(each, ends_P, values_L)

    monkeypatch.setattr(torch.ops.fbgemm, "segment_sum_csr", spied)
    lengths = torch.tensor([0, 150_000, 10, 49_990])
    spans = Spans(torch.tensor([0, *lengths.cumsum(0)]), 200_000)
    assert spans.sum(torch.ones(200_000)).tolist() == lengths.tolist()
    (ends_P,) = seen
    parts = 8  # the power of two below 50,000 / 4,096
    longest = ends_P.diff().unflatten(0, (4, parts)).amax(1)
    assert longest.tolist() == [-(-int(length) // parts) for length in lengths]


def test_more_lookups_of_a_feature_than_float32_can_count() -> None:
    many = (1 << 24) + 3
    spans = Spans(torch.tensor([0, many]), many)
    assert spans.sum(torch.ones(many, dtype=torch.int32)).tolist() == [many]
    # Summed one after the other, as many equal numbers come to 15 % too much.
    assert spans.sum(torch.full((many,), 0.1)).item() == pytest.approx(many * 0.1, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"count": "batches"}])
def test_training_in_parts(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    config = FrequencyConfig(**options)
    whole, parted = make(config), make(config)
    train(whole, range(4))
    monkeypatch.setattr(lookups, "_WHOLE", 1)
    monkeypatch.setattr(lookups, "_PART", 2)
    train(parted, range(4))
    assert all(map(torch.equal, counts(parted), counts(whole)))
    weights = (tbe.split_embedding_weights() for tbe in (parted, whole))
    for found, wanted in zip(*weights, strict=True):
        torch.testing.assert_close(found, wanted)
    for tbe in (parted, whole):
        tbe.totals.settle()
    torch.testing.assert_close(parted.totals.values, whole.totals.values, rtol=1e-6, atol=0)
