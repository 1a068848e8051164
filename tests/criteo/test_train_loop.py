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
from models import TABLES, full_weights, make_collection, shard
from plans import make_plan
from ranks import on_ranks
from torchrec.datasets.criteo import CAT_FEATURE_COUNT, DEFAULT_CAT_NAMES
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from training import CPU, ROWS, built, content, run, scalars

from benchmarks.common.training import Figures
from examples.criteo import model
from examples.criteo.loop import Loop
from torchrec_freq import row_counts, save_counts


@on_ranks(2)
def test_first_weights_do_not_depend_on_the_plan() -> None:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "BLOCK", 5)  # several a shard
        for kind in ("table_wise", "row_wise", "column_wise", "data_parallel", "mixed"):
            collection = make_collection(TABLES)
            plan = make_plan(kind, TABLES, 2)
            sharded = shard(collection, plan, EmbeddingBagCollectionSharder(), {})
            model.draw_tables(sharded, collection.embedding_bag_configs(), seed=3)
            found.append(full_weights(sharded))
    for tables in found:
        assert len(tables) == len(TABLES)
        for table in TABLES:
            assert torch.equal(tables[table.name], found[0][table.name])
            bound = table.rows**-0.5
            assert 0.9 * bound < tables[table.name].abs().max() <= bound
    flat = torch.cat([table.flatten() for table in found[0].values()])
    assert len(flat.unique()) > 0.98 * len(flat)  # no block is drawn twice


@on_ranks(2)
def test_variants_train(reference: Path, tmp_path: Path) -> None:
    """Every optimizer, model and precision: to the end, and each its own way."""
    variants = {
        "FrequencySGD": ["--optimizer.frequency.count", "batches"],
        "SGD": ["--optimizer.name", "SGD"],
        "RowWiseAdagrad": ["--optimizer.name", "RowWiseAdagrad"],
        "Adagrad": ["--optimizer.name", "Adagrad"],
        "DCN": "--model.kind DLRM_DCN --model.dcn_layers 2 --model.dcn_rank 4".split(),
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
    # A little more with FrequencySGD: data-parallel tables have counters on both ranks.
    assert bytes_per_row == pytest.approx(
        dict.fromkeys(variants, 4) | {"SGD": 0, "Adagrad": 4 * 8}, rel=0.02
    )
    training = built(reference / "data", tmp_path, "--model.fp16_from", "30")
    state = training.model.state_dict()
    dtypes = {key.split(".")[-2]: value.dtype for key, value in state.items() if "bags." in key}
    assert [dtypes[name] for name in DEFAULT_CAT_NAMES] == [
        torch.float16 if rows >= 30 else torch.float32 for rows in ROWS
    ]
    (plan,) = training.model.plan.plan.values()
    kinds = {name: plan[name].sharding_type for name in DEFAULT_CAT_NAMES}
    half = {name for name, dtype in dtypes.items() if dtype == torch.float16}
    assert "data_parallel" in kinds.values()
    assert "data_parallel" not in {kinds[name] for name in half}


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
    rates = scalars(tmp_path / "quarter")["train/lr"]
    assert rates == pytest.approx({1: 0.05 / 4})


@on_ranks(2)
def test_frozen_counts(reference: Path, tmp_path: Path) -> None:
    counts = {name: torch.arange(rows) for name, rows in zip(DEFAULT_CAT_NAMES, ROWS, strict=True)}
    if dist.get_rank() == 0:
        save_counts(tmp_path / "counts.safetensors", counts)
        save_counts(tmp_path / "other.safetensors", counts | {"cat_3": torch.ones(4)})
    dist.barrier()
    frozen = ["--optimizer.frequency.count", "frozen", "--planner.counts"]
    training = built(reference / "data", tmp_path, *frozen, str(tmp_path / "counts.safetensors"))
    found = row_counts(training.model)
    assert all(torch.equal(found[name], counts[name]) for name in counts)
    with pytest.raises(ValueError, match="counts of other tables"):
        built(reference / "data", tmp_path, *frozen, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="none.*: no such file of counts"):
        built(reference / "data", tmp_path, *frozen, str(tmp_path / "none.safetensors"))


@on_ranks(2)
def test_no_plan_and_no_loss(reference: Path, tmp_path: Path) -> None:
    """All ranks raise where rank 0 finds no plan, and where a loss on one rank is none."""
    with pytest.raises(ValueError, match="No plan fits"):
        built(reference / "data", tmp_path, "--planner.ddr_gb", "0.000001")
    with pytest.raises(ValueError, match=r"training loss is (nan|inf) in the 2 steps up to step 4"):
        forward = Loop._forward

        def spoiled(loop: Loop, batch: Any) -> Any:
            loss, outputs = forward(loop, batch)
            if dist.get_rank() == 1 and loop.step == 3:
                outputs = (loss.detach() * math.nan, *outputs[1:])
            return loss, outputs

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loop, "_forward", spoiled)
            run(reference / "data", tmp_path / "out")


@on_ranks(2)
def test_planner_report(
    reference: Path,
    tmp_path: Path,
) -> None:
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
    shares = [part[dist.get_rank() :: 2] for part in np.split(np.arange(41), [20, 40])]

    def measured(thresholds: int | None) -> dict[str, float]:
        metrics = Figures(CPU, thresholds)
        for share in shares:
            metrics.update(torch.from_numpy(logits[share]), torch.from_numpy(labels[share]))
        return metrics.compute()

    figures = measured(thresholds)
    pairs = [
        (logits[a] > logits[b]) + 0.5 * (logits[a] == logits[b])
        for a, b in itertools.product(np.flatnonzero(labels == 1), np.flatnonzero(labels == 0))
    ]
    assert figures["auc"] == pytest.approx(np.mean(pairs), abs=1e-6 if thresholds is None else 1e-3)
    coarse = measured(3)
    assert abs(coarse["auc"] - figures["auc"]) > 1e-3
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    losses = -np.log(np.where(labels == 1, probability, 1 - probability))
    assert figures["log_loss"] == pytest.approx(losses.mean(), abs=1e-6)
