"""A bare TBE of three tables, FBGEMM's stock ones beside it, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    EmbeddingLocation,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from torchrec_freq import FrequencyConfig
from torchrec_freq.engine.counting import CountingTBE
from torchrec_freq.engine.tbe import FrequencyTBE

SHAPES = [(11, 8), (5, 16), (40, 16)]
FEATURES = [0, 1, 1, 2]
LR = 0.05


def specs(shapes: list[tuple[int, int]] = SHAPES) -> list[Any]:
    return [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in shapes]


def make(config: FrequencyConfig | None = None, **options: Any) -> FrequencyTBE:
    torch.manual_seed(0)
    tbe = FrequencyTBE(
        specs(),
        frequency=config or FrequencyConfig(),
        feature_table_map=FEATURES,
        learning_rate=LR,
        **options,
    )
    tbe.init_embedding_weights_uniform(-0.1, 0.1)
    return tbe


def make_stock(optimizer: EmbOptimType, **options: Any) -> SplitTableBatchedEmbeddingBagsCodegen:
    torch.manual_seed(0)
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        specs(), optimizer=optimizer, feature_table_map=FEATURES, learning_rate=LR, **options
    )
    tbe.init_embedding_weights_uniform(-0.1, 0.1)
    return tbe


def batch(seed: int, size: int = 6, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Ids and offsets: skewed, with repetitions and empty bags."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(FEATURES), size), generator=generator)
    ids = [
        (SHAPES[t][0] * torch.rand(int(n.sum()), generator=generator) ** 2).long()
        for t, n in zip(FEATURES, lengths, strict=True)
    ]
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)))
    return torch.cat(ids).to(dtype), offsets.to(dtype)


def loss(output: Tensor) -> Tensor:
    return (output * torch.linspace(0.5, 1.5, output.shape[1]) - 0.3).square().mean()


def counts(tbe: CountingTBE) -> list[Tensor]:
    return [tbe.rows_of(t, tbe.counts).long() for t in range(len(SHAPES))]


def train(tbe: Any, steps: range) -> None:
    for step in steps:
        loss(tbe(*batch(step))).backward()


def same(a: FrequencyTBE, b: FrequencyTBE) -> None:
    """Weights, counts, sums and totals to the last bit."""
    for x, y in zip(a.split_embedding_weights(), b.split_embedding_weights(), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(counts(a), counts(b), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(a.sums, b.sums)
    assert torch.equal(a.totals.values, b.totals.values)
    assert torch.equal(a.totals.ages, b.totals.ages)
