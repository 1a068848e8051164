"""The rule in plain torch and plain Python, on the global batch: what the engine is compared with.

It shares no code with the package: a row at a time, dictionaries for counts, float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Bags = list[list[int]]


@dataclass
class Feature:
    """One feature's bags of the global batch: ids and, if weighted, a weight for each."""

    name: str
    bags: Bags
    weights: list[list[float]] | None = None


@dataclass
class ReferenceTable:
    """A whole table trained by the rule."""

    weight: Tensor
    features: list[str]
    pooling: str = "sum"  # or "mean", or "none": the feature's output has a row a lookup
    count: str = "samples"
    own_weight: float = 1
    half_life: int | None = None
    normalize: str | None = "table"
    min_count: float = 1
    eps: float = 1e-8
    shard_columns: list[int] = field(default_factory=list)  # each by its own square; [] for one
    count_all: bool = False  # a variable batch does not show which bags have a gradient
    counts: Counter[int] = field(default_factory=Counter)
    squares: float = 0.0
    total: float = 0.0  # sum of the counts, halved without rounding
    occurrences: float = 0.0
    age: int = 0

    def __post_init__(self) -> None:
        self.weight = self.weight.detach().double().clone()

    def update(self, lookups: list[tuple[str, int, Tensor]], lr: float) -> None:
        """One step, from the feature, the row and the gradient of each lookup."""
        trained = {feature for feature, _, gradient in lookups if gradient.any()}
        # A lookup without a gradient does not count, nor does a feature without one where column
        # shards cannot tell which lookups have none.
        rows = [
            row
            for feature, row, gradient in lookups
            if self.count_all
            or (feature in trained if self.shard_columns else bool(gradient.any()))
        ]
        per_count = self.squares / self.total if self.total else 0.0
        cap = 1000 * self.squares / self.occurrences if self.squares else math.inf
        if self.count != "frozen":
            added = Counter(rows if self.count == "samples" else set(rows))
            self.counts.update(added)
            self.total += sum(added.values())
        occurrences = Counter(rows)
        gradients: dict[int, Tensor] = {}
        for _, row, gradient in lookups:
            gradients[row] = gradients.get(row, torch.zeros_like(gradient)) + gradient
        for row, gradient in gradients.items():
            if not occurrences[row]:
                continue
            columns = self.shard_columns or [len(gradient)]
            parts = torch.split(gradient, columns)
            own = torch.cat([part.square().mean().expand(len(part)) for part in parts])
            if self.normalize is None:
                root = torch.tensor(max(self.counts[row], self.min_count)).double().sqrt()
            else:
                root = ((per_count * self.counts[row] + self.own_weight * own) / 2).sqrt()
            self.weight[row] -= lr / (root + self.eps) * gradient
            square = float(gradient.square().mean())
            if math.isfinite(square) and self.normalize is not None:
                self.squares += min(square, cap * occurrences[row])
        self.occurrences += len(rows)
        self.age += 1
        if self.half_life is not None and self.age >= self.half_life:
            self.age = 0
            self.counts = Counter({row: count // 2 for row, count in self.counts.items()})
            self.squares, self.total = self.squares / 2, self.total / 2
            self.occurrences /= 2

    def count_tensor(self) -> Tensor:
        return torch.tensor([self.counts[row] for row in range(len(self.weight))])


class ReferenceModel:
    """Tables looked up by features; ``outputs`` are pooled as TorchRec's collections pool."""

    def __init__(self, tables: dict[str, ReferenceTable], lr: float) -> None:
        self.tables = tables
        self.lr = lr

    def step(
        self,
        features: list[Feature],
        loss: Callable[[dict[str, Tensor]], Tensor],
        sample_bag: dict[str, Tensor] | None = None,
    ) -> float:
        """One step on the global batch.

        Args:
            loss: mean loss of the global batch from ``{feature: [samples, columns] float64}``.
            sample_bag: the bag of each sample, by feature, where samples share bags.
        """
        by_name = {feature.name: feature for feature in features}
        outputs: dict[str, Tensor] = {}
        leaves: dict[str, list[tuple[str, int, Tensor]]] = {name: [] for name in self.tables}
        for name, table in self.tables.items():
            columns = table.weight.shape[1]
            for feature_name in table.features:
                feature = by_name[feature_name]
                pooled = []
                first = len(leaves[name])
                for b, bag in enumerate(feature.bags):
                    total = torch.zeros(table.weight.shape[1], dtype=torch.float64)
                    for i, row in enumerate(bag):
                        leaf = table.weight[row].clone().requires_grad_()
                        leaves[name].append((feature_name, row, leaf))
                        weight = feature.weights[b][i] if feature.weights else 1.0
                        total = total + leaf * weight
                    pooled.append(total / len(bag) if table.pooling == "mean" and bag else total)
                if table.pooling == "none":
                    pooled = [leaf for _, _, leaf in leaves[name][first:]]
                output = torch.stack(pooled) if pooled else torch.zeros(0, columns)
                if sample_bag is not None:
                    output = output[sample_bag[feature_name]]
                outputs[feature_name] = output
        value = loss(outputs)
        if value.requires_grad:  # no feature was looked up
            value.backward()
        for name, table in self.tables.items():
            # A table that is not looked up still takes part in the step.
            table.update(
                [
                    (feature, row, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
                    for feature, row, leaf in leaves[name]
                ],
                self.lr,
            )
        return float(value.detach())


def seed(table: ReferenceTable, counts: torch.Tensor, squares: float | None = None) -> None:
    table.counts.clear()
    table.counts.update(dict(enumerate(counts.tolist())))
    table.total, table.age = float(counts.sum()), 0
    if squares is not None:
        table.squares, table.occurrences = squares, float(counts.count_nonzero())
