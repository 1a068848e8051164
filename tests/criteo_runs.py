"""A small data set for the training program, runs on it, and what they leave."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchrec.datasets.criteo import CAT_FEATURE_COUNT

from benchmarks.common.training import Training
from examples.criteo import __main__ as program
from examples.criteo import model
from examples.criteo.settings import parse

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS = [3 + 2 * table for table in range(CAT_FEATURE_COUNT)]
DAYS, SAMPLES = 3, 98  # the last day's halves do not fill batches: 49 = 3 * 16 + 1
BATCH, EPOCHS = 16, 2
STEPS = EPOCHS * ((DAYS - 1) * SAMPLES // BATCH)
CPU = torch.device("cpu")
TIMEOUT_SECONDS = 120


def write(folder: Path, samples: int = SAMPLES, days: int = DAYS) -> Path:
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for day in range(days):
        sparse = random.integers(0, ROWS, size=(samples, CAT_FEATURE_COUNT), dtype=np.int32)
        dense = random.normal(size=(samples, 13)).astype(np.float32)
        labels = (sparse[:, :1] + random.normal(size=(samples, 1)) > 1).astype(np.int32)
        for kind, values in (("dense", dense), ("sparse", sparse), ("labels", labels)):
            np.save(folder / f"day_{day}_{kind}.npy", values)
    return folder


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--data.folder", str(folder), "--out", str(out), "--data.rows", str(ROWS)),
        *("--batch_size", str(BATCH), "--epochs", str(EPOCHS), "--log_every", "2"),
        *("--model.dim", "8", "--model.bottom", "[8]", "--model.top", "[8]"),
        *("--evaluation.batch_size", "16", "--evaluation.every", "6"),
        *("--checkpoint.minutes", "0", *more),
    ]


def run(folder: Path, out: Path, *more: str) -> dict[str, Any]:
    """The summary of a run in this process, which is a rank."""
    program.train(parse(arguments(folder, out, *more)), CPU)
    dist.barrier()
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def content(out: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    file = out / f"checkpoint-{os.getpid()}.pt"
    dcp_to_torch_save(out / "checkpoints" / f"step-{step:08}", file)
    tensors: dict[str, torch.Tensor] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                add(f"{path}/{key}", entry)
        else:
            tensors[path] = value.detach()

    add("", torch.load(file))
    return tensors


def assert_same(got: Path, wanted: Path, step: int = STEPS) -> None:
    """Bit by bit."""
    ours, theirs = content(got, step), content(wanted, step)
    assert ours.keys() == theirs.keys()
    assert [path for path in theirs if not torch.equal(ours[path], theirs[path])] == []


def scalars(out: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's figures: tag -> step -> value."""
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


@on_ranks(2)
def make_reference(folder: Path) -> None:
    run(folder / "data", folder / "out", "--checkpoint.keep", "100")


def built(folder: Path, out: Path, *more: str) -> Training:
    return model.build(parse(arguments(folder, out, *more)), ROWS, CPU)


GIVEN = ["--data.folder", "data"]
