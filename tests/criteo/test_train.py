"""The training program: restarted, stopped, prolonged, on other numbers of ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from criteo_runs import (
    BATCH,
    REPOSITORY,
    STEPS,
    TIMEOUT_SECONDS,
    arguments,
    assert_same,
    content,
    run,
    scalars,
)
from ranks import on_ranks
from torchmetrics.classification import BinaryAUROC
from torchx_runs import run_locally

from examples.criteo.loop import Loop


class Launch:
    """The program under torchrun."""

    def __init__(self, folder: Path, out: Path, *torchrun: str) -> None:
        self.out = out
        out.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", *torchrun, "-m", "examples.criteo"]
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
        return [int(pid) for pid in pids if b"examples.criteo" in commands[pid]]

    def wait(self) -> int:
        try:
            return self.process.wait(TIMEOUT_SECONDS)
        finally:
            self.process.kill()

    def printed(self) -> str:
        self.log.seek(0)
        return self.log.read()


@pytest.mark.slow
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
    for line in (f"| steps | {STEPS} |", f"| test, auc | {summary['test']['auc']:.4f} |"):
        assert line in launch.printed()

    figures, undisturbed = scalars(out), scalars(reference / "out")
    assert list(figures["train/loss"]) == list(range(2, STEPS + 1, 2))
    for tag in ("train/loss", "train/lr", "valid/auc", "valid/log_loss", "test/auc"):
        assert figures[tag] == undisturbed[tag], tag
    # Those of the tables come from the counters.
    assert figures["cat_3/lookups"] == {step: step * BATCH for step in (6, 12, 18, STEPS)}


@on_ranks(2)
def resume(folder: Path, out: Path) -> None:
    run(folder, out)


@pytest.mark.slow
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
def test_resumed_on_another_number_of_ranks(reference: Path, tmp_path: Path) -> None:
    name = f"step-{STEPS // 2:08}"
    shutil.copytree(reference / "out" / "checkpoints" / name, tmp_path / "checkpoints" / name)
    expected = json.loads((reference / "out" / "summary.json").read_text())
    summary = run(reference / "data", tmp_path)
    assert summary["steps"] == STEPS and summary["ranks"] == 1
    for got, wanted in zip(summary["curve"], expected["curve"], strict=True):
        for split in wanted.keys() - {"step"}:
            assert got[split] == pytest.approx(wanted[split], abs=1e-6)
    ours, theirs = content(tmp_path), content(reference / "out")
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(reference: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "1", "-m", "examples.criteo"]
    command += arguments(reference / "data", tmp_path / "out")
    for more in (["--max_steps", "12"], []):  # the second run resumes
        subprocess.run([*command, *more], cwd=REPOSITORY, check=True, timeout=240)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    expected = json.loads((reference / "out" / "summary.json").read_text())
    assert summary["device"] == "cuda" and summary["steps"] == STEPS
    # Its first weights are drawn by another generator.
    assert summary["test"]["log_loss"] == pytest.approx(expected["test"]["log_loss"], abs=0.1)
