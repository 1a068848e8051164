"""The training program: restarts, other numbers of ranks, bad files, settings."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import TABLES, full_weights, make_collection, shard
from numpy.typing import NDArray
from ranks import on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_launch import run_locally
from test_sharding import make_plan
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils.tensorboard.writer import SummaryWriter
from torchmetrics.classification import BinaryAUROC
from torchrec.datasets.criteo import CAT_FEATURE_COUNT, DEFAULT_CAT_NAMES
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

from criteo import __main__ as program
from criteo import data as data_module
from criteo import model, ranks, scan
from criteo.config import parse
from criteo.data import Batches, Days, find_days
from criteo.loop import Loop
from criteo.monitor import Monitor
from examples import ranks as group
from examples.checkpoint import Checkpoints, NotSaved
from examples.ranks import gather
from examples.training import Figures, Training
from torchrec_freq import FrequencyConfig, row_counts, save_counts

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS = [3 + 2 * table for table in range(CAT_FEATURE_COUNT)]
DAYS, SAMPLES = 3, 98  # the last day's halves do not fill batches: 49 = 3 * 16 + 1
BATCH, EPOCHS = 16, 2
STEPS = EPOCHS * ((DAYS - 1) * SAMPLES // BATCH)
CPU = torch.device("cpu")
TIMEOUT_SECONDS = 120

# One server for all tests: the program imports what the others ask for, and more.
multiprocessing.get_context("forkserver").set_forkserver_preload(["criteo.__main__", "pytest"])


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
    assert sum(path.endswith(".row_counter") for path in tensors) == CAT_FEATURE_COUNT
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


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the data and of an undisturbed run on 2 ranks, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("reference")
    write(folder / "data")
    make_reference(folder=folder)
    return folder


class Launch:
    """The program under torchrun."""

    def __init__(self, folder: Path, out: Path, *torchrun: str) -> None:
        self.out = out
        out.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", *torchrun, "-m", "criteo"]
        command += arguments(folder, out, "--checkpoint.keep", "100", "--data.threads", "1")
        self.log = (out / "log.txt").open("w+")
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def wait_for(self, step: int) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (self.out / "checkpoints" / f"step-{step:08}").exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.printed()
            time.sleep(0.002)

    def ranks(self) -> list[int]:
        """Process ids: torchrun's children that run the program."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = children.read_text().split()
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
        return [int(pid) for pid in pids if b"criteo" in commands[pid]]

    def wait(self) -> int:
        try:
            return self.process.wait(TIMEOUT_SECONDS)
        finally:
            self.process.kill()

    def printed(self) -> str:
        self.log.seek(0)
        return self.log.read()


def test_under_torchx(reference: Path, tmp_path: Path) -> None:
    """As the README says, to the end: the same as on two ranks that were started by hand."""
    out = tmp_path / "out"
    more = ("--checkpoint.keep", "100")
    launched = run_locally(
        REPOSITORY,
        tmp_path / "torchx",
        *("-j", "1x2", "--", *arguments(reference / "data", out, *more)),
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert_same(out, reference / "out")
    ours, theirs = scalars(out), scalars(reference / "out")
    assert ours.keys() == theirs.keys() > {"train/loss", "test/auc"}
    assert ours["test/auc"] == theirs["test/auc"]


def test_killed_rank_restarts(reference: Path, tmp_path: Path) -> None:
    """To the end under torchrun, with a rank killed on the way: as if nothing had happened."""
    out = tmp_path / "out"
    launch = Launch(reference / "data", out, "--max-restarts", "1")
    launch.wait_for(6)
    ranks = launch.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert launch.wait() == 0, launch.printed()
    assert launch.printed().count("Resumed from") == 1
    assert_same(out, reference / "out")

    summary = json.loads((out / "summary.json").read_text())
    expected = json.loads((reference / "out" / "summary.json").read_text())
    assert summary["curve"] == expected["curve"]
    assert [point["step"] for point in summary["curve"]] == [6, 12, 18, STEPS]
    assert summary["steps"] == STEPS and summary["samples"] == STEPS * BATCH
    assert summary["optimizer_bytes_per_row"] == expected["optimizer_bytes_per_row"]
    assert summary["ranks"] == 2
    for line in (f"| steps | {STEPS} |", f"| test AUC | {summary['test']['auc']:.4f} |"):
        assert line in launch.printed()

    figures, undisturbed = scalars(out), scalars(reference / "out")
    assert list(figures["train/loss"]) == list(range(2, STEPS + 1, 2))
    for tag in ("train/loss", "train/lr", "valid/auc", "valid/log_loss", "test/auc"):
        assert figures[tag] == undisturbed[tag], tag
    assert figures["test/auc"] == {STEPS: pytest.approx(summary["test"]["auc"])}
    assert min(figures["train/samples_per_second"].values()) > 0


def test_figures_of_the_tables(reference: Path) -> None:
    """Those that TensorBoard has at the end, from the counters of the checkpoint."""
    figures, tensors = scalars(reference / "out"), content(reference / "out")
    for name in DEFAULT_CAT_NAMES:
        (counts,) = (tensors[path] for path in tensors if path.endswith(f"/{name}.row_counter"))
        assert list(figures[f"{name}/lookups"]) == [6, 12, 18, STEPS]
        assert figures[f"{name}/lookups"][STEPS] == counts.sum() == STEPS * BATCH
        most = float(counts.max())
        assert figures[f"{name}/count_max"][STEPS] == most
        # The row's own square is taken for that of an occurrence: own_weight of its counts.
        root = math.sqrt((most + FrequencyConfig().own_weight) / 2)
        rate = 0.05 / root / figures[f"{name}/scale"][STEPS]
        assert figures[f"{name}/lr_at_max"][STEPS] == pytest.approx(rate, rel=1e-4)


@on_ranks(2)
def resume(folder: Path, out: Path) -> None:
    run(folder, out)


def test_sigterm_of_torchrun(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    launch = Launch(reference / "data", out)
    launch.wait_for(4)
    launch.process.terminate()
    assert launch.wait() != 0
    printed = launch.printed()
    last = max(path.name for path in (out / "checkpoints").glob("step-*"))
    assert f"after step {int(last.removeprefix('step-'))}: saved" in printed, printed
    assert printed.count("Stopped by SIGTERM") == 1
    assert not (out / "summary.json").exists()
    resume(folder=reference / "data", out=out)
    assert_same(out, reference / "out")
    curves = [
        json.loads((folder / "summary.json").read_text())["curve"]
        for folder in (out, reference / "out")
    ]
    assert curves[0] == curves[1]


@on_ranks(2)
def test_sigterm_of_one_rank(reference: Path, tmp_path: Path) -> None:
    """All ranks stop, at the same step, with SIGTERM's exit code."""
    out = tmp_path / "out"
    save = Loop._save

    def save_and_terminate(loop: Loop) -> None:
        save(loop)
        if dist.get_rank() == 1 and loop.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Loop, "_save", save_and_terminate)
        run(reference / "data", out, "--evaluation.every", "null")
    assert stopped.value.code == 143
    assert {path.name for path in (out / "checkpoints").iterdir()} == {
        "step-00000004",
        "step-00000006",
    }
    assert_same(out, reference / "out", step=6)


@on_ranks(2)
def test_sigterm_while_evaluating(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    update = BinaryAUROC.update
    calls: list[None] = []

    def terminate(metric: Any, *values: Any) -> None:
        update(metric, *values)
        calls.append(None)
        if dist.get_rank() == 0 and len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    more = ["--checkpoint.minutes", "100"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(BinaryAUROC, "update", terminate)
        run(reference / "data", out, *more)
    assert len(calls) == 2  # of 3 batches: log_every
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000006"]
    dist.barrier()
    # The evaluation that was cut off is made up for.
    curve = run(reference / "data", out, *more)["curve"]
    assert curve == json.loads((reference / "out" / "summary.json").read_text())["curve"]


@on_ranks(1)
def test_other_number_of_ranks(reference: Path, tmp_path: Path) -> None:
    """Resumed on 1 rank, or on 1 rank from the start: as on 2."""
    resumed = tmp_path / "resumed"
    name = f"step-{STEPS // 2:08}"
    shutil.copytree(reference / "out" / "checkpoints" / name, resumed / "checkpoints" / name)
    expected = json.loads((reference / "out" / "summary.json").read_text())
    for out in (resumed, tmp_path / "anew"):
        summary = run(reference / "data", out)
        assert summary["steps"] == STEPS and summary["ranks"] == 1
        for got, wanted in zip(summary["curve"], expected["curve"], strict=True):
            for split in wanted.keys() - {"step"}:
                assert got[split] == pytest.approx(wanted[split], abs=1e-6)
        ours, theirs = content(out), content(reference / "out")
        for path, tensor in theirs.items():
            if path.endswith(".row_counter"):
                assert torch.equal(ours[path], tensor)
            elif path.startswith("/model"):
                torch.testing.assert_close(ours[path], tensor, rtol=0, atol=1e-6)


@on_ranks(2)
def test_finished_and_prolonged(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(reference / "data", out, "--epochs", "1", "--checkpoint.minutes", "9")
    assert first["steps"] == STEPS // 2
    again = run(reference / "data", out, "--epochs", "1", "--checkpoint.minutes", "9")
    assert again == first  # nothing is left to train
    # What has no part in the result may change.
    summary = run(reference / "data", out, "--log_every", "5", "--evaluation.samples", "20")
    assert_same(out, reference / "out")
    expected = json.loads((reference / "out" / "summary.json").read_text())
    points, wanted = ({p["step"]: p for p in s["curve"]} for s in (summary, expected))
    assert points[STEPS] == wanted[STEPS]
    assert points[18] != wanted[18]  # on fewer samples
    with pytest.raises(ValueError, match=rf"{STEPS} steps old, more than this run has \(12\)"):
        run(reference / "data", out, "--max_steps", "12")
    with pytest.raises(ValueError, match=r"optimizer\.lr was 0\.05, is 0\.1; seed was 0, is 1"):
        run(reference / "data", out, "--optimizer.lr", "0.1", "--seed", "1")


# -- data


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


# -- model and loop


def built(folder: Path, out: Path, *more: str) -> Training:
    return model.build(parse(arguments(folder, out, *more)), ROWS, CPU)


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
    with pytest.raises(ValueError, match="No such file"):
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


# -- settings

GIVEN = ["--data.folder", "data"]
REFUSED = [
    ([], "No data: give data.folder, or data.synthetic"),
    (["--data.synthetic", "99"], '"data.synthetic".*v>=100'),
    ([*GIVEN, "--data.rows", "[1, 2]"], "data.rows must be 26 numbers, one a table; got 2"),
    ([*GIVEN, "--data.rows", str([0] * 26)], '"data.rows".* 0 .* v>=1'),
    ([*GIVEN, "--data.max_rows", "0"], '"data.max_rows".*v>=1'),
    ([*GIVEN, "--data.threads", "0"], '"data.threads".*v>=1'),
    ([*GIVEN, "--data.scan", "false"], "give data.rows"),
    (
        [*GIVEN, "--data.rows", str(ROWS), "--data.scan", "false", "--data.bad_rows", "skip"],
        "data.bad_rows=skip needs data.scan",
    ),
    ([*GIVEN, "--data.bad_rows", "fix"], "data.bad_rows"),
    ([*GIVEN, "--model.dim", "6"], "model.dim must be a multiple of 4"),
    ([*GIVEN, "--model.top", "[8, 0]"], '"model.top".* 0 .*v>=1'),
    ([*GIVEN, "--model.dcn_rank", "4"], "are for model.kind=DLRM_DCN"),
    ([*GIVEN, "--model.kind", "DLRM_DCN"], "needs model.dcn_layers and model.dcn_rank"),
    ([*GIVEN, "--optimizer.name", "Adam"], "optimizer.name"),
    ([*GIVEN, "--optimizer.lr", ".inf"], '"optimizer.lr".*inf'),
    ([*GIVEN, "--optimizer.warmup", "-1"], '"optimizer.warmup".* -1 .*v>=0'),
    ([*GIVEN, "--optimizer.frequency.half_life", "0"], "Invalid half_life value: 0"),
    (
        [*GIVEN, "--optimizer.name", "SGD", "--optimizer.frequency.own_weight", "2"],
        "optimizer.frequency is for FrequencySGD",
    ),
    ([*GIVEN, "--optimizer.frequency.count", "frozen"], "needs the file planner.counts"),
    ([*GIVEN, "--planner.sharding", "[rows]"], '"planner.sharding".*table_wise'),
    ([*GIVEN, "--planner.kernels", "[]"], "planner.kernels must not be empty"),
    ([*GIVEN, "--planner.hbm_gb", "0"], '"planner.hbm_gb".*v>0'),
    (
        [*GIVEN, "--planner.sharding", "[data_parallel]", "--optimizer.name", "SGD"],
        "does not train data_parallel tables with SGD",
    ),
    ([*GIVEN, "--evaluation.thresholds", "1"], '"evaluation.thresholds".*v>=2'),
    ([*GIVEN, "--evaluation.samples", "9"], "give evaluation.every"),
    ([*GIVEN, "--checkpoint.minutes", "-1"], '"checkpoint.minutes".* -1 .*v>=0'),
    ([*GIVEN, "--checkpoint.keep", "0"], '"checkpoint.keep".*v>=1'),
    ([*GIVEN, "--batch_size", "0"], '"batch_size".* 0 .*v>=1'),
    ([*GIVEN, "--batch_size", "many"], "batch_size"),
    ([*GIVEN, "--model.dim", "null"], "model.dim"),
    ([*GIVEN, "--model.bottom", "[8, null]"], "model.bottom"),
    ([*GIVEN, "--seed", str(2**64)], '"seed".*v<='),
    ([*GIVEN, "--batch_size", str(10**400)], '"batch_size".*v<='),
    ([*GIVEN, "--checkpoint.not_saved", "maybe"], "checkpoint.not_saved"),
    ([*GIVEN, "--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_refused_settings(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(flags)
    assert re.search(message, str(error.value), re.DOTALL)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("data: null", "data must be a section of settings; got None"),
        ("data: 3", "data must be a section of settings; got 3"),
        ("data: {synthetic: 500}\nmodel: []", "model must be a section of settings; got []"),
        (
            "data: {synthetic: 500}\noptimizer: {frequency: null}",
            "optimizer.frequency must be a section of settings; got None",
        ),
        ("data: {synthetic: 500}\nepochs: null", '"epochs"'),
        ("data: {synthetic: 500}\nmodel: {dim: null}", '"model.dim"'),
        ("data: {synthetic: 500}\nepochs: [1]", "epochs"),
        ("data: &a [*a]", "refers to itself"),
        ("null", "null"),
        ("", "config"),
        ("data: [", "config"),
        ("\udcff", "utf-8"),
    ],
)
def test_refused_yaml(tmp_path: Path, yaml: str, message: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml, errors="surrogateescape")
    with pytest.raises(ValueError) as error:
        parse(["--config", str(file)])
    assert message in str(error.value)


def test_yaml_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("batch_size: 64\ndata: {synthetic: 500}\noptimizer: {lr: 1, warmup: 3}\n")
    settings = parse(["--config", str(file), "--optimizer.lr", "0.2", "--seed", "4"])
    assert (settings.batch_size, settings.seed, settings.log_every) == (64, 4, 50)
    assert (settings.optimizer.lr, settings.optimizer.warmup) == (0.2, 3)
    assert settings.data.path == Path(".data/criteo-synthetic-500")
    file.write_text("data: {synthetic: 500, foldr: x}\n")
    with pytest.raises(ValueError, match="foldr"):
        parse(["--config", str(file)])
    with pytest.raises(ValueError, match="none.yaml"):
        parse(["--config", str(tmp_path / "none.yaml")])


@contextlib.contextmanager
def full_disk(step: int) -> Iterator[None]:
    """Rank 1 has no space left for the checkpoint of a step."""
    save, file = Checkpoints.save, io.FileIO

    def spoiled(checkpoints: Checkpoints, saved: int, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if saved == step and dist.get_rank() == 1:
                patch.setattr(io, "FileIO", lambda path, mode: file("/dev/full", mode))
            save(checkpoints, saved, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", spoiled)
        yield


@on_ranks(2)
def test_a_full_disk_while_training(reference: Path, tmp_path: Path) -> None:
    """It stops with the last good checkpoint, or goes on without one, as it is told."""
    with full_disk(4), pytest.raises(NotSaved, match="000004 is not saved: .*No space left"):
        run(reference / "data", tmp_path / "stop")
    dist.barrier()
    assert os.listdir(tmp_path / "stop" / "checkpoints") == ["step-00000002"]
    more = ("--checkpoint.not_saved", "go_on", "--checkpoint.keep", "100")
    with full_disk(4), contextlib.redirect_stdout(io.StringIO()) as printed:
        run(reference / "data", tmp_path / "go_on", *more)
    said = printed.getvalue()
    assert ("000004 is not saved: on rank 1: " in said) == (dist.get_rank() == 0)
    steps = {path.name for path in (tmp_path / "go_on" / "checkpoints").iterdir()}
    wanted = {path.name for path in (reference / "out" / "checkpoints").iterdir()}
    assert steps == wanted - {"step-00000004"}
    assert_same(tmp_path / "go_on", reference / "out")
    # The last one must be saved, whatever is told.
    with full_disk(STEPS), pytest.raises(NotSaved):
        run(reference / "data", tmp_path / "end", *more)


@on_ranks(1)
def test_figures_that_cannot_be_kept(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "tensorboard", 0)
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        mock.patch.object(SummaryWriter, "add_scalar", side_effect=OSError(28, "No space left")),
    ):
        for step in (1, 2):
            monitor.log(step, {"loss": 1.0})
        monitor.flush()
        monitor.close()
    assert printed.getvalue().count("no more figures are kept: [Errno 28] No space left") == 1


def spoil_checkpoints(reference: Path, folder: Path) -> list[str]:
    for step in (2, 4):
        name = f"step-{step:08}"
        shutil.copytree(reference / "out" / "checkpoints" / name, folder / "checkpoints" / name)
        (folder / "checkpoints" / name / ".metadata").write_bytes(b"")
    return arguments(reference / "data", folder)


# What is wrong: flags for it, made by rank 0, and what is said.
WRONG: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    "no data": (lambda r, f: arguments(f / "none", f), "none: no such folder"),
    "a file": (lambda r, f: arguments(r / "data" / "day_0_dense.npy", f), "no such folder"),
    "batch": (
        lambda r, f: arguments(r / "data", f, "--batch_size", "1000"),
        "batch_size 1000 is more than the",
    ),
    "out": (lambda r, f: arguments(f / "none", Path("/dev/null")), "a folder: '/dev/null'"),
    "checkpoints": (spoil_checkpoints, "None of the checkpoints"),
    "settings": (
        lambda r, f: arguments(r / "data", r / "out", "--seed", "3"),
        "comes from a run with other settings: seed was 0, is 3",
    ),
    "loss": (
        lambda r, f: arguments(r / "data", f, "--optimizer.lr", "1e30"),
        "The training loss is",
    ),
}


@pytest.mark.parametrize("what", WRONG)
@on_ranks(2)
def test_what_cannot_be_trained_on_is_said_in_a_line(
    what: str, reference: Path, tmp_path: Path
) -> None:
    make, message = WRONG[what]
    rank = dist.get_rank()
    flags = make(reference, tmp_path / "out") if rank == 0 else None
    (flags,) = (f for f in gather(flags) if f is not None)
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(io.StringIO()) as said,
        pytest.raises(SystemExit) as stopped,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["train", *flags])
        patch.setattr(group, "connect", lambda backend: None)
        program.main()
    assert stopped.value.code == 2
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    assert len(errors) == (rank == 0), said.getvalue()
    assert "Traceback" not in said.getvalue()
    if rank == 0:
        assert message in errors[0]


@on_ranks(2)
def test_another_rank_with_another_error_says_so(tmp_path: Path) -> None:
    rank = dist.get_rank()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        ranks.say_error(f"of rank {rank}\nalone")
    assert said.getvalue() == f"error: of rank {rank} alone\n"


def test_the_image_has_all_that_is_imported(tmp_path: Path) -> None:
    for line in (REPOSITORY / "launch" / "Dockerfile.dockerignore").read_text().splitlines():
        if line.startswith("!"):
            (tmp_path / line[1:]).symlink_to(REPOSITORY / line[1:])
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import criteo.__main__"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["smoke", "criteo"])
def test_shipped_settings(name: str) -> None:
    file = REPOSITORY / "criteo" / f"{name}.yaml"
    settings = parse(["--config", str(file), *GIVEN])
    settings.for_ranks(2)
    settings.for_ranks(8)


def test_batch_of_all_ranks() -> None:
    settings = parse([*GIVEN, "--batch_size", "64"])
    settings.for_ranks(4)
    with pytest.raises(ValueError, match="batch_size 64 is not a multiple of the 3 ranks. Try 63"):
        settings.for_ranks(3)
    settings = parse([*GIVEN, "--evaluation.batch_size", "3"])
    with pytest.raises(ValueError, match=r"evaluation\.batch_size 3 is less than the 4 ranks"):
        settings.for_ranks(4)


def test_main_without_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for flags, message in (([], "No data"), (GIVEN, "Start it with torchrun")):
        monkeypatch.setattr(sys, "argv", ["train", *flags])
        with pytest.raises(SystemExit) as stopped:
            program.main()
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "left"), [(None, True), (SystemExit(143), True), (ValueError("one rank's"), False)]
)
def test_main_leaves_the_group(
    end: BaseException | None, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end and after SIGTERM, but not after an error: NCCL would wait for the other ranks."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train", *GIVEN])
    calls: list[str] = []

    def train(*_: object) -> None:
        if end is not None:
            raise end

    monkeypatch.setattr(program, "train", train)
    monkeypatch.setattr(group, "connect", lambda backend: None)
    monkeypatch.setattr(group, "logging", mock.Mock())  # whose levels it would set
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, functools.partial(calls.append, name))
    with contextlib.suppress(SystemExit, ValueError):
        program.main()
    assert ("destroy_process_group" in calls) == left


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    printed = capsys.readouterr().out
    for flag in ("--data.folder", "--optimizer.lr", "--checkpoint.minutes"):
        assert flag in printed
    assert "samples a step, all ranks" in " ".join(printed.split())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(reference: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "1", "-m", "criteo"]
    command += arguments(reference / "data", tmp_path / "out")
    for more in (["--max_steps", "12"], []):  # the second run resumes
        subprocess.run([*command, *more], cwd=REPOSITORY, check=True, timeout=240)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    expected = json.loads((reference / "out" / "summary.json").read_text())
    assert summary["device"] == "cuda" and summary["steps"] == STEPS
    # Its first weights are drawn by another generator.
    assert summary["test"]["log_loss"] == pytest.approx(expected["test"]["log_loss"], abs=0.1)
