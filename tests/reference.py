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


def weight_of(step: int) -> int:
    """How many steps this one is sampled for: all of the first 64, then an eighth of them."""
    return 1 if step < 64 else 8 * (step * 2654435761 % 2**32 < 2**29)


@dataclass
class ReferenceTable:
    """A whole table trained by the rule."""

    weight: Tensor
    features: list[str]
    pooling: str = "sum"  # or "mean", or "none": the feature's output has a row a lookup
    count: str = "samples"
    prior_count: float = 10
    half_life: int | None = None
    admit: int = 1
    normalize: str | None = "table"
    min_count: float = 1
    eps: float = 1e-8
    shard_columns: list[int] = field(default_factory=list)  # each with its own sums; [] for one
    counts: Counter[int] = field(default_factory=Counter)
    sums: dict[int, Tensor] = field(default_factory=dict)  # [columns], equal within a shard
    squares: float = 0.0
    total: float = 0.0
    steps: float = 0.0  # that squares and total stand for
    age: int = 0

    def __post_init__(self) -> None:
        self.weight = self.weight.detach().double().clone()

    def own(self, gradient: Tensor) -> Tensor:
        """[columns] mean square of the gradient over the columns of each one's shard."""
        parts = torch.split(gradient, self.shard_columns or [len(gradient)])
        return torch.cat([part.square().mean().expand(len(part)) for part in parts])

    def update(self, lookups: list[tuple[str, int, Tensor]], lr: float) -> None:
        """One step, from the feature, the row and the gradient of each lookup."""
        rho = self.squares / self.total if self.total else 0.0
        occurrences = Counter(row for _, row, _ in lookups)
        before = Counter(self.counts)
        if self.count != "frozen":
            self.counts.update(occurrences)
        gradients: dict[int, Tensor] = {}
        for _, row, gradient in lookups:
            gradients[row] = gradients.get(row, torch.zeros_like(gradient)) + gradient
        squares, entered = 0.0, 0
        for row, gradient in gradients.items():
            if self.counts[row] < self.admit and self.admit > 1:  # a frozen count may be 0
                continue
            entered += occurrences[row]
            if self.normalize is None:
                root = torch.tensor(max(self.counts[row], self.min_count)).double().sqrt()
            else:
                own, count = self.own(gradient), before[row]
                past = self.sums.get(row, torch.zeros_like(own))
                prior = 1.0
                if not math.isinf(self.prior_count):
                    prior = self.prior_count / max(count + self.prior_count, 1e-300)
                root = ((1 - prior) * past + prior * rho * (count + 1) + own).sqrt()
                self.sums[row] = past + own
            self.weight[row] -= lr / (root + self.eps) * gradient
            square = float(gradient.square().mean())
            squares += square if math.isfinite(square) else 0.0
        self._add(squares, entered)
        self.age += 1
        if self.half_life is not None and self.age >= self.half_life:
            self.age = 0
            self.counts = Counter({row: count // 2 for row, count in self.counts.items()})
            self.sums = {row: value / 2 for row, value in self.sums.items()}
            self.squares, self.total, self.steps = self.squares / 2, self.total / 2, self.steps / 2

    def _add(self, squares: float, occurrences: int) -> None:
        weight = weight_of(self.age)
        if self.normalize is None or not self.prior_count or not weight or not occurrences:
            return
        mean = self.squares / self.steps if self.steps else 0.0
        if self.steps >= 3:
            squares = min(squares, max(3 * mean, self.squares / 10))
        self.squares += weight * squares
        self.total += weight * occurrences
        self.steps += weight

    def count_tensor(self) -> Tensor:
        return torch.tensor([self.counts[row] for row in range(len(self.weight))])

    def sum_tensor(self) -> Tensor:
        """float32 [rows]: each row's sum, the mean over its columns."""
        rows = range(len(self.weight))
        return torch.tensor([float(self.sums[r].mean()) if r in self.sums else 0.0 for r in rows])

    def totals(self) -> Tensor:
        """float64 [4], as the package has them."""
        return torch.tensor([3.0, self.squares, self.total, self.steps], dtype=torch.float64)


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
