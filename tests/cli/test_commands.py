"""What holds for every command: names made visible, outputs checked first, a clean end."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from torchrec_freq import save_counts
from torchrec_freq.__main__ import main
from torchrec_freq.analysis.traffic import TableTraffic
from torchrec_freq.cli import plan
from torchrec_freq.cli.terminal import VisibleFormatter, visible
from torchrec_freq.counts.files import load_counts

HOSTILE = "a\x1b[2J\r\n\u202e|\x9b1m"
SHOWN = r"a\x1b[2J\r\n\u202e|\x9b1m"

SPEC = """
batch_size = 8
tables = [{ name = "NAME", rows = 3, dim = 16 }]
[cluster]
ranks = 2
"""


def write_spec(path: Path, name: str = "a") -> Path:
    path.write_text(SPEC.replace('"NAME"', json.dumps(name)))
    return path


def test_visible() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("\ud800 \t日本 é") == r"\ud800 \t日本 é"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_names_are_printed_visibly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts, checkpoint = tmp_path / "counts", tmp_path / "checkpoint"
    save_counts(counts, {HOSTILE: torch.tensor([1, 2, 3])})
    key = f"optim.state.embeddings.{HOSTILE}.weight.{HOSTILE}.row_counter"
    dcp.save({key: torch.arange(3, dtype=torch.int32)}, checkpoint_id=checkpoint, no_dist=True)
    bad = tmp_path / "bad"
    save_counts(bad, {HOSTILE: torch.tensor([1, 2, 3])})
    bad.write_bytes(bad.read_bytes()[:-4] + b"\1\2\3\4")
    np.save(tmp_path / "data.npy", np.ones((5, 26), np.int32))
    spec = write_spec(tmp_path / "spec.toml", HOSTILE)
    other = write_spec(tmp_path / "other.toml", "other")
    commands: list[tuple[int, list[Any]]] = [
        (0, ["report", counts]),
        (0, ["report", checkpoint, "-o", tmp_path / "page"]),
        (2, ["report", bad]),
        (0, ["plan", spec, "--counts", counts, "--report", "--optimizer", "SGD"]),
        (2, ["plan", other, "--counts", counts]),
        (2, ["report", tmp_path / HOSTILE]),
        (0, ["count", tmp_path / "data.npy", "--rows", 9, "-o", tmp_path / f"out{HOSTILE}"]),
        (2, ["count", tmp_path / HOSTILE, "--rows", 9]),
    ]
    for status, arguments in commands:
        assert main([*map(str, arguments)]) == status
        captured = capsys.readouterr()
        printed = captured.out + captured.err
        assert all(visible(line) == line for line in printed.split("\n")), arguments
        assert captured.err.count("\n") == (status == 2)
        if arguments[0] == "report" and status == 0:
            assert f"| {SHOWN.replace('|', chr(92) + '|')} " in printed
    assert HOSTILE not in (tmp_path / "page" / "report.html").read_text()


def test_log_lines_are_visible() -> None:
    record = logging.LogRecord("name", 0, "path", 0, "one %s\ntwo", ("\x1b",), None)
    assert VisibleFormatter().format(record) == "one \\x1b\ntwo"


WORK = {"report": (TableTraffic, "of"), "plan": (plan, "plan"), "count": (np, "asarray")}


def outputs(folder: Path) -> dict[str, Callable[[Path], list[str]]]:
    """Commands by name, and the file that each of them is to write."""
    counts, data = folder / "counts", folder / "data.npy"
    save_counts(counts, {"a": torch.tensor([1, 2, 3])})
    np.save(data, np.ones((5, 26), np.int32))
    spec = write_spec(folder / "spec.toml")
    return {
        "report": lambda out: ["report", str(counts), "--json", str(out)],
        "plan": lambda out: ["plan", str(spec), "--json", str(out), "--optimizer", "SGD"],
        "count": lambda out: ["count", str(data), "--rows", "9", "-o", str(out)],
    }


@pytest.mark.parametrize("name", WORK)
def test_outputs_are_checked_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    command = outputs(tmp_path)[name]
    out = tmp_path / "out"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    with monkeypatch.context() as patched:
        patched.setattr(*WORK[name], never)
        for bad in ("/dev/null", str(tmp_path), str(tmp_path / "no" / "x"), str(out) + "日" * 100):
            assert main(command(Path(bad))) == 2
            error = capsys.readouterr().err
            assert bad in error and error.count("\n") == 1
        with pytest.raises(AssertionError, match="the work began"):
            main(command(out))
    # A disk that fills meanwhile leaves the old file.
    out.write_text("old")
    calls = itertools.count()
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(calls):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert main(command(out)) == 2
    assert f"No space left on device: '{out}'" in capsys.readouterr().err
    assert out.read_text() == "old"
    # A link is written through, and nothing else is left.
    link = tmp_path / "link"
    link.symlink_to(out)
    assert main(command(link)) == 0
    assert link.is_symlink() and out.read_bytes() != b"old"
    names = {"counts", "data.npy", "spec.toml", "out", "link"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_pages_of_names_that_are_long_in_bytes(tmp_path: Path) -> None:
    counts, out = tmp_path / "counts", tmp_path / "out"
    save_counts(counts, {"日本" * 50: torch.tensor([1, 2]), "é" * 300: torch.tensor([1])})
    assert main(["report", str(counts), "-o", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        f"02-{'日本' * 16}日.png",
        f"01-{'é' * 50}.png",
    }


def program(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torchrec_freq", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children are, also where this process was started in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Stands still in its work, or while it writes.
WAITING = """
import os, sys, time
from torchrec_freq import __main__
from torchrec_freq.analysis.traffic import TableTraffic
owner, name = (TableTraffic, "of") if sys.argv.pop(1) == "work" else (os, "fsync")
whole, calls = getattr(owner, name), []
def wait(*arguments, **options):
    calls.append(name)
    if name == "of" or len(calls) == 2:  # the first one is the check of the output
        print("waits", flush=True)
        time.sleep(60)
    return whole(*arguments, **options)
setattr(owner, name, wait)
sys.exit(__main__._main())
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("where", ["work", "write"])
def test_interrupted(tmp_path: Path, where: str) -> None:
    command = outputs(tmp_path)["report"]
    out = tmp_path / "out"
    out.write_text("old")
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, where, *command(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "waits\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "python -m torchrec_freq report: interrupted\n"
    assert out.read_text() == "old"
    assert not list(tmp_path.glob(".writing-*"))


# Imported by Python itself, before the program.
SLOW_IMPORT = """
import sys, time
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("waits", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.usefixtures("interruptible")
def test_interrupted_while_it_starts(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT)
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = program("doctor", cwd=root, env=env, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (-signal.SIGINT, "")


def test_output_that_nobody_takes(tmp_path: Path) -> None:
    command = outputs(tmp_path)["report"](tmp_path / "out")
    with open("/dev/full", "w") as full:
        process = program(*command, stdout=full)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "No space left on device" in error and error.count("\n") == 1
    reading, writing = os.pipe()
    os.close(reading)
    process = program(*command, stdout=writing)
    os.close(writing)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (141, "")


def test_a_file_of_counts_is_as_readable_as_before(tmp_path: Path) -> None:
    command, out = outputs(tmp_path)["count"], tmp_path / "out"
    assert main(command(out)) == 0
    out.chmod(0o600)
    assert main(command(out)) == 0
    assert out.stat().st_mode & 0o777 == 0o600
    assert load_counts(out).counts["t_cat_0"].tolist() == [0, 5] + [0] * 7
