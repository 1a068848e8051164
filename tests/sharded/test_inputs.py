"""Every kind of collection, input and table type, compared with the plain-torch reference."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import (
    LR,
    TABLES,
    TableSpec,
    full_weights,
    make_batch,
    make_collection,
    sample_loss,
    shard,
    to_kjt,
)
from plans import make_plan
from ranks import on_ranks
from reference import Feature, ReferenceModel, ReferenceTable
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_freq import FrequencySGD, load_row_counts, row_counts


def stock_fault(reason: str) -> pytest.MarkDecorator:
    """What TorchRec cannot do on CPU with any optimizer."""
    return pytest.mark.skip(reason=f"fails with every optimizer: {reason}")


def compare(model: nn.Module, reference: ReferenceModel) -> None:
    weights, counts = full_weights(model), row_counts(model)
    for name, table in reference.tables.items():
        torch.testing.assert_close(weights[name].double(), table.weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(counts[name], table.count_tensor(), rtol=0, atol=0)


def lookup_loss(outputs: dict[str, Tensor], samples: int) -> Tensor:
    """Mean over the samples of a loss of each looked-up row."""
    total: Tensor | float = 0.0
    for index, name in enumerate(sorted(outputs)):
        x = outputs[name]
        column = torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype)
        per_lookup = ((x * column).mean(dim=1) * (1 + index) - 0.2).square()
        total = total + per_lookup.sum() / samples
    assert isinstance(total, Tensor)
    return total


def sequence_collection(
    tables: list[TableSpec],
) -> tuple[EmbeddingCollection, dict[str, Tensor]]:
    collection = EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=t.name,
                num_embeddings=t.rows,
                embedding_dim=t.columns,
                feature_names=t.features,
                init_fn=lambda w: nn.init.uniform_(w, -0.2, 0.2),
            )
            for t in tables
        ]
    )
    weights = {t.name: collection.embeddings[t.name].weight.detach() for t in tables}
    return collection, weights


@pytest.mark.parametrize(
    "options", [{}, {"count": "batches", "half_life": 2}], ids=["full", "other"]
)
@pytest.mark.parametrize(
    "kind",
    [
        "table_wise",
        "row_wise",
        "column_wise",
        "column_wise on one rank",
        pytest.param("data_parallel", marks=stock_fault("FBGEMM's dense CPU kernel pools")),
    ],
)
@on_ranks(2)
def test_sequence_tables(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    # TorchRec's sequence collections want one width.
    tables = [TableSpec(t.name, t.rows, 16, t.features) for t in TABLES]
    collection, weights = sequence_collection(tables)
    reference = ReferenceModel(
        {t.name: ReferenceTable(weights[t.name], t.features, "none", **options) for t in tables}, LR
    )
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR, **options})
    model = shard(collection, make_plan(kind, tables, 2), EmbeddingCollectionSharder(), weights)
    for name, columns in model.column_shards.items():
        reference.tables[name].shard_columns = columns
    rank, size = dist.get_rank(), 3
    for step in range(5):
        skip = {1: "f1", 3: "f0"}.get(step)
        features = make_batch(rng, tables, 2 * size, skip=skip)
        output = model(to_kjt(features, slice(rank * size, (rank + 1) * size)))
        lookup_loss({name: jt.values() for name, jt in output.items()}, size).backward()
        reference.step(features, lambda outputs: lookup_loss(outputs, 2 * size))
        compare(model, reference)


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "mixed"])
@on_ranks(2)
def test_sequence_tables_that_the_loss_leaves_out(kind: str) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    tables = [TableSpec(t.name, t.rows, 16, t.features) for t in TABLES]
    collection, weights = sequence_collection(tables)
    reference = ReferenceModel(
        {t.name: ReferenceTable(weights[t.name], t.features, "none") for t in tables}, LR
    )
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR})
    model = shard(collection, make_plan(kind, tables, 2), EmbeddingCollectionSharder(), weights)
    for name, columns in model.column_shards.items():
        reference.tables[name].shard_columns = columns
    rank, size = dist.get_rank(), 3
    for unused in ("f1", "f0", None, "f3", "f2"):
        features = make_batch(rng, tables, 2 * size)

        def loss(outputs: dict[str, Tensor], samples: int, unused: Any = unused) -> Tensor:
            return lookup_loss({k: v for k, v in outputs.items() if k != unused}, samples)

        output = model(to_kjt(features, slice(rank * size, (rank + 1) * size)))
        loss({name: jt.values() for name, jt in output.items()}, size).backward()
        reference.step(features, lambda outputs, loss=loss: loss(outputs, 2 * size))  # type: ignore[misc]
        compare(model, reference)


def variable_batch(
    rng: random.Random, tables: list[TableSpec], size: int, ranks: int
) -> tuple[list[list[Feature]], list[list[list[int]]]]:
    """For each rank its features' bags without repetitions, and the bag of each sample."""
    features, inverses = [], []
    for _ in range(ranks):
        names = [name for t in tables for name in t.features]
        bags = {name: rng.randint(1, size) for name in names}
        features.append(
            [make_batch(rng, [t], bags[n])[t.features.index(n)] for t in tables for n in t.features]
        )
        inverses.append([[rng.randrange(bags[name]) for _ in range(size)] for name in names])
    return features, inverses


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize(
    "kind",
    [
        "table_wise",
        pytest.param("row_wise", marks=stock_fault("gloo gathers equal parts only")),
        "column_wise",
        pytest.param("data_parallel", marks=stock_fault("FBGEMM's dense CPU kernel ignores it")),
    ],
)
@on_ranks(2)
def test_variable_batch_per_feature(kind: str, mean: bool) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    size, rank, ranks = 5, dist.get_rank(), 2
    tables = [TableSpec(t.name, t.rows, t.columns, t.features, mean) for t in TABLES]
    collection = make_collection(tables)
    weights = {t.name: collection.embedding_bags[t.name].weight.detach() for t in tables}
    pooling = "mean" if mean else "sum"
    reference = ReferenceModel(
        {
            t.name: ReferenceTable(weights[t.name], t.features, pooling, count_all=True)
            for t in tables
        },
        LR,
    )
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR})
    plan = make_plan(kind, tables, ranks)
    model = shard(collection, plan, EmbeddingBagCollectionSharder(), weights)
    for name, columns in model.column_shards.items():
        reference.tables[name].shard_columns = columns
    for _ in range(5):
        features, inverses = variable_batch(rng, tables, size, ranks)
        kjt = to_kjt(features[rank])
        kjt = KeyedJaggedTensor(
            keys=kjt.keys(),
            values=kjt.values(),
            lengths=kjt.lengths(),
            stride_per_key_per_rank=[[len(feature.bags)] for feature in features[rank]],
            inverse_indices=(kjt.keys(), torch.tensor(inverses[rank])),
        )
        sample_loss(model(kjt).to_dict()).mean().backward()

        whole = [
            Feature(first.name, first.bags + second.bags)
            for first, second in zip(*features, strict=True)
        ]
        sample_bag = {
            feature.name: torch.tensor(
                inverses[0][i] + [len(features[0][i].bags) + bag for bag in inverses[1][i]]
            )
            for i, feature in enumerate(features[0])
        }
        reference.step(whole, lambda outputs: sample_loss(outputs).mean(), sample_bag)
        compare(model, reference)


def constant_rate(optimizer: Any) -> dict[str, Any]:
    """Options under which FrequencySGD is SGD: up to 256 occurrences its multiplier is 1/16."""
    if optimizer is FrequencySGD:
        return {"lr": 16 * LR, "min_count": 256, "normalize": None}
    return {"lr": LR}


@on_ranks(2)
def test_weights_that_are_learned() -> None:
    """A feature processor's weights require grad; its gradient and ours match stock SGD."""
    results = []
    for optimizer in (FrequencySGD, torch.optim.SGD):
        torch.manual_seed(0)
        rng = random.Random(0)
        tables = make_collection(TABLES, weighted=True)
        weights = {t.name: tables.embedding_bags[t.name].weight.detach() for t in TABLES}
        apply_optimizer_in_backward(optimizer, tables.parameters(), constant_rate(optimizer))
        collection = FeatureProcessedEmbeddingBagCollection(
            tables,
            PositionWeightedModuleCollection({name: 8 for t in TABLES for name in t.features}),
        )
        sharder = FeatureProcessedEmbeddingBagCollectionSharder()
        model = shard(collection, make_plan("table_wise", TABLES, 2), sharder, weights)
        gradients = []
        for _ in range(3):
            features = make_batch(rng, TABLES, 6)
            kjt = to_kjt(features, slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3))
            sample_loss(model(kjt).to_dict()).mean().backward()
            gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((full_weights(model, only="embedding_bags"), gradients))
    (ours, our_gradients), (stock, stock_gradients) = results
    assert our_gradients and max(float(g.abs().max()) for g in our_gradients) > 0
    torch.testing.assert_close(our_gradients, stock_gradients, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-6)


@on_ranks(2)
def test_feature_processor_by_the_whole_rule() -> None:
    """Weights that a processor sets to ones: the rule of an unweighted collection."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tables = make_collection(TABLES, weighted=True)
    weights = {t.name: tables.embedding_bags[t.name].weight.detach() for t in TABLES}
    reference = ReferenceModel(
        {t.name: ReferenceTable(weights[t.name], t.features) for t in TABLES}, LR
    )
    apply_optimizer_in_backward(FrequencySGD, tables.parameters(), {"lr": LR})
    collection = FeatureProcessedEmbeddingBagCollection(
        tables, PositionWeightedModuleCollection({name: 8 for t in TABLES for name in t.features})
    )
    sharder = FeatureProcessedEmbeddingBagCollectionSharder()
    model = shard(collection, make_plan("table_wise", TABLES, 2), sharder, weights)
    for _ in range(4):
        features = make_batch(rng, TABLES, 6)
        kjt = to_kjt(features, slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3))
        sample_loss(model(kjt).to_dict()).mean().backward()
        reference.step(features, lambda outputs: sample_loss(outputs).mean())
    for name, weight in full_weights(model, only="embedding_bags").items():
        wanted = reference.tables[name].weight
        torch.testing.assert_close(weight.double(), wanted, rtol=0, atol=1e-6)


class TwoCollections(nn.Module):
    """Two collections with a table of the same name, of other rows and features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = make_collection(TABLES)
        self.second = make_collection([TableSpec("a", 5, 8, ["f0"]), TableSpec("z", 4, 8, ["f3"])])

    def forward(self, first: KeyedJaggedTensor, second: KeyedJaggedTensor) -> Tensor:
        outputs = [self.first(first).to_dict(), self.second(second).to_dict()]
        return torch.stack([sample_loss(output) for output in outputs]).sum(dim=0).mean()


@on_ranks(2)
def test_equal_table_names_in_two_collections() -> None:
    torch.manual_seed(0)
    module = TwoCollections()
    apply_optimizer_in_backward(FrequencySGD, module.parameters(), {"lr": LR})
    model = DistributedModelParallel(
        module, device=torch.device("cpu"), sharders=[EmbeddingBagCollectionSharder()]
    )
    rng = random.Random(dist.get_rank())
    for _ in range(3):
        first = make_batch(rng, TABLES, 4)
        second = [Feature(f.name, [[row % 4 for row in bag] for bag in f.bags]) for f in first]
        model(to_kjt(first), to_kjt([second[0], second[3]])).backward()
    counts = row_counts(model)
    assert list(counts) == ["first.a", "b", "c", "second.a", "z"]
    assert counts["first.a"].sum() == counts["second.a"].sum() > 0
    assert counts["c"].sum() == counts["z"].sum() > 0
    load_row_counts(model, {"second.a": torch.arange(5)})
    assert row_counts(model)["second.a"].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(row_counts(model)["first.a"], counts["first.a"])
    with pytest.raises(ValueError, match="first.a"):
        load_row_counts(model, {"a": torch.arange(5)})
