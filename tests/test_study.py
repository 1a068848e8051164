"""The study: its synthetic data, its search, its bookkeeping, its arithmetic, and a whole run."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks, run_on_ranks
from test_demo import write_recbole

from examples.study import planted, report, runner
from examples.study.config import (
    EXPERIMENTS,
    FREQUENCY,
    FROZEN,
    ROWWISE,
    SGD,
    WARM_SGD,
    Arm,
    Experiment,
    Run,
)
from examples.study.data import Criteo, convert_tsv, load
from examples.study.planted import Task
from examples.study.results import Results
from examples.study.sweep import Sweep, lr_at, mean_auc, next_exponents
from examples.study.train import train

SMALL = Task(days=3, samples=600, held_out=600, rows=(4, 60))


@pytest.fixture(scope="module")
def zipf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "small"
    planted.generate(SMALL, folder)
    return folder


def test_planted_clicks(zipf: Path, tmp_path: Path) -> None:
    planted.generate(SMALL, tmp_path / "again")
    for file in zipf.iterdir():
        again = np.load(tmp_path / "again" / file.name)
        np.testing.assert_array_equal(np.load(file), again)
    sparse = np.concatenate([np.load(file) for file in sorted(zipf.glob("*_sparse.npy"))])
    labels = np.concatenate([np.load(file) for file in sorted(zipf.glob("*_labels.npy"))])
    assert sparse.shape == (1800, 26) and labels.shape == (1800, 1)
    assert abs(labels.mean() - SMALL.clicks) < 0.03
    for column in sparse.T:
        counts = np.sort(np.bincount(column))[::-1]
        # Zipf: the most frequent id occurs about 2 ** 1.1 as often as the next one.
        assert 1.5 < counts[0] / counts[1] < 3.2


def test_popularity_moves_from_day_to_day(tmp_path: Path) -> None:
    task = dataclasses.replace(SMALL, days=2, rows=(60, 60), popularity_drift=0.5)
    planted.generate(task, tmp_path / "drift")
    first, second = (
        np.load(file)[:, 0] for file in sorted((tmp_path / "drift").glob("*_sparse.npy"))
    )
    top = int(np.bincount(first).argmax())
    assert (first == top).mean() > 0.15 and (second == top).mean() < 0.02


def test_generation_that_is_cut_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        planted.generate(SMALL, tmp_path / "zipf")
    assert not list(tmp_path.iterdir())


def test_criteo_reader(zipf: Path) -> None:
    data = Criteo(zipf)
    assert len(data.tables) == 26 and data.steps(100) == 12
    batches = list(data.train(100, seed=0))
    assert len(batches) == 12
    ids = torch.cat([batch.sparse_features["cat_3"].values() for batch in batches])
    counts = torch.bincount(ids, minlength=data.tables["cat_3"])
    assert torch.equal(counts, data.counts["cat_3"])
    again, other = (next(iter(data.train(100, seed=seed))) for seed in (0, 1))
    assert torch.equal(again.dense_features, batches[0].dense_features)
    assert not torch.equal(other.dense_features, batches[0].dense_features)
    held_out = [data.held_out(split) for split in ("valid", "test")]
    assert [sum(len(mask) for _, mask in batches) for batches in held_out] == [300, 300]
    rare = torch.cat([mask for batches in held_out for _, mask in batches])
    assert abs(float(rare.float().mean()) - 0.2) < 0.01

    in_order = next(iter(Criteo(zipf, shuffle=False).train(100, seed=1)))
    first = np.load(zipf / "day_00_dense.npy")[:100]
    np.testing.assert_array_equal(in_order.dense_features.numpy(), first)


def test_criteo_tsv(tmp_path: Path) -> None:
    rng = random.Random(0)
    for day in range(2):
        lines = [
            [rng.randrange(2), *(rng.randrange(9) for _ in range(13))]
            + [f"{rng.randrange(16**8):08x}" for _ in range(25)]
            + ["" if row == 0 else "000000ff"]
            for row in range(40)
        ]
        text = "".join("\t".join(map(str, line)) + "\n" for line in lines)
        (tmp_path / f"day_{day}.tsv").write_text(text)
    convert_tsv(tmp_path)
    data = Criteo(tmp_path)
    assert data.tables["cat_25"] == 256 and data.tables["cat_0"] == 100_000
    assert data.counts["cat_25"].nonzero().flatten().tolist() == [0, 255]
    assert len(next(iter(data.train(20, seed=0))).labels) == 20


def test_grid() -> None:
    lrs = [lr_at(exponent) for exponent in range(-4, 5)]
    assert lrs == [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ({}, [-2]),
        ({-2: 0.70}, [-3, -1]),
        ({-3: 0.71, -2: 0.70, -1: 0.6}, [-4]),
        # The best is inside, but the low side is still good, and 10x not reached.
        ({-4: 0.709, -3: 0.71, -2: 0.70}, [-5, -1]),
        ({-5: 0.70, -4: 0.709, -3: 0.71, -2: 0.70, -1: 0.5}, []),
        ({-10: 0.7, -9: 0.7, -8: 0.6}, []),
        ({6: 0.5, 7: 0.6, 8: 0.7}, []),
    ],
)
def test_search(scores: dict[int, float], wanted: list[int]) -> None:
    assert next_exponents(scores, start=-2) == wanted


def test_decades_within_tolerance() -> None:
    # Half a decade a grid point: one whole step up, then half a step, and a quarter step down.
    scores = {-1: 0.692, 0: 0.700, 1: 0.699, 2: 0.697}
    assert report.decades_within(scores) == pytest.approx((1 + 0.5 + 0.25) / 2)
    # The grid ends while the score is still good.
    assert report.decades_within({0: 0.7, 1: 0.7}) == 0.5


def make_result(run: Run, first: float, second: float) -> dict[str, Any]:
    """A result of two epochs with these test AUCs; the validation AUC is 0.1 lower."""
    curve = [
        {
            "step": 10 * epoch,
            "epoch": epoch,
            "valid": {"auc": auc - 0.1},
            "test": {"auc": auc, "log_loss": 1 - auc, "rare_auc": auc / 2},
        }
        for epoch, auc in ((1, first), (2, second))
    ]
    return run.key() | {"curve": curve}


def test_report_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment("zipf", "FM", (FREQUENCY, ROWWISE), (8,), epochs=2, seeds=2)
    monkeypatch.setitem(EXPERIMENTS, "quick", (experiment,))
    monkeypatch.setitem(EXPERIMENTS, "full", ())
    results = Results(tmp_path / "results.jsonl")
    first_auc = {
        FREQUENCY.label: {-4: 0.60, -3: 0.70, -2: 0.71, -1: 0.68, 0: 0.60},
        ROWWISE.label: {-4: 0.60, -3: 0.72, -2: 0.71, -1: 0.70, 0: 0.65},
    }
    for arm in experiment.arms:
        sweep = Sweep(experiment, arm, 8)
        for exponent, auc in first_auc[arm.label].items():
            for run in sweep.runs(exponent):
                spread = 0.01 * (2 * run.seed - 1)
                results.add(run, make_result(run, auc + spread, auc + spread - 0.02))
        assert sweep.missing(results) == []
    (arms,) = report.found_by_setting(results).values()
    ours = report.main_table(arms)[1]
    # Standard deviation of 0.70 and 0.72; the best epoch is the first.
    once = ["0.1", "0.7100 ± 0.0141", "0.2900 ± 0.0141", "0.3550 ± 0.0071"]
    assert ours == [FREQUENCY.label, *once, *once]
    # 0.002 below the best: 0.2 of a step down, 0.067 up, and half a decade a step.
    assert report.lr_table(arms, "1 epoch")[1] == [
        FREQUENCY.label,
        *("0.1", "0.13", "0.0300", "0.1100"),
    ]
    same = report.same_lr_table(report.found_by_setting(results), "1 epoch")
    assert same[0][3:] == ["0.01", "0.03", "0.1", "0.3", "1"]
    assert same[2][2:] == ["RowWiseAdagrad", "0.6000", "0.7200", "0.7100", "0.7000", "0.6500"]
    carried = report.carry_over_table(report.found_by_setting(results))[1]
    assert carried[1:] == ["8", "0.03", "1 epoch", "0.7200", "0.7200", "0.7000", "0.0200"]
    assert report.steps_table(arms)[0] == ["optimizer", "step 10", "step 20"]
    printed = report.write(results, tmp_path / "out")
    assert "| FM on zipf | 8 | 0.7100 ± 0.0141 / 0.7100 ± 0.0141 |" in printed
    assert "| FM on zipf | 8 | RowWiseAdagrad | 0.03 |" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "RESULTS.md",
        "lr.png",
        "steps.png",
    }


def test_results_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    runs = [Run("zipf", "FM", FREQUENCY, 0.1, 8, 1, seed) for seed in range(3)]
    results = Results(tmp_path / "results.jsonl")
    for run in runs:
        results.add(run, make_result(run, 0.6, 0.7))
    text = results.path.read_text()
    results.path.write_text(text[:-20])
    again = Results(results.path)
    assert [again.get(run) is not None for run in runs] == [True, True, False]
    again.add(runs[2], make_result(runs[2], 0.6, 0.7))
    assert again.path.read_text() == text


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    """A data folder with a few hundred ratings."""
    (tmp_path / "ml-100k").mkdir()
    write_recbole(tmp_path / "ml-100k")
    return tmp_path


def test_whole_study(ratings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment("ml-100k", "FM", (ROWWISE, WARM_SGD), (64,), epochs=2, seeds=1)
    results = Results(ratings / "results.jsonl")
    missing = dataclasses.replace(experiment, data="criteo")
    runner.run_all([experiment, missing], results, ratings, workers=1)
    assert not list(runner.missing([experiment], results))
    lines = [json.loads(line) for line in results.path.read_text().splitlines()]
    assert len(lines) == len(results) >= 6
    assert {line["arm"] for line in lines} == {ROWWISE.label, WARM_SGD.label}
    for line in lines:
        assert [point["epoch"] for point in line["curve"]][-2:] == [1, 2]

    # The same command again, with nothing left to do, and with one run lost.
    runner.run_all([experiment], Results(results.path), ratings, workers=1)
    assert len(results.path.read_text().splitlines()) == len(lines)
    results.path.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    runner.run_all([experiment], Results(results.path), ratings, workers=1)
    again = [json.loads(line) for line in results.path.read_text().splitlines()]
    assert again[-1]["curve"] == lines[0]["curve"], "a run does not depend on those before it"


@pytest.mark.parametrize("model", ["FM", "DeepFM", "DLRM"])
def test_arms_differ_in_nothing_but_the_optimizer(model: str, ratings: Path) -> None:
    same_curves(folder=ratings, model=model)


@on_ranks(2)
def same_curves(folder: Path, model: str) -> None:
    """With lr 0 no table moves, so all arms must have the same figures, on any number of ranks."""
    arms = [FREQUENCY, FROZEN, ROWWISE, Arm("Adagrad"), SGD, WARM_SGD]
    curves = [train(Run("ml-100k", model, arm, 0.0, 32, 1, 5), folder)["curve"] for arm in arms]
    assert len(curves[0]) == 4
    assert all(curve == curves[0] for curve in curves)
    other = train(Run("ml-100k", model, SGD, 0.0, 32, 1, 6), folder)["curve"]
    assert other != curves[0], "the seed changes nothing"
    assert train(Run("ml-100k", model, ROWWISE, 0.1, 32, 1, 5), folder)["curve"] != curves[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_run_that_diverges_ends(ranks: int, ratings: Path) -> None:
    run_on_ranks(ranks, ends_early, {"folder": ratings})


def ends_early(folder: Path) -> None:
    result = train(Run("ml-100k", "FM", SGD, 1e30, 32, 2, 0), folder)
    assert not any("test" in point for point in result["curve"])
    assert mean_auc([result], "1 epoch") == -math.inf


def test_data_that_is_not_there(tmp_path: Path) -> None:
    assert load("ml-1m", tmp_path) is None and load("criteo", tmp_path) is None
