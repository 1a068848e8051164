"""Predict-then-train: how well a model predicts each batch of a stream before it learns from it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_auroc

FIRST = 5  # lr is chosen on this first part of the stream, a fifth; the rest is judged
PARTS = 10  # points of the curve along the stream

Predicted = Sequence[tuple[Tensor, Tensor]]
"""One entry a step: logits and labels of its batch, each [samples], before the step's update."""


def figures(steps: Predicted) -> dict[str, float]:
    """AUC over the first fifth of the steps ("by"), AUC and log loss over the others."""
    first = max(1, round(len(steps) / FIRST))
    loss = binary_cross_entropy_with_logits(*_join(steps[first:]))
    rest = {"auc": auc(steps[first:]), "log_loss": round(float(loss), 6)}
    return {"by": auc(steps[:first]), **rest}


def curve(steps: Predicted) -> list[tuple[int, float]]:
    """(steps so far, AUC over the last of `PARTS` equal parts), along the stream."""
    ends = [len(steps) * part // PARTS for part in range(PARTS + 1)]
    return [(b, auc(steps[a:b])) for a, b in zip(ends, ends[1:], strict=False) if a < b]


def auc(steps: Predicted) -> float:
    logits, labels = _join(steps)
    return round(float(binary_auroc(logits, labels.int())), 6)


def _join(steps: Predicted) -> tuple[Tensor, Tensor]:
    logits, labels = zip(*steps, strict=True)
    return torch.cat(logits), torch.cat(labels).float()
