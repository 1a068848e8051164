"""A running model whose tables change: held-out loss as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import (
    LR,
    TableSpec,
    full_weights,
    make_batch,
    make_collection,
    sample_loss,
    set_weights,
    shard,
    to_kjt,
)
from plans import make_plan
from ranks import run_on_ranks
from reference import Feature
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

from torchrec_freq import FrequencySGD, TableState, load_table_states, table_states

A, B = TableSpec("a", 12, 16, ["f0"]), TableSpec("b", 7, 16, ["f1", "f2"])
C = TableSpec("c", 20, 32, ["f3"])
BEFORE = 30  # steps


@dataclass(frozen=True)
class Change:
    """New tables, each made of the rows of old ones: ``rows`` has the old row of each, or -1."""

    tables: Sequence[TableSpec]
    rows: Mapping[str, tuple[list[str], Tensor]]

    def new_row(self, feature: str, row: int) -> int:
        (spec,) = (t for t in self.tables if feature in t.features)
        (old,) = (t for t in (A, B, C) if feature in t.features)
        names, rows = self.rows[spec.name]
        first = 0
        for name in names[: names.index(old.name)]:
            first += {t.name: t.rows for t in (A, B, C)}[name]
        return int((rows == first + row).nonzero())


def keep(spec: TableSpec) -> tuple[list[str], Tensor]:
    return [spec.name], torch.arange(spec.rows)


SAME = {"a": keep(A), "b": keep(B)}
EVEN = torch.arange(0, 20, 2)
CHANGES = {
    "grown": Change(
        [A, B, TableSpec("c", 30, 32, ["f3"])],
        {**SAME, "c": (["c"], torch.cat([torch.arange(20), torch.full((10,), -1)]))},
    ),
    "shrunk": Change([A, B, TableSpec("c", 10, 32, ["f3"])], {**SAME, "c": (["c"], EVEN)}),
    "permuted": Change([A, B, C], {**SAME, "c": (["c"], torch.arange(20).flip(0))}),
    "renamed": Change([A, B, TableSpec("member", 20, 32, ["f3"])], {**SAME, "member": keep(C)}),
    "merged": Change(
        [TableSpec("ab", 19, 16, ["f0", "f1", "f2"]), C],
        {"ab": (["a", "b"], torch.arange(19)), "c": keep(C)},
    ),
}


def build(tables: Sequence[TableSpec], kind: str) -> Any:
    torch.manual_seed(0)
    collection = make_collection(list(tables))
    apply_optimizer_in_backward(FrequencySGD, collection.parameters(), {"lr": LR})
    weights = {t.name: collection.embedding_bags[t.name].weight.detach().clone() for t in tables}
    plan = make_plan(kind, list(tables), dist.get_world_size())
    return shard(collection, plan, EmbeddingBagCollectionSharder(), weights)


def loss(model: Any, step: int, size: int, change: Change | None) -> Tensor:
    """Of the same samples for both models; all look up even rows of c alone."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    features = make_batch(random.Random(step), [A, B, C], size * ranks)
    for feature in features:
        even = 2 if feature.name == "f3" else 1
        feature.bags = [[row // even * even for row in bag] for bag in feature.bags]
        if change is not None:
            feature.bags = [[change.new_row(feature.name, r) for r in bag] for bag in feature.bags]
    order = features if change is None else sorted(features, key=lambda f: _place(change, f))
    local = to_kjt(order, slice(size * rank, size * (rank + 1)))
    return sample_loss(model(local).to_dict()).mean()


def _place(change: Change, feature: Feature) -> int:
    return [name for table in change.tables for name in table.features].index(feature.name)


def carry_over(kind: str, name: str) -> None:
    change = CHANGES[name]
    stays, goes_on = build([A, B, C], kind), build(change.tables, kind)
    for step in range(BEFORE):
        loss(stays, step, 4, None).backward()
    states, weights = table_states(stays), full_weights(stays)
    fresh = full_weights(goes_on)
    moved, whole = {}, {}
    for table, (names, rows) in change.rows.items():
        state = TableState.merge([states[old] for old in names])
        moved[table] = state.take(rows)
        old_weights = torch.cat([weights[old] for old in names])
        whole[table] = torch.where((rows >= 0).unsqueeze(1), old_weights[rows], fresh[table])
    load_table_states(goes_on, moved)
    set_weights(goes_on, whole)
    for step in range(51):
        if step in (0, 1, 10, 50):
            with torch.no_grad():
                held_out = [float(loss(stays, -1, 64, None)), float(loss(goes_on, -1, 64, change))]
            assert held_out[1] == pytest.approx(held_out[0], abs=5e-4), f"after {step} steps"
        loss(stays, BEFORE + step, 4, None).backward()
        loss(goes_on, BEFORE + step, 4, change).backward()
    for table, (_, rows) in change.rows.items():
        assert not table_states(goes_on)[table].counts[rows < 0].any()


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_training_goes_on(ranks: int, kind: str, name: str) -> None:
    run_on_ranks(ranks, carry_over, {"kind": kind, "name": name})
