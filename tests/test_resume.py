"""The demo's checkpoints: killed and resumed runs end as uninterrupted ones; only whole ones count.

The ranks are forked from a server that has imported the demo, not started by torchrun, so that the
test can kill all of them at once and a start takes a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_demo import RATINGS, write_recbole
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from examples import dlrm
from examples.checkpoint import MANIFEST, Checkpoints

BATCH = 8
EPOCHS = 3
STEPS = EPOCHS * (RATINGS * 8 // 10 // BATCH)
EVERY = 7  # not where the curve has its points
SIGKILLED = -9
# Methods of DCP's writer to get stuck in, and the last file that they write: rank 1's data, and the
# metadata of all, with which DCP's own part of a checkpoint is complete.
STUCK = {"write_data": "__1_0.distcp", "finish": ".metadata"}
TIMEOUT_SECONDS = 60

_context = multiprocessing.get_context("forkserver")
# One server for all tests: the demo imports what `ranks` asks for, and more.
_context.set_forkserver_preload(["examples.dlrm", "pytest"])


@dataclass
class Run:
    """A run of the demo: its ranks, each a process, and the file that they print to."""

    ranks: list[Any]
    log: Path

    def wait(self) -> list[int]:
        """The exit codes."""
        for rank in self.ranks:
            rank.join(TIMEOUT_SECONDS)
        codes = [rank.exitcode for rank in self.ranks]
        self.kill()
        return codes

    def wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not reached():
            assert all(rank.is_alive() for rank in self.ranks), self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.002)

    def kill(self) -> list[int]:
        for rank in self.ranks:
            rank.kill()  # SIGKILL
        for rank in self.ranks:
            rank.join()
        return [rank.exitcode for rank in self.ranks]

    def printed(self) -> str:
        return self.log.read_text().replace("\r", "\n")


def start(folder: Path, *flags: str, ranks: int = 2, stuck_in: str | None = None) -> Run:
    """Starts the demo on the ratings in `folder`, where it also writes.

    Args:
        stuck_in: the key of `STUCK` whose second call does not return.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = ["--data", str(folder / "data"), "--out", str(folder), "--batch-size", str(BATCH)]
    command += ["--epochs", str(EPOCHS), *flags]
    log = folder / "log.txt"
    log.write_text("")
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "CUDA_VISIBLE_DEVICES": "",  # the CPU path, wherever the test runs
        }
        arguments = (environment, log, command, stuck_in)
        processes.append(_context.Process(target=run_rank, args=arguments, daemon=True))
        processes[-1].start()
    return Run(processes, log)


def run_rank(
    environment: dict[str, str], log: Path, command: list[str], stuck_in: str | None
) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.argv = ["dlrm.py", *command]
    if stuck_in == "finish" or (stuck_in == "write_data" and environment["RANK"] == "1"):
        get_stuck(stuck_in)
    dlrm.main()


def get_stuck(method: str) -> None:
    whole, calls = getattr(FileSystemWriter, method), []

    def stuck(*args: Any, **kwargs: Any) -> Any:
        result = whole(*args, **kwargs)
        calls.append(method)
        if len(calls) == 2:
            time.sleep(2 * TIMEOUT_SECONDS)
        return result

    setattr(FileSystemWriter, method, stuck)


def run(folder: Path, *flags: str, ranks: int = 2) -> dict[str, Any]:
    """The results of a run to the end, without the timings."""
    running = start(folder, *flags, ranks=ranks)
    assert running.wait() == [0] * ranks, running.printed()
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    for arm in results["arms"].values():
        del arm["seconds_per_step"]
    return results


def saving(folder: Path, every: int) -> list[str]:
    return ["--checkpoint-dir", str(folder / "checkpoints"), "--checkpoint-every", str(every)]


def steps_saved(folder: Path) -> list[int]:
    paths = (folder / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in paths)


def content(folder: Path, step: int = STEPS) -> dict[str, bytes]:
    """All tensors of a checkpoint, whole ones, bit by bit."""
    file = folder / "checkpoint.pt"
    dcp_to_torch_save(folder / "checkpoints" / f"step-{step:08}", file)
    tensors: dict[str, bytes] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                add(f"{path}/{key}", entry)
        else:
            assert isinstance(value, torch.Tensor), path
            tensors[path] = value.detach().numpy().tobytes()

    add("", torch.load(file))
    return tensors


def counters(tensors: dict[str, bytes]) -> dict[str, bytes]:
    return {path: value for path, value in tensors.items() if path.endswith(".row_counter")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run, with a checkpoint in its middle and one at its end."""
    folder = make_folder(tmp_path_factory.mktemp("reference"))
    results = run(folder, *saving(folder, STEPS // 2))
    assert steps_saved(folder) == [STEPS // 2, STEPS]
    (folder / "expected.json").write_text(json.dumps(results))
    return folder


def expected(reference: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((reference / "expected.json").read_text())
    return results


def make_folder(folder: Path) -> Path:
    (folder / "data").mkdir()
    write_recbole(folder / "data")
    return folder


def resumable(reference: Path, folder: Path) -> Path:
    """A folder with the data and the first checkpoint of the reference."""
    name = f"step-{STEPS // 2:08}"
    shutil.copytree(reference / "checkpoints" / name, folder / "checkpoints" / name)
    return make_folder(folder)


def test_saving_changes_nothing(reference: Path, tmp_path: Path) -> None:
    results = run(make_folder(tmp_path))
    assert results == expected(reference)
    assert set(results["lookups"].values()) == {STEPS * BATCH, 2 * STEPS * BATCH}
    assert not (tmp_path / "checkpoints").exists()


def test_killed_and_resumed(reference: Path, tmp_path: Path) -> None:
    """Killed at random, and while a checkpoint is written, then resumed: the same bit by bit."""
    folder = make_folder(tmp_path)
    flags = saving(folder, EVERY)
    chance = random.Random(0)
    last = 0
    for stuck_in in (None, "write_data", None, "finish", None):
        running = start(folder, *flags, stuck_in=stuck_in)
        running.wait_until((folder / "checkpoints" / f"step-{last + EVERY:08}").exists)
        if stuck_in is None:
            time.sleep(chance.uniform(0, 0.15))
        else:
            writing = folder / "checkpoints" / f"writing-step-{last + 2 * EVERY:08}"
            running.wait_until((writing / STUCK[stuck_in]).exists)
        assert running.kill() == [SIGKILLED] * 2, running.printed()
        if stuck_in is not None:
            assert writing.exists() and steps_saved(folder)[-1] == last + EVERY
        assert ("Resumed from" in running.printed()) == (last > 0)
        last = steps_saved(folder)[-1]
    assert last < STEPS - EVERY

    results = run(folder, *flags)
    assert f"step-{last:08}, after {last} steps." in (folder / "log.txt").read_text()
    assert results == expected(reference)
    got, wanted = content(folder), content(reference)
    assert got.keys() == wanted.keys()
    assert [path for path in wanted if got[path] != wanted[path]] == []
    assert len(counters(wanted)) == len(results["tables"])
    assert steps_saved(folder) == [STEPS - STEPS % EVERY, STEPS]
    assert not list((folder / "checkpoints").glob("writing-*"))

    # The end is a checkpoint, too: nothing is left to train.
    assert run(folder, *flags) == results


def test_resumed_on_another_number_of_ranks(reference: Path, tmp_path: Path) -> None:
    folder = resumable(reference, tmp_path)
    results = run(folder, *saving(folder, STEPS), ranks=1)
    assert f"after {STEPS // 2} steps." in (folder / "log.txt").read_text()
    assert results["lookups"] == expected(reference)["lookups"]
    for name, arm in expected(reference)["arms"].items():
        for got, wanted in zip(results["arms"][name]["curve"], arm["curve"], strict=True):
            assert got["step"] == wanted["step"]
            assert got["valid"] == pytest.approx(wanted["valid"], abs=1e-5)
            assert got["test"] == pytest.approx(wanted["test"], abs=1e-5)
    assert counters(content(folder)) == counters(content(reference))


def test_other_settings_are_refused(reference: Path, tmp_path: Path) -> None:
    folder = resumable(reference, tmp_path)
    flags = saving(folder, STEPS)
    running = start(folder, *flags, "--batch-size", "16", "--seed", "1")
    assert running.wait() == [1, 1]
    assert running.printed().count("batch size was 8, is 16; seed was 0, is 1.") == 2

    running = start(folder, *flags, "--epochs", "1", ranks=1)
    assert running.wait() == [1]
    assert f"{STEPS // 2} steps old, more than --epochs 1" in running.printed()
    assert steps_saved(folder) == [STEPS // 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "3"], "need --checkpoint-dir"),
        (["--checkpoint-dir", "c", "--keep", "0"], "--keep must be at least 1, not 0"),
        (["--checkpoint-dir", "c", "--checkpoint-every", "0"], "must be at least 1, not 0"),
    ],
)
def test_flags_are_refused(
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["dlrm.py", *flags])
    with pytest.raises(SystemExit):
        dlrm.parse_args()
    assert message in capsys.readouterr().err


def saved(folder: Path, steps: list[int], keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, settings={"lr": 0.1}, keep=keep)
    for step in steps:
        checkpoints.save(step, {"weights": torch.full((3,), step)}, {"at": step})
    return checkpoints


@on_ranks(2)
def test_keeps_the_last_ones(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2, 10, 11], keep=3)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000002", "step-00000010", "step-00000011"}
    latest = checkpoints.latest()
    assert latest is not None and (latest.step, latest.progress) == (11, {"at": 11})
    state = {"weights": torch.zeros(3, dtype=torch.int64)}
    checkpoints.load(latest, state)
    assert state["weights"].tolist() == [11] * 3


@on_ranks(1)
def test_nothing_to_keep(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "new", settings={}).latest() is None
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, settings={}, keep=0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "data cut": lambda folder: cut(folder / "__0_0.distcp"),
    "data missing": lambda folder: (folder / "__0_0.distcp").unlink(),
    "metadata cut": lambda folder: cut(folder / ".metadata"),
    "manifest cut": lambda folder: cut(folder / MANIFEST),
    "manifest missing": lambda folder: (folder / MANIFEST).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@on_ranks(2)
def test_damaged_ones_are_not_taken(damage: str, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2])
    if dist.get_rank() == 0:
        DAMAGES[damage](tmp_path / "step-00000002")
        shutil.copytree(tmp_path / "step-00000001", tmp_path / "writing-step-00000003")
        with pytest.warns(UserWarning, match="step-00000002 is not a whole checkpoint"):
            latest = checkpoints.latest()
    else:
        latest = checkpoints.latest()
    assert latest is not None and latest.step == 1
    # The next save of that step takes its place, and clears what a killed writer has left.
    saved(tmp_path, [2])
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 2
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}


@on_ranks(2)
def test_settings_must_agree(tmp_path: Path) -> None:
    saved(tmp_path, [1])
    other = Checkpoints(tmp_path, settings={"lr": 0.2, "seed": 0})
    with pytest.raises(ValueError, match=r"step-00000001 .*lr was 0\.1, is 0\.2; seed was None"):
        other.latest()
