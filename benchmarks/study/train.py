"""One run: a model over the tables of an arm, trained once, and the figures of its predictions."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.common.samples import Array
from benchmarks.study.config import AFTER, FIRST_EPOCH, SECOND_EPOCH, STREAM
from benchmarks.study.data import Data, find
from benchmarks.study.model import Model, initial_weights
from benchmarks.study.search import Result, Run
from benchmarks.study.tables import DEVICE, Tables

DENSE_LR: Final = 1e-3
EVALUATION_BATCH: Final = 4096  # samples
STREAM_BLOCKS: Final = 50  # equal parts of a stream, of which the first 20 choose lr
AFTER_BLOCKS: Final = 20
DECILES: Final = 10


class Training:
    """A model and its tables, with the same initial weights for every arm and lr."""

    def __init__(self, run: Run, data: Data) -> None:
        torch.manual_seed(run.seed)
        rows = list(data.samples.tables.values())
        self.model = Model(run.model, data.samples.dense.shape[1], len(rows)).to(DEVICE)
        weights = initial_weights(run.model, rows)
        variant = run.variant
        self.tables = Tables(rows, weights, variant.optimizer, run.lr, dict(variant.options))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=DENSE_LR)
        self.data = data

    def train(self, numbers: Array, batch_size: int) -> Array | None:
        """One pass; float32 [numbers] logits of before each step, None where a loss diverges."""
        logits = []
        for dense, ids, labels in self.data.batches(numbers, batch_size):
            logits_B = self.model(dense.to(DEVICE), self.tables(ids.to(DEVICE)))
            loss = binary_cross_entropy_with_logits(logits_B, labels.to(DEVICE))
            if not loss.isfinite():
                return None
            self.optimizer.zero_grad()
            loss.backward()  # updates the tables, too
            self.optimizer.step()
            logits.append(logits_B.detach().cpu())
        return torch.cat(logits).numpy()

    @torch.no_grad()
    def predict(self, numbers: Array) -> Array:
        """float32 [numbers] logits; 0, which says nothing, where one is no number."""
        logits = [
            self.model(dense.to(DEVICE), self.tables(ids.to(DEVICE))).cpu()
            for dense, ids, _ in self.data.batches(numbers, EVALUATION_BATCH)
        ]
        return torch.cat(logits).nan_to_num(0.0).numpy()


def train(run: Run, folder: Path) -> Result:
    """Trains, and returns the run's line of the results file.

    "by" is the AUC by which lr is chosen. A whole run has "measures", too: the figures of both
    measures of its setting. Where a loss is no number the run ends, and what follows is missing.
    """
    data = find(run.setting, folder)
    training = Training(run, data)
    result = run.key() | {"by": None, "measures": {}}
    return (_epochs if run.setting.shuffled else _stream)(run, data, training, result)


def _stream(run: Run, data: Data, training: Training, result: Result) -> Result:
    numbers = data.train if run.whole else data.train[: data.first]
    logits = training.train(numbers, run.setting.batch_size)
    if logits is None:
        return result
    labels = data.samples.labels[numbers]
    first = slice(data.first // 2, data.first)
    result["by"] = auc(logits[first], labels[first])
    if run.whole:
        rarest = data.rarest(numbers)
        result["measures"][STREAM] = figures(logits, labels, rarest, STREAM_BLOCKS, data.first)
        result["measures"][AFTER] = _judge(data, training)
    return result


def _epochs(run: Run, data: Data, training: Training, result: Result) -> Result:
    for epoch, measure in enumerate((FIRST_EPOCH, SECOND_EPOCH)[: 1 + run.whole]):
        order = np.random.default_rng([run.seed, epoch]).permutation(data.train)
        if training.train(order, run.setting.batch_size) is None:
            return result
        if measure == FIRST_EPOCH:
            logits = training.predict(data.valid)
            result["by"] = auc(logits, data.samples.labels[data.valid])
        if run.whole:
            result["measures"][measure] = _judge(data, training)
    return result


def _judge(data: Data, training: Training) -> dict[str, Any]:
    logits, labels = training.predict(data.after), data.samples.labels[data.after]
    return figures(logits, labels, data.rarest(data.after), AFTER_BLOCKS)


def figures(
    logits: Array, labels: Array, rarest: Array, blocks: int, first: int = 0
) -> dict[str, Any]:
    """Figures of predictions in the order of time.

    Args:
        rarest: occurrences of the rarest id of each sample.
        first: the number of the first sample that is judged.

    Returns:
        "auc"; "ne", normalized entropy: log loss over that of the base rate; "deciles" by `rarest`:
        a line [least, greatest, samples, AUC or None, log loss] each. By blocks of all samples
        "won", see `wins`, "ones" and "zeros"; "first_block" of those that are judged.
    """
    block = np.arange(len(logits)) * blocks // len(logits)
    won = wins(logits, labels, block, blocks)
    scores, truth, rarest = logits[first:], labels[first:], rarest[first:]
    signs = np.where(truth, -scores, scores).astype(np.float64)
    losses = np.logaddexp(0, signs)
    rate = truth.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    edges = np.unique(np.quantile(rarest, np.arange(1, DECILES) / DECILES))
    part = np.searchsorted(edges, rarest, side="left")
    deciles = []
    for number in np.unique(part):
        mine = part == number
        bounds = [int(rarest[mine].min()), int(rarest[mine].max()), int(mine.sum())]
        deciles.append([*bounds, auc(scores[mine], truth[mine]), float(losses[mine].mean())])
    return {
        "auc": auc(scores, truth),
        "ne": float(losses.mean() / entropy),
        # Halves become whole numbers, which are shorter as text.
        "won": (2 * won).astype(np.int64).tolist(),
        "ones": np.bincount(block, weights=labels, minlength=blocks).astype(int).tolist(),
        "zeros": np.bincount(block, weights=1.0 - labels, minlength=blocks).astype(int).tolist(),
        "first_block": int(block[first - 1]) + 1 if first else 0,
        "deciles": deciles,
    }


def wins(scores: Array, labels: Array, block: Array, blocks: int) -> Array:
    """Pairs of a sample with label 1 in block a and one with label 0 in block b, [blocks, blocks],
    of which the first has the higher score; equal scores are half a pair."""
    ones = labels.astype(bool)
    zeros = np.sort(scores[~ones])
    below = np.searchsorted(zeros, scores[ones], side="left")
    not_above = np.searchsorted(zeros, scores[ones], side="right")
    of_zero = block[~ones][np.argsort(scores[~ones], kind="stable")]
    of_one = block[ones]
    won = np.empty((blocks, blocks))
    for b in range(blocks):
        so_far = np.concatenate([[0], np.cumsum(of_zero == b)])
        pairs = (so_far[below] + so_far[not_above]) / 2
        won[:, b] = np.bincount(of_one, weights=pairs, minlength=blocks)
    return won


def auc(scores: Array, labels: Array) -> float | None:
    """Area under the ROC curve; None where one of the labels is missing."""
    ones = int(labels.sum(dtype=np.int64))
    if not 0 < ones < len(labels):
        return None
    won = wins(scores, labels, np.zeros(len(labels), dtype=np.int64), 1)
    return float(won[0, 0] / (ones * (len(labels) - ones)))
