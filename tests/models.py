"""Small sharded models, random batches for them, and the same in the plain-torch reference."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from reference import Feature, ReferenceModel, ReferenceTable
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan
from torchrec.distributed.types import ShardedTensor, ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import (
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_freq

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


def lookup_loss(outputs: Mapping[str, Tensor], samples: int) -> Tensor:
    """Mean over the samples of a loss of each looked-up row."""
    total: Tensor | float = 0.0
    for index, name in enumerate(sorted(outputs)):
        x = outputs[name]
        column = torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype)
        per_lookup = ((x * column).mean(dim=1) * (1 + index) - 0.2).square()
        total = total + per_lookup.sum() / samples
    assert isinstance(total, Tensor)
    return total


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
    """A sharded model and the reference, which start equal and are stepped together.

    Attributes:
        forward: outputs of the model by feature.
    """

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
        sequence: bool = False,
        seed: int = 0,
    ) -> None:
        options = dict(options or {})
        own = {t.name: {**options, **(by_table or {}).get(t.name, {})} for t in tables}
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        self.tables, self.weighted, self.sequence = tables, weighted, sequence
        collection = make_collection(tables, weighted, sequence=sequence)
        parts = collection.embeddings if sequence else collection.embedding_bags
        weights = {t.name: parts[t.name].weight.detach() for t in tables}
        self.reference = make_reference(tables, weights, own, sequence)
        sharder: Any = EmbeddingCollectionSharder() if sequence else EmbeddingBagCollectionSharder()
        if by_sharder:
            sharder = EmbeddingBagCollectionSharder(
                fused_params=torchrec_freq.fused_params(lr=LR, **options)
            )
        else:
            if meta:
                collection = make_collection(tables, weighted, torch.device("meta"))
                parts = collection.embedding_bags
            for t in tables:
                apply_optimizer_in_backward(
                    optimizer or torchrec_freq.FrequencySGD,
                    parts[t.name].parameters(),
                    {"lr": LR, **own[t.name]},
                )
        self.model = shard(collection, plan, sharder, {} if dtensor else weights, dtensor)
        self.split_reference(self.model.column_shards)
        self.forward: Callable[[KeyedJaggedTensor], Mapping[str, Tensor]] = self._forward

    def _forward(self, kjt: KeyedJaggedTensor) -> Mapping[str, Tensor]:
        outputs = self.model(kjt)
        if self.sequence:
            return {name: jagged.values() for name, jagged in outputs.items()}
        pooled: dict[str, Tensor] = outputs.to_dict()
        return pooled

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

        def mean_loss(outputs: Mapping[str, Tensor], samples: int) -> Tensor:
            used = {name: output for name, output in outputs.items() if name != unused}
            return lookup_loss(used, samples) if self.sequence else sample_loss(used).mean()

        loss = mean_loss(self.forward(local), per_rank)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        expected = self.reference.step(features, lambda o: mean_loss(o, per_rank * ranks))
        return float(total) / ranks, expected

    def step_reference(self, size: int) -> None:
        """The step of a model that somebody else trained on the same batch of ``size`` samples."""
        features = make_batch(self.rng, self.tables, size, weighted=self.weighted)
        self.reference.step(features, lambda outputs: sample_loss(outputs).mean())

    def check(self, tolerance: float = 1e-6, squares: float = 1.0) -> None:
        """Weights within ``tolerance`` of the reference; sums and totals nearly, counts exactly.

        Args:
            squares: how many times the reference's those of the model are.
        """
        weights = full_weights(self.model)
        states = torchrec_freq.table_states(self.model)
        assert list(states) == [t.name for t in self.tables]
        for name, table in self.reference.tables.items():
            torch.testing.assert_close(
                {name: weights[name].double()}, {name: table.weight}, rtol=0, atol=tolerance
            )
            state = states[name]
            torch.testing.assert_close(state.counts.long(), table.count_tensor(), rtol=0, atol=0)
            assert state.age == table.age, name
            totals = state.totals / torch.tensor([1.0, squares, 1.0, 1.0])
            torch.testing.assert_close(totals, table.totals(), rtol=1e-5, atol=0)
            if table.normalize is not None:
                sums = state.row_sums() / squares
                torch.testing.assert_close(sums, table.sum_tensor(), rtol=1e-4, atol=1e-6)


def make_reference(
    tables: list[TableSpec],
    weights: Mapping[str, Tensor],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    sequence: bool = False,
) -> ReferenceModel:
    """The reference of tables that start with ``weights``."""
    trained = {
        t.name: ReferenceTable(
            weights[t.name],
            t.features,
            pooling="none" if sequence else "mean" if t.mean else "sum",
            **(options or {}).get(t.name, {}),
        )
        for t in tables
    }
    return ReferenceModel(trained, LR)


def make_collection(
    tables: list[TableSpec],
    weighted: bool = False,
    device: torch.device | None = None,
    dtype: DataType = DataType.FP32,
    sequence: bool = False,
) -> Any:
    """A collection of bags, or of sequences."""
    # Small values keep the losses, and with them the rounding errors, small.
    common = [
        {
            "name": t.name,
            "num_embeddings": t.rows,
            "embedding_dim": t.columns,
            "feature_names": t.features,
            "data_type": dtype,
            "init_fn": lambda w: nn.init.uniform_(w, -0.2, 0.2),
        }
        for t in tables
    ]
    if sequence:
        return EmbeddingCollection(tables=[EmbeddingConfig(**c) for c in common], device=device)
    pooling = [PoolingType.MEAN if t.mean else PoolingType.SUM for t in tables]
    bags = [EmbeddingBagConfig(**c, pooling=p) for c, p in zip(common, pooling, strict=True)]
    return EmbeddingBagCollection(tables=bags, is_weighted=weighted, device=device)


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
    from torchrec_freq.sharded.install import frequency_modules

    for _, handle in frequency_modules(model):
        for part in handle.shards:
            columns = slice(part.column_offset, part.column_offset + part.columns)
            part.weights().copy_(part.part_of(weights[part.table])[:, columns])
