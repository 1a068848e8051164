"""The start of a run from another one's checkpoint: its weights, and what its tables learned."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException

from benchmarks.common.checkpoint import MANIFEST, read
from benchmarks.common.training import Training
from examples.criteo.model import read_counts
from examples.criteo.refusal import together
from examples.criteo.settings import Settings
from torchrec_freq import load_adagrad_sums, load_momentum, load_row_counts
from torchrec_freq.counts.adagrad import sums_of_counts
from torchrec_freq.counts.dcp_metadata import Checkpoint, Reader
from torchrec_freq.counts.state import ROW_COUNTER
from torchrec_freq.counts.stored import StoredTable, open_stored
from torchrec_freq.counts.stored_sums import open_sums


def start(settings: Settings, training: Training) -> None:
    """Takes over what --init_from and --init_counts name. All ranks must call it.

    Raises:
        ValueError, OSError: a checkpoint or file of another model, or a damaged one.
    """
    rows = {table.name: table.num_embeddings for table in training.tables}
    folder, counts = settings.init_from, settings.init_counts
    sums: dict[str, tuple[float | None, Callable[[], Tensor]]] = {}
    file = None
    with together():  # before anything is changed
        if counts not in ("sums", "zero"):
            file = read_counts(Path(counts), training.tables)
        elif folder is not None and counts == "sums":
            sums = _stored_sums(folder, rows)
    if folder is not None:
        _load_weights(folder, training)
    if file is not None:
        load_row_counts(training.model, *file)
    for name, (lookups, read_sums) in sums.items():  # one table's at a time
        with together():
            sums_R = read_sums()
        if settings.optimizer.name == "FrequencySGD":
            known = None if lookups is None else {name: lookups}
            load_adagrad_sums(training.model, {name: sums_R}, known)
        else:
            load_momentum(training.model, {name: sums_R})


def _load_weights(folder: Path, training: Training) -> None:
    """The model's, and the state of the dense layers' optimizer."""
    training.dense_optimizer.init_state()
    dense: dict[str, Any] = training.dense_optimizer.state_dict()
    model = training.model.state_dict()
    try:
        # As benchmarks.common.checkpoint loads; the state of the tables' optimizer is left out.
        dcp.load(
            {"model": model, "optimizer": {"state": dense["state"]}},
            storage_reader=Reader(folder),
            planner=DefaultLoadPlanner(flatten_sharded_tensors=False),
        )
    except CheckpointException as error:
        causes = "; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))
        raise ValueError(
            f"init_from: {folder} is not of this model, or damaged: {causes}"
        ) from error
    training.model.load_state_dict(model)
    training.dense_optimizer.load_state_dict(dense)


def _stored_sums(
    folder: Path, rows: dict[str, int]
) -> dict[str, tuple[float | None, Callable[[], Tensor]]]:
    """By table: how many lookups its sums stand for, if that is known, and what reads them."""
    found: dict[str, tuple[int, float | None, Callable[[], Tensor]]] = {}
    if Checkpoint(folder).stems(f".{ROW_COUNTER}"):
        for table in open_stored(folder):
            lookups = None if table.totals is None else max(float(table.totals[2]), 1.0)
            found[table.name] = table.rows, lookups, partial(_sums_of, table)
    else:
        lookups = _samples(folder)  # a table is looked up once a sample
        for stored in open_sums(folder):
            found[stored.name] = stored.rows, lookups, stored.read
    there = {name: size for name, (size, _, _) in found.items()}
    if there != rows:
        raise ValueError(
            f"init_from: {folder} has the optimizer's state of other tables than the model. Rows "
            f"by table there: {there}; here: {rows}."
        )
    return {name: (lookups, read_sums) for name, (_, lookups, read_sums) in found.items()}


def _samples(folder: Path) -> float | None:
    """That the old run has trained on; None where it was not one of this program."""
    if not (folder / MANIFEST).exists():
        return None
    checkpoint = read(folder)
    return float(max(checkpoint.step * checkpoint.settings["batch_size"], 1))


def _sums_of(table: StoredTable) -> Tensor:
    counts_R = torch.zeros(table.rows, dtype=torch.int32)
    for first, block_R in table.blocks():
        counts_R[first : first + len(block_R)] = block_R
    if table.totals is None:  # it has learned nothing yet
        return torch.zeros(table.rows)
    return sums_of_counts(counts_R, table.totals)
