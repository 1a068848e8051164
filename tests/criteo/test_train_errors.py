"""What the training program says and does when it cannot go on."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from criteo_runs import GIVEN, REPOSITORY, arguments, assert_same, run
from programs import Program
from ranks import on_ranks
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.utils.tensorboard.writer import SummaryWriter

from benchmarks.common import ranks as group
from benchmarks.common.checkpoint import Checkpoints, NotSaved
from benchmarks.common.ranks import gather
from examples.criteo import __main__ as program
from examples.criteo.loop import Loop
from examples.criteo.progress import Monitor


@contextlib.contextmanager
def full_disk(step: int) -> Iterator[None]:
    """Rank 1 has no space left for the checkpoint of a step."""
    save = Checkpoints.save

    @contextlib.contextmanager
    def full(self: Any, path: Any, mode: str) -> Iterator[Any]:
        with open("/dev/full", mode) as stream:
            yield stream

    def spoiled(checkpoints: Checkpoints, saved: int, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if saved == step and dist.get_rank() == 1:
                patch.setattr(FileSystem, "create_stream", full)
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
    assert ("on rank 1: " in said and "000004 is not saved: " in said) == (dist.get_rank() == 0)
    steps = {path.name for path in (tmp_path / "go_on" / "checkpoints").iterdir()}
    wanted = {path.name for path in (reference / "out" / "checkpoints").iterdir()}
    assert steps == wanted - {"step-00000004"}
    assert_same(tmp_path / "go_on", reference / "out")


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
        lambda r, f: arguments(r / "data", f, "--optimizer.lr", "4e18"),
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
        for name in ("connect", "leave"):  # this is the group, and stays
            patch.setattr(group, name, lambda _: None)
        program.main()
    assert stopped.value.code == 2
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    assert len(errors) == (rank == 0), said.getvalue()
    assert "Traceback" not in said.getvalue()
    if rank == 0:
        assert message in errors[0], errors


def test_the_image_has_all_that_is_imported(tmp_path: Path) -> None:
    for line in (REPOSITORY / "launch" / "Dockerfile.dockerignore").read_text().splitlines():
        if line.startswith("!"):
            (tmp_path / line[1:]).parent.mkdir(exist_ok=True)
            (tmp_path / line[1:]).symlink_to(REPOSITORY / line[1:])
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import examples.criteo.__main__"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


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


def count_threads_at_the_end() -> None:
    def count_threads() -> None:
        names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
        print(f"threads of gloo: {sum('gloo' in name for name in names)}", flush=True)

    util.Finalize(None, count_threads, exitpriority=0)


def terminate_when_saved() -> None:
    count_threads_at_the_end()
    save = Loop._save

    def save_and_terminate(loop: Loop) -> None:
        save(loop)
        os.kill(os.getpid(), signal.SIGTERM)

    mock.patch.object(Loop, "_save", save_and_terminate).start()  # in a process of its own


@pytest.mark.parametrize(
    ("more", "before", "code"),
    [
        (("--max_steps", "2"), count_threads_at_the_end, 0),
        ((), terminate_when_saved, 143),
        (("--optimizer.lr", "4e18"), count_threads_at_the_end, 2),
    ],
    ids=["end", "SIGTERM", "refused"],
)
def test_no_thread_of_the_group_is_left(
    reference: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    before: Callable[[], object],
    code: int,
) -> None:
    """Or the process may abort while the interpreter ends."""
    given = arguments(reference / "data", tmp_path / "out", *more)
    ended = Program("examples.criteo", given, ranks=2, before=before, OMP_NUM_THREADS="1")
    assert ended.wait() == [code, code], ended.printed
    assert ended.out.count("threads of gloo: ") == ended.out.count("threads of gloo: 0") == 2


@on_ranks(2)
def test_no_space_for_the_summary(reference: Path, tmp_path: Path) -> None:
    """All ranks end, and none waits for rank 0."""
    full = OSError(28, "No space left")
    with mock.patch.object(program, "write_text", side_effect=full):
        with pytest.raises(NotSaved, match="on rank 0: .*No space left") as caught:
            run(reference / "data", tmp_path / "out", "--max_steps", "2")
        assert caught.value.errno == 28
