"""The training program's data: bad files and rows, the scan, batches."""

from __future__ import annotations

import ast
import itertools
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ranks import on_ranks
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES
from training import BATCH, EPOCHS, ROWS, SAMPLES, arguments, assert_same, run, write

from benchmarks.common import days as data_module
from benchmarks.common.days import Batches, Days, find_days
from examples.criteo import __main__ as program
from examples.criteo import scan
from examples.criteo.settings import parse


def save(path: Path, values: NDArray[Any]) -> None:
    np.save(path, values)


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def cut(path: Path, bytes_: int) -> None:
    path.write_bytes(path.read_bytes()[:bytes_])


def change(path: Path, row: int, column: int, value: float) -> None:
    values = np.load(path)
    values[row, column] = value
    np.save(path, values)


def change_two(path: Path, rows: list[int], column: int) -> None:
    for row in rows:
        change(path, row, column, 7 + row)


def change_both(folder: Path, row: int) -> None:
    change(folder / "day_0_dense.npy", row, 0, math.nan)
    change(folder / "day_0_labels.npy", row, 0, -1)


# What is done to a folder, and what the error says.
HEADERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: remove(f / "day_1_labels.npy"), r"No such file.*day_1_labels\.npy"),
    "no folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "no days": (lambda f: remove(*f.iterdir()), r"holds 0 days.*at least two"),
    "one day": (
        lambda f: remove(*f.glob("day_[12]_*")),
        r"holds 1 days.*at least two",
    ),
    "odd name": (lambda f: save(f / "day_x_dense.npy", np.zeros(3)), r"day_x_\*.*named day_0"),
    "header cut": (lambda f: cut(f / "day_0_dense.npy", 40), r"day_0_dense\.npy is not an npy"),
    "empty file": (lambda f: cut(f / "day_0_dense.npy", 0), r"day_0_dense\.npy is not an npy"),
    "cut": (
        lambda f: cut(f / "day_2_sparse.npy", 10_000),
        r"day_2_sparse\.npy is not an npy file, or truncated",
    ),
    "too long": (
        lambda f: (f / "day_0_labels.npy").open("ab").write(b"1234"),
        r"day_0_labels\.npy is too long: 98 rows take less",
    ),
    "dtype": (
        lambda f: save(f / "day_0_dense.npy", np.zeros((SAMPLES, 13))),
        r"day_0_dense\.npy holds float64; expected float32",
    ),
    "byte order": (
        lambda f: save(f / "day_0_dense.npy", np.zeros((SAMPLES, 13), ">f4")),
        r"day_0_dense\.npy holds >f4; expected float32",
    ),
    "columns": (
        lambda f: save(f / "day_0_sparse.npy", np.zeros((SAMPLES, 25), np.int32)),
        r"day_0_sparse\.npy has the shape \[98, 25\]; expected \[samples, 26\]",
    ),
    "dimensions": (
        lambda f: save(f / "day_0_labels.npy", np.zeros(SAMPLES, np.int32)),
        r"day_0_labels\.npy has the shape \[98\]",
    ),
    "no rows": (
        lambda f: save(f / "day_0_labels.npy", np.zeros((0, 1), np.int32)),
        r"day_0_labels\.npy has the shape \[0, 1\]",
    ),
    "by column": (
        lambda f: save(f / "day_0_dense.npy", np.zeros((13, SAMPLES), np.float32).T),
        r"day_0_dense\.npy is stored by column",
    ),
    "rows": (
        lambda f: save(f / "day_1_dense.npy", np.zeros((97, 13), np.float32)),
        r"files of a day differ.*day_1_dense\.npy 97, day_1_sparse\.npy 98",
    ),
}
ROWS_OF_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "id": (
        lambda f: change_two(f / "day_0_sparse.npy", [5, 90], 2),
        r"2 bad rows.*\n  day_0_sparse\.npy, rows 5 to 90, 2 bad ones: id 12 of cat_2, whose table "
        r"has 7 rows\nRepair",
    ),
    "negative id": (
        lambda f: change(f / "day_2_sparse.npy", 97, 25, -1),
        r"day_2_sparse\.npy, row 97: id -1 of cat_25 is negative",
    ),
    "label": (
        lambda f: change(f / "day_1_labels.npy", 0, 0, 2),
        r"day_1_labels\.npy, row 0: label 2 is neither 0 nor 1",
    ),
    "nan": (
        lambda f: change(f / "day_0_dense.npy", 3, 12, math.nan),
        r"day_0_dense\.npy, row 3: nan in column 12",
    ),
    "inf": (
        lambda f: change(f / "day_0_dense.npy", 3, 0, -math.inf),
        r"day_0_dense\.npy, row 3: -inf in column 0",
    ),
    "two kinds": (
        lambda f: change_both(f, row=3),
        r"1 bad rows.*\n  day_0_dense\.npy, row 3: .*\n  day_0_labels\.npy, row 3: ",
    ),
}


@on_ranks(2)
def test_bad_files_stop_all_ranks(tmp_path: Path) -> None:
    """Every rank raises the same error, and goes on to the next one: none hangs."""
    for name, (spoil, message) in {**HEADERS, **ROWS_OF_FILES}.items():
        folder = tmp_path / name
        if dist.get_rank() == 0:
            spoil(write(folder))
        dist.barrier()
        settings = parse(arguments(folder, tmp_path / "out"))
        with pytest.raises(ValueError, match=message) as error:
            program.prepare(settings)
        said: list[Any] = [None, None]
        dist.all_gather_object(said, str(error.value))
        assert said[0] == said[1], name
        # Without the scan the headers are checked all the same.
        unscanned = replace(settings, data=replace(settings.data, scan=False))
        if name in HEADERS:
            with pytest.raises(ValueError, match=message):
                program.prepare(unscanned)
        else:
            program.prepare(unscanned)


@on_ranks(2)
def test_one_rank_alone_cannot_read(tmp_path: Path) -> None:
    if dist.get_rank() == 0:
        write(tmp_path / "data")
    dist.barrier()
    settings = parse(arguments(tmp_path / "data", tmp_path / "out"))
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:

            def fail(*_: object) -> None:
                raise OSError("stale file handle")

            patch.setattr(data_module.Day, "read", fail)
        with pytest.raises(ValueError, match="on rank 1: stale file handle"):
            program.prepare(settings)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(program, "find_days", lambda folder: find_days(folder)[1:])
        with pytest.raises(ValueError, match="Rank 1 sees other files"):
            program.prepare(settings)
    # Rank 0 alone writes.
    nowhere = replace(settings, out=tmp_path / "data" / "day_0_dense.npy" / "out")
    with pytest.raises(ValueError, match="on rank 0: .*Not a directory"):
        program.prepare(nowhere)


@on_ranks(2)
def test_too_many_bad_rows_to_keep(tmp_path: Path) -> None:
    """Of one rank's part; all ranks stop."""
    if dist.get_rank() == 0:
        labels = write(tmp_path / "data") / "day_0_labels.npy"
        np.save(labels, np.load(labels) + 2)
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "MOST_BAD", 40)
        patch.setattr(scan, "CHUNK", 30)
        message = r"on rank 0: More than 40 bad rows: day_0_labels.npy, rows 0 to \d+"
        with pytest.raises(ValueError, match=message):
            program.prepare(parse(arguments(tmp_path / "data", tmp_path / "out")))


@on_ranks(2)
def test_bad_rows_left_out(tmp_path: Path) -> None:
    """As if trained on a copy without them."""
    clean, dirty = tmp_path / "clean", tmp_path / "dirty"
    bad = {0: [0, 1, 40, 97], 1: [5], 2: [0, 50, 96]}
    if dist.get_rank() == 0:
        write(clean)
        write(dirty)
        for day, rows in bad.items():
            for kind in ("dense", "sparse", "labels"):
                path = clean / f"day_{day}_{kind}.npy"
                np.save(path, np.delete(np.load(path), rows, axis=0))
            for row in rows:
                change(dirty / f"day_{day}_dense.npy", row, 4, math.inf)
                # Not counted twice, and no row of a table.
                change(dirty / f"day_{day}_sparse.npy", row, 4, 1000)
    dist.barrier()
    more = ["--data.rows", "null", "--data.bad_rows", "skip"]
    summaries = [run(folder, tmp_path / "out" / folder.name, *more) for folder in (clean, dirty)]
    # Without their numbers, ids have no bound: only the dense features were bad.
    assert [summary["bad_rows"] for summary in summaries] == [0, 8]
    assert summaries[0]["curve"] == summaries[1]["curve"]
    assert summaries[0]["settings"] == summaries[1]["settings"]
    steps = summaries[0]["steps"]
    assert steps == EPOCHS * (191 // BATCH)
    assert_same(tmp_path / "out" / "dirty", tmp_path / "out" / "clean", step=steps)


@on_ranks(2)
def test_scan_is_done_once(tmp_path: Path, reference: Path) -> None:
    folder = tmp_path / "data"
    if dist.get_rank() == 0:
        shutil.copytree(reference / "data", folder)
    dist.barrier()
    reads: list[object] = []
    read = data_module.Day.read
    cache = tmp_path / "scan.json"

    def counted(*args: Any) -> Any:
        reads.append(args)
        return read(*args)

    def scanned(rows: list[int] | None = ROWS) -> bool:
        reads.clear()
        result = scan.scan(Days(find_days(folder)), rows, cache)
        assert result.largest == [rows - 1 for rows in ROWS] and not result.bad
        dist.barrier()
        return bool(reads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module.Day, "read", counted)
        patch.setattr(scan, "CHUNK", 7)
        assert scanned()
        assert not scanned()
        assert scanned(rows=None)  # other bounds
        if dist.get_rank() == 0:
            os.utime(folder / "day_1_dense.npy", (0, 0))
        dist.barrier()
        assert scanned(rows=None)
        if dist.get_rank() == 0:
            cache.write_text("{")
        dist.barrier()
        assert scanned(rows=None)


def whole(folder: Path, days: range) -> dict[str, NDArray[Any]]:
    return {
        kind: np.concatenate([np.load(folder / f"day_{day}_{kind}.npy") for day in days])
        for kind in ("dense", "sparse", "labels")
    }


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("wide", [False, True])
def test_batches(ranks: int, wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares of the ranks, joined, are the rows of the files in order, without the bad ones."""
    folder = write(tmp_path / "data", samples=10)
    if wide:
        path = folder / "day_1_sparse.npy"
        np.save(path, np.load(path).astype(np.int64) + 2**40)
    bad = np.array([0, 9, 10, 11, 25])
    expected = {name: np.delete(v, bad, axis=0) for name, v in whole(folder, range(3)).items()}
    modulo = np.array(ROWS)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)

    def read(part: range, batch_size: int, **options: Any) -> list[list[Any]]:
        by_rank = []
        for rank in range(ranks):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            batches = Batches(
                Days(find_days(folder), bad),
                part,
                rows=ROWS,
                modulo=wide,
                batch_size=batch_size,
                **options,
            )
            by_rank.append([batches[step] for step in range(2 * batches.steps)])
        return [list(shares) for shares in zip(*by_rank, strict=True)]

    def joined(shares: list[Any]) -> dict[str, NDArray[Any]]:
        sparse = [
            torch.stack([share.sparse_features[name].values() for name in DEFAULT_CAT_NAMES], 1)
            for share in shares
        ]
        assert {values.dtype for values in sparse} == {torch.int32}
        return {
            "dense": torch.cat([share.dense_features for share in shares]).numpy(),
            "sparse": torch.cat(sparse).numpy(),
            "labels": torch.cat([share.labels for share in shares]).numpy()[:, None],
        }

    def rows_of(shares: list[Any]) -> list[int]:
        got = joined(shares)
        rows = [int(np.flatnonzero((expected["dense"] == d).all(axis=1))[0]) for d in got["dense"]]
        assert np.array_equal(got["labels"], expected["labels"][rows])
        ids = expected["sparse"][rows]
        assert np.array_equal(got["sparse"], ids % modulo if wide else ids)
        return rows

    # In order. One sample is over: with several ranks it is part of the batch before.
    batches = read(range(2, 24), 7)
    bounds = [2, 9, 16, 23, 24] if ranks == 1 else [2, 9, 16, 24]
    expected_rows = [list(range(*pair)) for pair in itertools.pairwise(bounds)]
    assert [rows_of(shares) for shares in batches] == 2 * expected_rows
    sizes = [[len(share.labels) for share in shares] for shares in batches]
    assert sizes[0] == [len(part) for part in np.array_split(range(7), ranks)]
    assert [len(shares) for shares in read(range(1, 4), 7)] == [ranks] * 2
    # Whole batches only, in another order each pass, the same for any number of ranks.
    passes = [rows_of(shares) for shares in read(range(24), 5, whole=True, order_seed=1)]
    blocks = [list(range(start, start + 5)) for start in range(0, 20, 5)]
    orders = [[blocks.index(rows) for rows in part] for part in (passes[:4], passes[4:])]
    assert orders == [
        np.random.default_rng([1, epoch]).permutation(4).tolist() for epoch in range(2)
    ]


def test_headers_are_parsed_by_nobody_but_the_finder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads read, and Python's parser is not safe in several at once (File)."""
    folder = write(tmp_path / "data", samples=10)
    path = folder / "day_1_dense.npy"
    values = np.load(path)
    with path.open("wb") as file:
        np.lib.format.write_array(file, values, version=(2, 0))
    days = find_days(folder)
    monkeypatch.setattr(ast, "literal_eval", lambda header: pytest.fail(f"parsed {header!r}"))
    got = Days(days).read(8, 23)
    monkeypatch.undo()
    assert all(np.array_equal(v[8:23], got[kind]) for kind, v in whole(folder, range(3)).items())


def test_file_cut_since_it_was_found(tmp_path: Path) -> None:
    days = find_days(write(tmp_path / "data", samples=10))
    path = days[1].files["sparse"].path
    cut(path, path.stat().st_size - 1)
    Days(days).read(0, 19)
    with pytest.raises(ValueError, match=r"day_1_sparse\.npy has been cut"):
        Days(days).read(0, 20)


@on_ranks(2)
def test_synthetic_data(tmp_path: Path) -> None:
    """Made once, by one rank; the planted signal is found."""
    more = ["--data.synthetic", "1500", "--data.rows", "null", "--data.max_rows", "500"]
    more += ["--batch_size", "64", "--evaluation.batch_size", "500", "--evaluation.every", "null"]
    more += ["--epochs", "1", "--checkpoint.minutes", "9", "--optimizer.lr", "0.1"]
    summary = run(tmp_path / "data", tmp_path / "out", *more)
    assert summary["steps"] == 3 * 1500 // 64
    assert summary["test"]["auc"] > 0.55
    assert max(summary["settings"]["rows"]) == 500  # of up to 10,000: ids are taken modulo
    with pytest.raises(ValueError, match="other data than data.synthetic=200"):
        run(tmp_path / "data", tmp_path / "out", "--data.synthetic", "200")
