"""A bare TBE, FBGEMM's stock one and the plain-torch reference beside it, and batches for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from reference import ReferenceTable
from torch import Tensor

from torchrec_freq import FrequencyConfig
from torchrec_freq.engine.counting import CountingTBE
from torchrec_freq.engine.tbe import FrequencyTBE

SHAPES = [(11, 8), (5, 16), (40, 16)]
FEATURES = [0, 1, 1, 2]
LR = 0.05


def specs(shapes: list[tuple[int, int]] = SHAPES) -> list[Any]:
    return [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in shapes]


def make(
    config: FrequencyConfig | None = None,
    shapes: list[tuple[int, int]] = SHAPES,
    features: list[int] = FEATURES,
    **options: Any,
) -> FrequencyTBE:
    options = {"feature_table_map": features, "learning_rate": LR, **options}
    tbe = FrequencyTBE(specs(shapes), frequency=config or FrequencyConfig(), **options)
    fill(tbe)
    return tbe


def make_stock(
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    shapes: list[tuple[int, int]] = SHAPES,
    features: list[int] = FEATURES,
    **options: Any,
) -> Any:
    options = {"feature_table_map": features, "learning_rate": LR, **options}
    tbe = SplitTableBatchedEmbeddingBagsCodegen(specs(shapes), optimizer=optimizer, **options)
    fill(tbe)
    return tbe


def fill(tbe: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for weight in tbe.split_embedding_weights():
        weight.copy_(torch.empty(weight.shape).uniform_(-0.1, 0.1, generator=generator))


def batch(
    seed: int,
    shapes: list[tuple[int, int]] = SHAPES,
    features: list[int] = FEATURES,
    size: int = 4,
    length: int | None = None,
    dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    """Ids and offsets: skewed, with repetitions, and where no length is given with empty bags."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(features), size), generator=generator)
    if length is not None:
        lengths.fill_(length)
    ids = [
        (shapes[t][0] * torch.rand(int(n.sum()), generator=generator) ** 2).long()
        for t, n in zip(features, lengths, strict=True)
    ]
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)))
    return torch.cat(ids).to(dtype), offsets.to(dtype)


def loss(output: Tensor) -> Tensor:
    column = torch.linspace(0.5, 1.5, output.shape[1], device=output.device)
    return (output * column - 0.3).square().sum() / 4


def train(tbe: Any, steps: range) -> None:
    for step in steps:
        loss(tbe(*batch(step))).backward()


def counts(tbe: CountingTBE) -> list[list[int]]:
    return [tbe.rows_of(t, tbe.counts).tolist() for t in range(len(tbe.embedding_specs))]


def same_weights(a: Any, b: Any) -> None:
    assert all(map(torch.equal, a.split_embedding_weights(), b.split_embedding_weights()))


def same(a: FrequencyTBE, b: FrequencyTBE) -> None:
    """Weights, counts, sums and totals to the last bit."""
    same_weights(a, b)
    for name in ("counts", "sums"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("values", "ages"):
        assert torch.equal(getattr(a.totals, name), getattr(b.totals, name)), name


class Plain:
    """A TBE's tables in plain torch, stepped by the gradient of its output."""

    def __init__(self, tbe: CountingTBE, **rule: Any) -> None:
        self.features = list(tbe.features.tables)
        weights: list[Tensor] = tbe.split_embedding_weights()  # type: ignore[attr-defined]
        self.tables = [ReferenceTable(weight, [], **rule) for weight in weights]

    def step(
        self,
        ids: Tensor,
        offsets: Tensor,
        gradient: Tensor,
        weights: Tensor | None = None,
        pooling: PoolingMode = PoolingMode.SUM,
    ) -> None:
        lookups: list[list[tuple[str, int, Tensor]]] = [[] for _ in self.tables]
        ends, column, gradient = offsets.tolist(), 0, gradient.double()
        bags = (len(ends) - 1) // len(self.features)
        for feature, table in enumerate(self.features):
            columns = slice(column, column + self.tables[table].weight.shape[1])
            column = columns.stop
            for bag in range(bags):
                first, end = ends[feature * bags + bag : feature * bags + bag + 2]
                for i in range(first, end):
                    part = gradient[i] if pooling == PoolingMode.NONE else gradient[bag, columns]
                    scale = 1.0 if weights is None else float(weights[i])
                    scale /= end - first if pooling == PoolingMode.MEAN else 1
                    lookups[table].append((str(feature), int(ids[i]), part * scale))
        for reference, found in zip(self.tables, lookups, strict=True):
            reference.update(found, LR)

    def check(self, tbe: FrequencyTBE, atol: float = 1e-6) -> None:
        """Weights by ``atol``, counts exactly, sums and totals as float32 has them."""
        weights = tbe.split_embedding_weights()
        for t, (table, weight) in enumerate(zip(self.tables, weights, strict=True)):
            torch.testing.assert_close(weight.double(), table.weight, rtol=0, atol=atol)
            assert counts(tbe)[t] == table.count_tensor().tolist()
            totals, age = tbe.totals.values[t].tolist(), int(tbe.totals.ages[t])
            wanted = [3.0, table.squares, table.total, table.steps]
            assert age == table.age and totals == pytest.approx(wanted, rel=1e-4)
            if table.normalize is not None:
                zero = torch.zeros(1)
                sums = [float(table.sums.get(row, zero)[0]) for row in range(len(weight))]
                assert tbe.rows_of(t, tbe.sums).tolist() == pytest.approx(sums, rel=1e-4, abs=1e-7)
