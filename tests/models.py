"""Small sharded models, random batches for them, and the same in the plain-torch reference."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from reference import Feature, ReferenceModel, ReferenceTable
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan
from torchrec.distributed.types import ShardedTensor, ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_freq
from torchrec_freq.sharded.install import frequency_modules

LR = 0.03


@dataclasses.dataclass
class TableSpec:
    name: str
    rows: int
    columns: int
    features: list[str]
    mean: bool = False


# A shared table, and one whose rows do not divide by the ranks.
TABLES = [
    TableSpec("a", 12, 16, ["f0"]),
    TableSpec("b", 7, 16, ["f1", "f2"]),
    TableSpec("c", 30, 32, ["f3"]),
]


def sample_loss(outputs: Mapping[str, Tensor]) -> Tensor:
    """[batch] losses, not linear in the embeddings, with weights that differ by column."""
    total: Tensor | float = 0.0
    for index, name in enumerate(sorted(outputs)):
        x = outputs[name]
        column = torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype)
        linear, square = (x * column).mean(dim=1), x.square().mean(dim=1)
        total = total + 16 * ((0.3 + 0.2 * index) * linear + square)
    assert isinstance(total, Tensor)
    return (total - 1.0).square() * 0.05


def make_batch(
    rng: random.Random,
    tables: list[TableSpec],
    size: int,
    *,
    weighted: bool = False,
    skip: str | None = None,
    most: int = 4,
) -> list[Feature]:
    """Random bags, skewed so that rows repeat in a bag, a batch and across ranks; some empty."""
    features = []
    for table in tables:
        for name in table.features:
            bags = []
            for _ in range(size):
                length = 0 if name == skip else rng.randint(0, most)
                bags.append([int(table.rows * rng.random() ** 2) for _ in range(length)])
            weights = [[rng.uniform(0.2, 2.0) for _ in bag] for bag in bags] if weighted else None
            features.append(Feature(name, bags, weights))
    return features


def to_kjt(features: list[Feature], rows: slice = slice(None)) -> KeyedJaggedTensor:
    bags = [bag for feature in features for bag in feature.bags[rows]]
    weights = None
    if features[0].weights is not None:
        weights = torch.tensor(
            [w for f in features for bag in (f.weights or [])[rows] for w in bag],
            dtype=torch.float32,
        )
    return KeyedJaggedTensor(
        keys=[feature.name for feature in features],
        values=torch.tensor([row for bag in bags for row in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
        weights=weights,
    )


class Pair:
    """A sharded model and the reference, which start equal and are stepped together."""

    def __init__(
        self,
        tables: list[TableSpec],
        plan: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
        *,
        weighted: bool = False,
        by_sharder: bool = False,
        by_table: Mapping[str, Mapping[str, Any]] | None = None,
        meta: bool = False,
        optimizer: Any = None,
        dtensor: bool = False,
        seed: int = 0,
    ) -> None:
        options = dict(options or {})
        own = {t.name: {**options, **(by_table or {}).get(t.name, {})} for t in tables}
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        self.tables = tables
        self.weighted = weighted
        collection = make_collection(tables, weighted)
        weights = {t.name: collection.embedding_bags[t.name].weight.detach() for t in tables}
        self.reference = ReferenceModel(
            {
                t.name: ReferenceTable(
                    weights[t.name],
                    t.features,
                    pooling="mean" if t.mean else "sum",
                    **own[t.name],
                )
                for t in tables
            },
            LR,
        )
        if by_sharder:
            sharder = EmbeddingBagCollectionSharder(
                fused_params=torchrec_freq.fused_params(lr=LR, **options)
            )
        else:
            if meta:
                collection = make_collection(tables, weighted, torch.device("meta"))
            for t in tables:
                apply_optimizer_in_backward(
                    optimizer or torchrec_freq.FrequencySGD,
                    collection.embedding_bags[t.name].parameters(),
                    {"lr": LR, **own[t.name]},
                )
            sharder = EmbeddingBagCollectionSharder()
        self.model = shard(collection, plan, sharder, {} if dtensor else weights, dtensor)
        self.split_reference(self.model.column_shards)

    def split_reference(self, columns: Mapping[str, list[int]]) -> None:
        """Column shards have sums of their own; another plan's shards start from their mean."""
        for name, table in self.reference.tables.items():
            if table.shard_columns != columns.get(name, []):
                table.shard_columns = columns.get(name, [])
                table.sums = {r: s.mean().expand(len(s)) for r, s in table.sums.items()}

    def go_on(self, other: Pair) -> None:
        """Takes the place of another pair, whose state the model has loaded."""
        self.rng, self.reference = other.rng, other.reference
        self.split_reference(self.model.column_shards)

    def step(
        self, per_rank: int = 3, skip: str | None = None, unused: str | None = None
    ) -> tuple[float, float]:
        """One step of both on one global batch; returns the two losses.

        Args:
            skip: a feature without an id.
            unused: a feature that the loss leaves out.
        """
        ranks, rank = dist.get_world_size(), dist.get_rank()
        features = make_batch(
            self.rng, self.tables, per_rank * ranks, weighted=self.weighted, skip=skip
        )
        local = to_kjt(features, slice(rank * per_rank, (rank + 1) * per_rank))

        def mean_loss(outputs: Mapping[str, Tensor]) -> Tensor:
            return sample_loss({k: v for k, v in outputs.items() if k != unused}).mean()

        loss = mean_loss(self.model(local).to_dict())
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        expected = self.reference.step(features, mean_loss)
        return float(total) / ranks, expected

    def step_reference(self, size: int) -> None:
        """The step of a model that somebody else trained on the same batch of ``size`` samples."""
        features = make_batch(self.rng, self.tables, size, weighted=self.weighted)
        self.reference.step(features, lambda outputs: sample_loss(outputs).mean())

    def check(self, tolerance: float = 1e-6) -> None:
        """Weights within ``tolerance`` of the reference, counts exactly equal."""
        weights = full_weights(self.model)
        counts = torchrec_freq.row_counts(self.model)
        assert list(counts) == [t.name for t in self.tables]
        for name, table in self.reference.tables.items():
            torch.testing.assert_close(
                {name: weights[name].double()}, {name: table.weight}, rtol=0, atol=tolerance
            )
            torch.testing.assert_close(counts[name], table.count_tensor(), rtol=0, atol=0)


def make_collection(
    tables: list[TableSpec],
    weighted: bool = False,
    device: torch.device | None = None,
    dtype: DataType = DataType.FP32,
) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=t.name,
                num_embeddings=t.rows,
                embedding_dim=t.columns,
                feature_names=t.features,
                pooling=PoolingType.MEAN if t.mean else PoolingType.SUM,
                data_type=dtype,
                # Small values keep the losses, and with them the rounding errors, small.
                init_fn=lambda w: nn.init.uniform_(w, -0.2, 0.2),
            )
            for t in tables
        ],
        is_weighted=weighted,
        device=device,
    )


def shard(
    collection: nn.Module,
    plan: Mapping[str, Any],
    sharder: Any,
    weights: Mapping[str, Tensor],
    dtensor: bool = False,
    group: Any = None,
    device: str = "cpu",
) -> DistributedModelParallel:
    """Shards by hand-made ``plan`` (table -> TorchRec generator) and copies ``weights`` in."""
    group = group or dist.group.WORLD
    module_plan = construct_module_sharding_plan(
        collection, dict(plan), sharder=sharder, device_type=device
    )
    model = DistributedModelParallel(
        module=collection,
        env=ShardingEnv(group.size(), group.rank(), group, output_dtensor=dtensor),
        device=torch.device(device) if device == "cpu" else torch.device(device, dist.get_rank()),
        plan=ShardingPlan(plan={"": module_plan}),
        sharders=[sharder],
    )
    model.column_shards = column_shards(module_plan)
    for name, value in model.state_dict().items():
        whole = weights.get(name.split(".")[-2])
        if whole is None:  # not a table
            continue
        if not isinstance(value, ShardedTensor):  # data parallel
            value.copy_(whole)
            continue
        for local in value.local_shards():
            (row, column), (rows, columns) = (
                local.metadata.shard_offsets,
                local.metadata.shard_sizes,
            )
            local.tensor.copy_(whole[row : row + rows, column : column + columns])
    return model


def column_shards(plan: Any) -> dict[str, list[int]]:
    """Columns of each shard of the tables that a module's plan splits by columns."""
    split = {}
    for name, sharding in plan.items():
        shards = getattr(sharding.sharding_spec, "shards", [])
        split[name] = [s.shard_sizes[1] for s in shards if s.shard_offsets[0] == 0]
    return {name: columns for name, columns in split.items() if len(columns) > 1}


def full_weights(model: nn.Module, only: str = "") -> dict[str, Tensor]:
    """Whole tables, the same on every rank; of those whose state key has ``only`` in it."""
    weights = {}
    for name, value in model.state_dict().items():
        if only not in name:
            continue
        if not isinstance(value, ShardedTensor):
            weights[name.split(".")[-2]] = value.detach().clone()
            continue
        whole = torch.zeros(*value.size())
        for local in value.local_shards():
            (row, column), (rows, columns) = (
                local.metadata.shard_offsets,
                local.metadata.shard_sizes,
            )
            whole[row : row + rows, column : column + columns] = local.tensor
        dist.all_reduce(whole)
        weights[name.split(".")[-2]] = whole
    return weights


def state_of(model: Any) -> dict[str, Any]:
    """What a checkpoint holds of a model."""
    return {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}


def restore(model: Any, folder: Path) -> None:
    """Loads a checkpoint of :func:`state_of`, of any plan."""
    state = state_of(model)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    model.fused_optimizer.load_state_dict(state["optimizer"])


def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Sets whole tables under any plan."""
    for _, handle in frequency_modules(model):
        for part in handle.shards:
            columns = slice(part.column_offset, part.column_offset + part.columns)
            part.weights().copy_(part.part_of(weights[part.table])[:, columns])
