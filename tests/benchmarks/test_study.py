"""The study: its data, its search, its bookkeeping, its arithmetic and rules, and a whole run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.common import planted
from benchmarks.common.planted import Task
from benchmarks.study import ablation, compare, report, runner, verdict
from benchmarks.study.config import (
    ADAGRAD,
    AFTER,
    AGEING,
    CANDIDATES,
    CLIPPED,
    EXPERIMENTS,
    FREQUENCY,
    FULL,
    MAIN,
    QUICK,
    ROWWISE,
    SGD,
    STREAM,
    VARIANTS,
    Experiment,
    Run,
)
from benchmarks.study.data import criteo_data, find, load
from benchmarks.study.sweep import Results, lr_at, next_exponents
from benchmarks.study.train import build, stream_curve, stream_figures, train

SMALL = Task(days=3, samples=600, held_out=600, rows=(4, 60))


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "small"
    planted.generate(SMALL, folder)
    return folder


def test_planted_clicks(clicks: Path, tmp_path: Path) -> None:
    planted.generate(SMALL, tmp_path / "again")
    for file in clicks.iterdir():
        again = np.load(tmp_path / "again" / file.name)
        np.testing.assert_array_equal(np.load(file), again)
    sparse = np.concatenate([np.load(file) for file in sorted(clicks.glob("*_sparse.npy"))])
    labels = np.concatenate([np.load(file) for file in sorted(clicks.glob("*_labels.npy"))])
    assert sparse.shape == (1800, 26) and labels.shape == (1800, 1)
    assert labels.mean() == SMALL.clicks
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
        planted.generate(SMALL, tmp_path / "clicks")
    assert not list(tmp_path.iterdir())


def test_criteo_files(clicks: Path, tmp_path: Path) -> None:
    data = criteo_data(clicks)
    assert len(data.tables) == 26 and data.dense == 13 and data.steps(100) == 12
    batches = list(data.train(100, seed=0))
    assert len(batches) == 12
    ids = torch.cat([batch.sparse_features["cat_3"].values() for batch in batches])
    counts = torch.bincount(ids, minlength=data.tables["cat_3"])
    assert torch.equal(counts, data.counts()["cat_3"])
    again, other = (next(iter(data.train(100, seed=seed))) for seed in (0, 1))
    assert torch.equal(again.dense_features, batches[0].dense_features)
    assert not torch.equal(other.dense_features, batches[0].dense_features)
    rare = torch.cat([mask for _, mask in data.held_out("valid", "test")])
    assert len(rare) == 600 and abs(float(rare.float().mean()) - 0.2) < 0.01

    in_order = next(iter(criteo_data(clicks, in_time=True).train(100, seed=1)))
    first = np.load(clicks / "day_00_dense.npy")[:100]
    np.testing.assert_array_equal(in_order.dense_features.numpy(), first)
    sparse = np.load(clicks / "day_00_sparse.npy")[:100]
    np.testing.assert_array_equal(in_order.sparse_features["cat_3"].values(), sparse[:, 3])
    with pytest.raises(FileNotFoundError, match="0 days"):
        criteo_data(tmp_path)


def test_ratings_in_the_order_of_time(ratings: Path) -> None:
    whole, alone = (load(f"ml-100k-time{name}", ratings) for name in ("", "-ids"))
    assert list(alone.tables) == ["user", "item"]
    lines = [line.split("\t") for line in (ratings / "ml-100k/ml-100k.inter").open()][1:]
    liked = [float(int(stars) >= 4) for _, _, stars, _ in lines]
    for data in (whole, alone):
        batches = [*data.train(32, seed=7), *(b for b, _ in data.held_out("valid", "test"))]
        assert torch.cat([batch.labels for batch in batches]).tolist() == liked
    one, other = (next(iter(data.train(32, seed=0))).sparse_features for data in (whole, alone))
    assert torch.equal(one["item"].values(), other["item"].values())
    assert find("ml-1m", ratings) is None
    with pytest.raises(FileNotFoundError, match="criteo"):
        load("criteo", ratings)


def test_grid() -> None:
    lrs = [lr_at(exponent) for exponent in range(-5, 5)]
    assert lrs == [0.056, 0.1, 0.18, 0.32, 0.56, 1, 1.8, 3.2, 5.6, 10]


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ({}, [-2]),
        ({-2: 0.70}, [-4, 0]),
        # Half decades until the best of them has a worse one on either side ...
        ({-4: 0.71, -2: 0.70, 0: 0.6}, [-6]),
        # ... then quarters,
        ({-6: 0.70, -4: 0.71, -2: 0.70, 0: 0.6}, [-5, -3]),
        # of which the best may want another one.
        ({-6: 0.70, -5: 0.71, -4: 0.71, -3: 0.705, -2: 0.70, 0: 0.6}, []),
        ({-6: 0.70, -5: 0.72, -4: 0.71, -3: 0.705, -2: 0.70, 0: 0.6}, []),
        ({-2: 0.70, -1: 0.73, 0: 0.71, 2: 0.72, 4: 0.6, 1: 0.7, 3: 0.74}, []),
        ({-20: 0.7, -19: 0.6, -18: 0.6}, []),
    ],
)
def test_search(scores: dict[int, float], wanted: list[int]) -> None:
    assert next_exponents(scores, start=-2 if -20 not in scores else -18) == wanted


def auc_by_hand(logits: list[float], labels: list[int]) -> float:
    """The share of the pairs of a click and another sample that are in the right order."""
    pairs = [
        (a > b) + 0.5 * (a == b)
        for (a, one), (b, other) in itertools.product(zip(logits, labels, strict=True), repeat=2)
        if one and not other
    ]
    return sum(pairs) / len(pairs)


def test_stream_of_ten_samples() -> None:
    logits = [0.2, -0.4, 1.0, 0.5, -0.3, 0.5, 2.0, -1.0, 0.0, 0.1]
    labels = [0, 1, 1, 0, 0, 1, 0, 0, 1, 0]
    steps = [
        (torch.tensor(logits[n : n + 2]), torch.tensor(labels[n : n + 2])) for n in range(0, 10, 2)
    ]
    figures = stream_figures(steps)
    # Samples 0 and 1 are the first fifth, in which the click comes behind.
    assert figures["by"] == 0
    assert figures["auc"] == pytest.approx(auc_by_hand(logits[2:], labels[2:]), abs=1e-6)
    signs = [a if label else -a for a, label in zip(logits[2:], labels[2:], strict=True)]
    loss = sum(math.log1p(math.exp(-sign)) for sign in signs) / 8
    assert figures["log_loss"] == pytest.approx(loss, abs=1e-6)
    assert [step for step, _ in stream_curve(steps)] == [1, 2, 3, 4, 5]


@on_ranks(1)
def test_a_stream_is_predicted_before_it_is_trained_on(ratings: Path) -> None:
    """By hand: a model that predicts a batch in evaluation mode, and only then learns from it."""
    run = Run("ml-100k-time", "FM", ROWWISE, 0.1, 32, 1, 0)
    data = load(run.data, ratings)
    training = build(run, data)
    logits, labels = [], []
    for batch in data.train(32, seed=0):
        with torch.no_grad():
            logits.append(training.model.module.model(batch.dense_features, batch.sparse_features))
        labels.append(batch.labels)
        training.step(batch)
    result = train(run, ratings)["measures"]
    # Ten batches: two of them are the first fifth.
    for name, part in (("by", slice(2)), ("auc", slice(2, None))):
        by_hand = auc_by_hand(
            torch.cat(logits[part]).tolist(), torch.cat(labels[part]).int().tolist()
        )
        assert result[STREAM][name] == pytest.approx(by_hand, abs=1e-5)
    after = training.evaluate(data.held_out("valid", "test"))["auc"]
    assert result[AFTER]["auc"] == pytest.approx(after, abs=1e-5)


@on_ranks(1)
def test_row_wise_adagrad_with_its_own_square_weighted() -> None:
    """Four steps against the formula, a row at a time."""
    rows, columns, lr, own_weight = 5, 4, 0.3, 7.0
    table = EmbeddingBagConfig(
        name="t", feature_names=["f"], num_embeddings=rows, embedding_dim=columns
    )
    collection = EmbeddingBagCollection([table])
    options = {"lr": ablation.kernel_lr(lr, own_weight)}
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), options)
    constraints = {"t": ParameterConstraints(sharding_types=["table_wise"])}
    planner = EmbeddingShardingPlanner(constraints=constraints)
    sharders = [EmbeddingBagCollectionSharder()]
    plan = planner.plan(collection, sharders)
    model = DistributedModelParallel(
        collection, device=torch.device("cpu"), plan=plan, sharders=sharders
    )
    ablation.keep_sums(model, own_weight)
    (sharded,) = model.state_dict().values()
    weight = sharded.local_shards()[0].tensor
    expected, sums = weight.double().clone(), torch.zeros(rows, dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    for ids in ([0, 1, 1], [1, 2, 0], [4, 4, 4], [0, 1, 2]):
        output_BD = torch.randn(len(ids), columns, generator=random)
        lengths = torch.ones(len(ids), dtype=torch.int32)
        output = model(KeyedJaggedTensor(["f"], torch.tensor(ids), lengths=lengths)).values()
        (output * output_BD).sum().backward()
        gradient = torch.zeros(rows, columns, dtype=torch.float64)
        gradient.index_add_(0, torch.tensor(ids), output_BD.double())
        square = gradient.square().mean(dim=1)
        for row in set(ids):
            step = lr / math.sqrt((sums[row] + own_weight * square[row]) / 2)
            expected[row] -= step * gradient[row]
        sums += square
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-5)


def test_paired_differences() -> None:
    ours, theirs = [0.71, 0.74, 0.70], [0.70, 0.71, 0.705]
    differences = np.subtract(ours, theirs)
    error = differences.std(ddof=1) / np.sqrt(3)
    assert compare.paired(ours, theirs) == pytest.approx((differences.mean(), error))
    assert str(compare.paired(ours, theirs)) == "+0.0117 ± 0.0101"
    assert str(compare.paired(ours[:1], theirs[:1])) == "+0.0100"


Level = Callable[[Run, str], float]


def make_results(path: Path, experiments: tuple[Experiment, ...], level: Level) -> Results:
    """Results of a whole study in which AUC is `level` at the best lr, by run and measure."""
    results = Results(path)
    while found := list(runner.missing(experiments, results)):
        for run in found:
            if results.get(run):
                continue
            experiment = next(e for e in experiments if (e.data, e.model) == (run.data, run.model))
            # The best lr is 0.1, whose own neighbour is a little worse.
            lost = 0.01 * abs(math.log10(run.lr) + 1)
            measures = {
                measure: {
                    "by": 0.7 - lost,
                    "auc": level(run, measure) - lost,
                    "log_loss": 0.5,
                    "rare_auc": 0.6,
                }
                for measure in experiment.measures
            }
            squares = {"squares": [[1.0, 1.0, 2.0, 3.0, 2.5], [4.0, 4.0, 5.0, 6.0, 5.5]]}
            curve = [[1, 0.6], [2, level(run, experiment.measures[0])]]
            more = squares if run.arm == ROWWISE else {}
            results.add(run, run.key() | {"measures": measures, "curve": curve} | more)
    return results


def level(run: Run, measure: str) -> float:
    """FrequencySGD is ahead by 0.01, more so with the seed; weights from 2 on cost 0.002."""
    if run.arm.optimizer != "FrequencySGD":
        return 0.7 + 0.02 * run.seed
    cost = 0.002 if run.arm.options.get("own_weight", 1) >= 2 else 0.0
    helps = 0.003 if run.arm.options.get("half_life") == 50 and "drift" in run.data else 0.0
    return 0.71 + 0.021 * run.seed - cost + helps


def test_report(tmp_path: Path) -> None:
    results = make_results(tmp_path / "results.jsonl", FULL, level)
    printed = report.write(results, tmp_path / "out")
    default = FREQUENCY.options["own_weight"]
    ahead = np.array([0.01, 0.011, 0.012, 0.013, 0.014]) - 0.002 * (default >= 2)
    mean, error = ahead[:3].mean(), ahead[:3].std(ddof=1) / np.sqrt(3)
    row = f"| FM, ml-100k, batch 256, epoch 1 | 0.7200 | {0.72 + mean:.4f} | "
    assert row + f"{mean:+.4f} ± {error:.4f} |" in printed
    assert "| 4 % clicks, second epoch: ahead by 0.02 | **missed** in 1 of 1 |" in printed
    assert "| third epoch: ahead | met |" in printed

    settings = compare.found(results)
    assert verdict.settle_own_weight(settings) == 1
    assert verdict.settle_half_life(settings) == "50 steps"
    arms = settings["FM, ml-100k, batch 4096"]
    for times, best in ((0, 0.1), (2, 0.32), (4, 1.0)):
        assert lr_at(arms[ROWWISE.label].best["epoch 1"] + times) == best
        difference = compare.gain(arms, "epoch 1", times=times)
        assert difference is not None and difference.mean == pytest.approx(mean)

    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {f"{name}.png" for name in ("differences", "lr", "epochs", "stream", "rates")}
    assert names == {"RESULTS.md", *pictures}
    document = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "own_weight 1" in document and all(f"]({name})" in document for name in pictures)
    # The same results make the same files, byte by byte.
    report.write(Results(results.path), tmp_path / "again")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        # The largest that loses at most 0.001 everywhere.
        ({1: [0.0] * 11, 2: [-0.0009] * 11, 3: [0.01] * 3 + [-0.0011]}, 2),
        # 2 was not tried everywhere, so it has not passed.
        ({1: [0.0] * 11, 2: [-0.0009] * 7, 3: [-0.0011]}, None),
        ({1: [0.0] * 11, 2: [-0.0011], 3: [-0.0011]}, 1),
        ({1: [0.0] * 10, 2: [-0.0011], 3: [-0.0011]}, None),
    ],
)
def test_rule_of_own_weight(
    gains: dict[int, list[float]], chosen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {
        weight: {str(n): compare.Difference(mean, 0.0) for n, mean in enumerate(means)}
        for weight, means in gains.items()
    }
    monkeypatch.setattr(verdict, "own_weight_cases", lambda settings: cases)
    assert verdict.settle_own_weight({}) == chosen


def test_quick_is_a_part_of_full(tmp_path: Path) -> None:
    results = make_results(tmp_path / "results.jsonl", QUICK, level)
    assert all(e in FULL for e in QUICK) and EXPERIMENTS == {"quick": QUICK, "full": FULL}
    printed = report.write(results, tmp_path / "out")
    for experiment in QUICK:
        assert f"| {experiment.setting}, {experiment.measures[0]} |" in printed
    document = (tmp_path / "out" / "RESULTS.md").read_text()
    assert f"- DLRM, criteo, batch 4096: {FREQUENCY.label}; {ROWWISE.label}" in document


def test_results_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    runs = [Run("clicks-25", "FM", FREQUENCY, 0.1, 8, 1, seed) for seed in range(3)]
    results = Results(tmp_path / "results.jsonl")
    for run in runs:
        results.add(run, run.key() | {"measures": {}, "curve": []})
    text = results.path.read_text()
    results.path.write_text(text[:-20])
    again = Results(results.path)
    assert [again.get(run) is not None for run in runs] == [True, True, False]
    again.add(runs[2], runs[2].key() | {"measures": {}, "curve": []})
    assert again.path.read_text() == text


@pytest.mark.slow
def test_a_resumed_study_equals_an_unbroken_one(ratings: Path) -> None:
    experiments = [
        Experiment("ml-100k", "FM", 64, (ROWWISE, CLIPPED), epochs=2, seeds=2, stressed=True),
        Experiment("ml-100k-time", "FM", 64, (ROWWISE,), epochs=1, seeds=1),
        Experiment("criteo", "FM", 64, MAIN),
    ]
    results = Results(ratings / "results.jsonl")
    runner.run_all(experiments, results, ratings, workers=1)
    lines = results.path.read_text().splitlines()
    assert not list(runner.missing(experiments[:2], results)) and len(lines) >= 30
    assert {json.loads(line)["data"] for line in lines} == {"ml-100k", "ml-100k-time"}
    for cut in (len(lines), len(lines) // 2):
        resumed = Results(ratings / f"{cut}.jsonl")
        resumed.path.write_text("".join(line + "\n" for line in lines[:cut]) + lines[-1][:9])
        runner.run_all(experiments, Results(resumed.path), ratings, workers=1)
        assert resumed.path.read_text().splitlines() == lines


@pytest.mark.parametrize("model", ["FM", "DeepFM", "DLRM"])
def test_arms_differ_in_nothing_but_the_optimizer(model: str, ratings: Path) -> None:
    same_curves(folder=ratings, model=model)


@on_ranks(1)
def same_curves(folder: Path, model: str) -> None:
    """With lr 0 no table moves, so all arms must have the same figures."""
    arms = [*MAIN, CLIPPED, ADAGRAD, SGD, *VARIANTS, *AGEING, *CANDIDATES]
    for data in ("ml-100k", "ml-100k-time-ids"):
        first, *others = (
            train(Run(data, model, arm, 0.0, 32, 1, 5), folder)["measures"] for arm in arms
        )
        assert all(other == first for other in others)
        other = train(Run(data, model, SGD, 0.0, 32, 1, 6), folder)["measures"]
        assert other != first, "the seed changes nothing"
        assert train(Run(data, model, ROWWISE, 0.1, 32, 1, 5), folder)["measures"] != first


@on_ranks(1)
def test_run_that_diverges_ends(ratings: Path) -> None:
    for data in ("ml-100k", "ml-100k-time"):
        assert train(Run(data, "FM", SGD, 1e30, 32, 2, 0), ratings)["measures"] == {}
