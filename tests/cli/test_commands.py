"""What holds for every command: names made visible, outputs checked first, a clean end."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchrec_freq import save_counts
from torchrec_freq.__main__ import main
from torchrec_freq.analysis.traffic import TableTraffic
from torchrec_freq.cli.terminal import visible

HOSTILE = "a\x1b[2J\r\n\u202e|\x9b1m"
SHOWN = r"a\x1b[2J\r\n\u202e|\x9b1m"


def test_names_are_printed_visibly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("\ud800 \t日本 é") == r"\ud800 \t日本 é"
    counts, bad = tmp_path / "counts", tmp_path / "bad"
    for path in (counts, bad):
        save_counts(path, {HOSTILE: torch.tensor([1, 2, 3])})
    bad.write_bytes(bad.read_bytes()[:-4] + b"\1\2\3\4")
    np.save(tmp_path / "data.npy", np.ones((5, 26), np.int32))
    commands: list[tuple[int, list[Any]]] = [
        (0, ["report", counts, "-o", tmp_path / "page"]),
        (2, ["report", bad]),
        (2, ["report", tmp_path / HOSTILE]),
        (0, ["plan", f"{HOSTILE}=3x16", "--report", "--optimizer", "SGD"]),
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


WORK = {"report": (TableTraffic, "add"), "count": (np, "asarray")}


def outputs(folder: Path) -> dict[str, Callable[[Path], list[str]]]:
    """Commands by name, and the file that each of them is to write."""
    counts, data = folder / "counts", folder / "data.npy"
    save_counts(counts, {"a": torch.tensor([1, 2, 3])})
    np.save(data, np.ones((5, 26), np.int32))
    return {
        "report": lambda out: ["report", str(counts), "--json", str(out)],
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
    assert {path.name for path in tmp_path.iterdir()} == {"counts", "data.npy", "out", "link"}


# Stands still in its work, or while it writes.
WAITING = """
import os, signal, sys, time
from torchrec_freq import __main__
from torchrec_freq.analysis.traffic import TableTraffic
signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background of a shell
owner, name = (TableTraffic, "add") if sys.argv.pop(1) == "work" else (os, "fsync")
whole, calls = getattr(owner, name), []
def wait(*arguments, **options):
    calls.append(name)
    if name == "add" or len(calls) == 2:  # the first one is the check of the output
        print("waits", flush=True)
        time.sleep(60)
    return whole(*arguments, **options)
setattr(owner, name, wait)
sys.exit(__main__.run_program())
"""


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


def test_output_that_nobody_takes(tmp_path: Path) -> None:
    command = outputs(tmp_path)["report"](tmp_path / "out")
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full:
        for stdout, status in ((full, 2), (writing, 141)):
            done = subprocess.run(
                [sys.executable, "-m", "torchrec_freq", *command],
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
            )
            assert done.returncode == status
            assert ("No space left on device" in done.stderr) == (status == 2)
            assert done.stderr.count("\n") == (status == 2)
    os.close(writing)
