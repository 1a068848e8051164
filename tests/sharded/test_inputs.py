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
    Pair,
    TableSpec,
    full_weights,
    make_batch,
    make_collection,
    make_reference,
    sample_loss,
    shard,
    to_kjt,
)
from plans import make_plan
from ranks import on_ranks
from reference import Feature, ReferenceModel
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_freq import FrequencySGD, load_row_counts, row_counts


def stock_fault(reason: str) -> pytest.MarkDecorator:
    """What TorchRec cannot do on CPU with any optimizer."""
    return pytest.mark.skip(reason=f"fails with every optimizer: {reason}")


def sequences(kind: str, options: dict[str, Any] | None = None) -> Pair:
    # TorchRec's sequence collections want one width.
    tables = [TableSpec(t.name, t.rows, 16, t.features) for t in TABLES]
    return Pair(tables, make_plan(kind, tables, 2), options, sequence=True)


@pytest.mark.parametrize("options", [{}, {"prior_count": 1, "half_life": 2}], ids=["full", "other"])
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
    pair = sequences(kind, options)
    for step in range(5):
        pair.step(skip={1: "f1", 3: "f0"}.get(step))
        pair.check()


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "mixed"])
@on_ranks(2)
def test_sequence_tables_that_the_loss_leaves_out(kind: str) -> None:
    """An unused feature counts, unless no feature of its lookup is used."""
    pair = sequences(kind)
    for unused in ("f1", "f0", None, "f3", "f2"):
        alone = {"f0": "a", "f3": "c"}.get(unused or "", "b")
        table = pair.reference.tables[alone]
        before = table.counts.copy(), table.total, table.steps
        pair.step(unused=unused)
        if kind == "mixed" and alone != "b":
            table.counts, table.total, table.steps = before
        pair.check()


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
    size, rank, ranks = 5, dist.get_rank(), 2
    tables = [TableSpec(t.name, t.rows, t.columns, t.features, mean) for t in TABLES]
    pair = Pair(tables, make_plan(kind, tables, ranks))
    for _ in range(5):
        features, inverses = variable_batch(pair.rng, tables, size, ranks)
        kjt = to_kjt(features[rank])
        kjt = KeyedJaggedTensor(
            keys=kjt.keys(),
            values=kjt.values(),
            lengths=kjt.lengths(),
            stride_per_key_per_rank=[[len(feature.bags)] for feature in features[rank]],
            inverse_indices=(kjt.keys(), torch.tensor(inverses[rank])),
        )
        sample_loss(pair.forward(kjt)).mean().backward()
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
        pair.reference.step(whole, lambda outputs: sample_loss(outputs).mean(), sample_bag)
        pair.check()


def constant_rate(optimizer: Any) -> dict[str, Any]:
    """Options under which FrequencySGD is SGD: up to 256 occurrences its multiplier is 1/16."""
    if optimizer is FrequencySGD:
        return {"lr": 16 * LR, "min_count": 256, "normalize": None}
    return {"lr": LR}


def processed(optimizer: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Tables behind a feature processor whose weights are learned, from ones; their start."""
    torch.manual_seed(0)
    tables = make_collection(TABLES, weighted=True)
    weights = {t.name: tables.embedding_bags[t.name].weight.detach().clone() for t in TABLES}
    apply_optimizer_in_backward(optimizer, tables.parameters(), options)
    collection = FeatureProcessedEmbeddingBagCollection(
        tables, PositionWeightedModuleCollection({name: 8 for t in TABLES for name in t.features})
    )
    sharder = FeatureProcessedEmbeddingBagCollectionSharder()
    return shard(collection, make_plan("table_wise", TABLES, 2), sharder, weights), weights


def train(model: Any, reference: ReferenceModel | None = None) -> list[Tensor]:
    """The gradients of the processor's weights in three steps."""
    rng, gradients = random.Random(0), []
    for _ in range(3):
        features = make_batch(rng, TABLES, 6)
        kjt = to_kjt(features, slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3))
        sample_loss(model(kjt).to_dict()).mean().backward()
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if reference is not None:
            reference.step(features, lambda outputs: sample_loss(outputs).mean())
    return gradients


@on_ranks(2)
def test_weights_that_are_learned() -> None:
    """A feature processor's weights require grad; its gradient and ours match stock SGD."""
    # Up to 256 occurrences the multiplier is 1/16.
    ours, _ = processed(FrequencySGD, {"lr": 16 * LR, "min_count": 256, "normalize": None})
    stock, _ = processed(torch.optim.SGD, {"lr": LR})
    gradients = train(ours)
    assert gradients and max(float(g.abs().max()) for g in gradients) > 0
    torch.testing.assert_close(gradients, train(stock), rtol=0, atol=1e-6)
    weights = [full_weights(model, only="embedding_bags") for model in (ours, stock)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    # By the whole rule, as an unweighted collection.
    model, start = processed(FrequencySGD, {"lr": LR})
    reference = make_reference(TABLES, start)
    train(model, reference)
    for name, weight in full_weights(model, only="embedding_bags").items():
        wanted = reference.tables[name].weight
        torch.testing.assert_close(weight.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "data_parallel"])
@on_ranks(2)
def test_every_occurrence_counts(kind: str) -> None:
    """Also with weight 0 and where the loss is masked, whatever the gradient is."""
    pair = Pair(TABLES, make_plan(kind, TABLES, 2), weighted=True)
    features = make_batch(pair.rng, TABLES, 6, weighted=True)
    for feature in features:
        assert feature.weights is not None
        feature.weights = [[0.0 for _ in bag] for bag in feature.weights]
    local = to_kjt(features, slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3))
    mask = torch.tensor([1.0, 0.0, 0.0])
    (sample_loss(pair.forward(local)) * mask).mean().backward()
    counts = row_counts(pair.model)
    for t in TABLES:
        ids = [row for f in features if f.name in t.features for bag in f.bags for row in bag]
        assert torch.equal(counts[t.name], torch.tensor(ids).bincount(minlength=t.rows))


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
