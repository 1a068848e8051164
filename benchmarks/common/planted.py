"""Synthetic clicks with planted embeddings and Zipf ids, as Criteo npy files of one day each."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchrec.datasets.criteo import CAT_FEATURE_COUNT, INT_FEATURE_COUNT

from benchmarks.common.samples import Samples, make, number

PARTS = (1.5, 0.8, 0.3)  # standard deviation of the logit's parts: weights, pairs, dense features
COLUMNS = 4  # of a planted vector


@dataclass(frozen=True)
class Task:
    """How the clicks come about.

    The logit of a sample is a sum over its ids of a planted weight, plus the planted vectors' dot
    products over all pairs of ids, plus a little of the dense features, plus a constant of the day.

    Attributes:
        days: files; the last one is held out.
        samples: a day.
        held_out: samples of the last day, where AUC needs more of them.
        rows: of the smallest and the largest table; the others lie between, evenly in the log.
        zipf: the id of rank r (1, 2, ...) has a probability proportional to r ** -zipf.
        clicks: share of the samples whose label is 1.
    """

    days: int = 4
    samples: int = 30_000
    held_out: int = 30_000
    rows: tuple[int, int] = (10, 10_000)
    zipf: float = 1.1
    clicks: float = 0.25


def generate(task: Task, folder: Path) -> None:
    """Writes day_00_dense.npy etc. into `folder` unless it exists; a cut-off run leaves none."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary, "made")
        made.mkdir()
        _write(task, made)
        made.rename(folder)


def _write(task: Task, folder: Path) -> None:
    random = np.random.default_rng(0)
    rows = random.permutation(np.geomspace(*task.rows, CAT_FEATURE_COUNT).round().astype(int))
    weights = [random.normal(size=(count, 1 + COLUMNS)) for count in rows]
    id_of_rank = [random.permutation(count) for count in rows]
    dense_weights = random.normal(size=INT_FEATURE_COUNT)
    scales: tuple[float, ...] = ()
    for day in range(task.days):
        samples = task.samples if day < task.days - 1 else task.held_out
        sparse = np.empty((samples, CAT_FEATURE_COUNT), dtype=np.int32)
        values = np.zeros((samples, 1 + COLUMNS))
        squares = np.zeros(samples)
        for table, count in enumerate(rows):
            popularity = np.arange(1, count + 1) ** -task.zipf
            ranks = random.choice(count, samples, p=popularity / popularity.sum())
            sparse[:, table] = id_of_rank[table][ranks]
            own = weights[table][sparse[:, table]]
            values += own
            squares += np.square(own[:, 1:]).sum(axis=1)
        dense = random.normal(size=(samples, INT_FEATURE_COUNT)).astype(np.float32)
        pairs = (np.square(values[:, 1:]).sum(axis=1) - squares) / 2
        parts = [values[:, 0], pairs, dense @ dense_weights]
        if not scales:  # of the first day, for all days
            scales = tuple(size / part.std() for size, part in zip(PARTS, parts, strict=True))
        logits = sum(scale * part for scale, part in zip(scales, parts, strict=True))
        # Above a threshold with logistic noise: the probability is the sigmoid of the logit.
        noisy = logits + random.logistic(size=samples)
        labels = noisy > np.quantile(noisy, 1 - task.clicks)
        np.save(folder / f"day_{day:02d}_dense.npy", dense)
        np.save(folder / f"day_{day:02d}_sparse.npy", sparse)
        np.save(folder / f"day_{day:02d}_labels.npy", labels.astype(np.int32)[:, None])


def samples(folder: Path) -> Samples:
    """What `generate` wrote, a day after the other."""
    dense, sparse, labels = (
        np.concatenate([np.load(path) for path in sorted(folder.glob(f"*_{kind}.npy"))])
        for kind in ("dense", "sparse", "labels")
    )
    features = {f"cat_{column}": number(ids) for column, ids in enumerate(sparse.T)}
    return make(features, labels.ravel(), dense)
