"""The training program's models, optimizers, loop and figures."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from criteo_runs import CPU, ROWS, built, content, run, scalars
from ranks import on_ranks
from torchrec.datasets.criteo import CAT_FEATURE_COUNT, DEFAULT_CAT_NAMES

from benchmarks.common.training import Figures
from examples.criteo.loop import Loop
from torchrec_freq import row_counts, save_counts


@on_ranks(2)
def test_variants_train(reference: Path, tmp_path: Path) -> None:
    """Every optimizer and precision: to the end, and each its own way."""
    variants = {
        "FrequencySGD": ["--optimizer.frequency.prior_count", "3"],
        "SGD": ["--optimizer.name", "SGD"],
        "RowWiseAdagrad": ["--optimizer.name", "RowWiseAdagrad"],
        "Adagrad": ["--optimizer.name", "Adagrad"],
        "fp16": ["--model.fp16_from", "30", "--evaluation.thresholds", "1000"],
        "autocast": ["--model.autocast", "true"],
    }
    bytes_per_row, losses = {}, {"reference": scalars(reference / "out")["train/loss"][6]}
    for name, more in variants.items():
        summary = run(
            reference / "data",
            tmp_path / name,
            *("--max_steps", "6", "--checkpoint.minutes", "9", "--evaluation.every", "null"),
            *more,
        )
        bytes_per_row[name] = summary["optimizer_bytes_per_row"]
        losses[name] = summary["train_loss"]
    assert all(math.isfinite(loss) for loss in losses.values())
    assert len(set(losses.values())) == len(losses)
    assert bytes_per_row["RowWiseAdagrad"] == 4 and bytes_per_row["SGD"] == 0
    assert bytes_per_row["Adagrad"] == 4 * 8
    assert bytes_per_row["FrequencySGD"] >= 8  # data-parallel tables have them on both ranks
    training = built(reference / "data", tmp_path, "--model.fp16_from", "30")
    (plan,) = training.model.plan.plan.values()
    for key, weight in training.model.state_dict().items():
        if "embedding_bags." in key:
            name = key.split(".")[-2]
            half = ROWS[DEFAULT_CAT_NAMES.index(name)] >= 30
            assert weight.dtype == (torch.float16 if half else torch.float32)
            assert plan[name].sharding_type != "data_parallel" or not half


@on_ranks(2)
def test_warm_up(reference: Path, tmp_path: Path) -> None:
    """The first of 4 steps moves tables and dense layers by a quarter; nothing moves at lr 0."""
    after = {}
    for name, more in {
        "whole": [],
        "quarter": ["--optimizer.warmup", "4"],
        "none": ["--optimizer.lr", "0", "--optimizer.dense_lr", "0"],
    }.items():
        run(reference / "data", tmp_path / name, "--max_steps", "1", *more)
        after[name] = content(tmp_path / name, step=1)
    moved = 0
    for path, start in after["none"].items():
        if path.startswith("/model"):
            whole, quarter = (after[name][path] - start for name in ("whole", "quarter"))
            torch.testing.assert_close(quarter, whole / 4, rtol=0, atol=1e-7)
            moved += bool(whole.abs().max() > 1e-5)
    assert moved > CAT_FEATURE_COUNT
    assert scalars(tmp_path / "quarter")["train/lr"] == pytest.approx({1: 0.05 / 4})


@on_ranks(2)
def test_counts_of_a_file(reference: Path, tmp_path: Path) -> None:
    counts = {name: torch.arange(rows) for name, rows in zip(DEFAULT_CAT_NAMES, ROWS, strict=True)}
    if dist.get_rank() == 0:
        save_counts(tmp_path / "counts", counts)
        save_counts(tmp_path / "other", counts | {"cat_3": torch.ones(4)})
    dist.barrier()
    frozen = ["--optimizer.frequency.count", "frozen", "--optimizer.frequency.normalize", "null"]
    frozen.append("--planner.counts")
    training = built(reference / "data", tmp_path, *frozen, str(tmp_path / "counts"))
    found = row_counts(training.model)
    assert all(torch.equal(found[name], counts[name]) for name in counts)
    for name, message in (("other", "counts of other tables"), ("none", "none")):
        with pytest.raises(ValueError, match=message):
            built(reference / "data", tmp_path, *frozen, str(tmp_path / name))


@on_ranks(2)
def test_no_plan_and_no_loss(reference: Path, tmp_path: Path) -> None:
    """All ranks raise where rank 0 finds no plan, and where a loss on one rank is none."""
    with pytest.raises(ValueError, match="No plan fits"):
        built(reference / "data", tmp_path, "--planner.ddr_gb", "0.000001")
    forward = Loop._forward

    def spoiled(loop: Loop, batch: Any) -> Any:
        loss, outputs = forward(loop, batch)
        if dist.get_rank() == 1 and loop.step == 3:
            outputs = (loss.detach() * math.nan, *outputs[1:])
        return loss, outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_forward", spoiled)
        with pytest.raises(ValueError, match=r"training loss is nan in the 2 steps up to step 4"):
            run(reference / "data", tmp_path / "out")


@on_ranks(2)
def test_planner_report(reference: Path, tmp_path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        built(reference / "data", tmp_path, "--planner.report", "true")
    assert ("cat_25" in printed.getvalue()) == (dist.get_rank() == 0)


@pytest.mark.parametrize("thresholds", [None, 20_000])
@on_ranks(2)
def test_figures(thresholds: int | None) -> None:
    """As counted over all pairs of samples; a rank may have no sample of a batch."""
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=41).astype(np.float32), random.integers(0, 2, 41)
    logits[3] = logits[20]
    metrics = Figures(CPU, thresholds)
    for part in np.split(np.arange(41), [20, 40]):
        share = part[dist.get_rank() :: 2]
        metrics.update(torch.from_numpy(logits[share]), torch.from_numpy(labels[share]))
    figures = metrics.compute()
    pairs = [
        (logits[a] > logits[b]) + 0.5 * (logits[a] == logits[b])
        for a, b in itertools.product(np.flatnonzero(labels == 1), np.flatnonzero(labels == 0))
    ]
    assert figures["auc"] == pytest.approx(np.mean(pairs), abs=1e-6 if thresholds is None else 1e-3)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    losses = -np.log(np.where(labels == 1, probability, 1 - probability))
    assert figures["log_loss"] == pytest.approx(losses.mean(), abs=1e-6)
