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
    min_count: float = 10
    half_life: int | None = None
    coherence: float = 0.03
    normalize: str | None = "table"
    counts: Counter[int] = field(default_factory=Counter)
    steps: int = 0
    trained: int = 0
    squares: float = 0.0
    elements: int = 0
    outputs_are_lookups: bool = False  # what an optimizer sees that is given gradients alone
    output_squares: float = 0.0
    output_elements: int = 0

    def __post_init__(self) -> None:
        self.weight = self.weight.detach().double().clone()

    def update(self, lookups: list[tuple[int, Tensor]], outputs: list[Tensor], lr: float) -> None:
        """One step, from the row and the gradient of each lookup, and the outputs' gradients."""
        if self.outputs_are_lookups:
            outputs = [gradient for _, gradient in lookups]
        ratio = 1.0
        if self.elements and self.output_squares:
            ratio = self.squares / self.elements * self.output_elements / self.output_squares
        self.output_squares += sum(float(gradient.square().sum()) for gradient in outputs)
        self.output_elements += sum(gradient.numel() for gradient in outputs)
        scale = math.inf
        if self.output_squares and ratio:  # nothing moves before there is a gradient
            scale = math.sqrt(ratio * self.output_squares / self.output_elements)
        if self.normalize is None:
            scale = 1.0
        if self.count != "frozen":
            self.steps += 1
            rows = [row for row, _ in lookups]
            self.counts.update(rows if self.count == "samples" else set(rows))
        gradients: dict[int, Tensor] = {}
        for row, gradient in lookups:
            gradients[row] = gradients.get(row, torch.zeros_like(gradient)) + gradient
            self.squares += float(gradient.square().sum())
            self.elements += gradient.numel()
        for row, gradient in gradients.items():
            count = self.counts[row]
            effective = count + self.coherence * count * count / max(self.steps, 1)
            self.weight[row] -= lr / (scale * math.sqrt(max(effective, self.min_count))) * gradient
        self.trained += 1
        if self.half_life is not None and self.trained % self.half_life == 0:
            self.counts = Counter({row: count // 2 for row, count in self.counts.items()})
            self.steps //= 2

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
        leaves: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in self.tables}
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
                        leaves[name].append((row, leaf))
                        weight = feature.weights[b][i] if feature.weights else 1.0
                        total = total + leaf * weight
                    pooled.append(total / len(bag) if table.pooling == "mean" and bag else total)
                if table.pooling == "none":
                    pooled = [leaf for _, leaf in leaves[name][first:]]
                output = torch.stack(pooled) if pooled else torch.zeros(0, columns)
                if sample_bag is not None:
                    output = output[sample_bag[feature_name]]
                # Its gradient is that of the output, also where there is no lookup.
                outputs[feature_name] = output + torch.zeros_like(output, requires_grad=True)
                outputs[feature_name].retain_grad()
        value = loss(outputs)
        value.backward()
        for name, table in self.tables.items():
            # A table that is not looked up still takes part in the step.
            gradients = [outputs[feature].grad for feature in table.features]
            table.update(
                [(row, leaf.grad) for row, leaf in leaves[name]],  # type: ignore[misc]
                [gradient for gradient in gradients if gradient is not None],
                self.lr,
            )
        return float(value.detach())
