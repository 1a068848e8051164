"""The report on GPUs, rehearsed on the CPU: what was measured, what was not, and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType

from benchmarks import bench, gpu

ENOUGH = 600.0  # seconds


def part(seconds: float = ENOUGH) -> gpu.Part:
    return gpu.Part(rehearse=True, deadline=time.monotonic() + seconds)


def without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the cases out that start processes."""
    run = "never started here"

    def refuse(*words: Any, **options: Any) -> str:
        raise RuntimeError(run)

    monkeypatch.setattr(gpu.Part, "run", refuse)


def test_report_is_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[bench.Result] = []
    bench_tbe = bench.bench_tbe

    def recorded(*arguments: Any) -> list[bench.Result]:
        measured.extend(results := bench_tbe(*arguments))
        return results

    monkeypatch.setattr(bench, "bench_tbe", recorded)
    without_ranks(monkeypatch)
    gpu.do("bench", ENOUGH, True, tmp_path)
    gpu.do("profile", ENOUGH, True, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    shapes = [str(shape) for shape in gpu.shapes(part(), 2)]
    found, page = report["bench"], (tmp_path / "report.md").read_text()
    assert sorted(found["done"]) == sorted(shapes) and len(shapes) == len(set(shapes)) > 30
    assert [entry for of in found["done"].values() for entry in of] == list(map(asdict, measured))
    assert len(measured) == len(shapes) * len(bench.TBE_OPTIMIZERS)
    assert bench.table(measured) in page
    # Nothing that was planned is passed over.
    assert {*found["done"], *found["left_out"]} == set(found["planned"])
    ranks = [name for name in found["left_out"] if name.startswith("sharded")]
    assert len(ranks) == 2 and all(
        f"- {name}: RuntimeError: never started" in page for name in ranks
    )
    for name, profile in report["profile"]["done"].items():
        assert bench.profile_table(profile) in page and name in shapes
    assert len(report["profile"]["done"]) == 3
    assert report["machine"]["system"] in page


@pytest.mark.parametrize("name", gpu.PARTS)
def test_what_is_not_reached_is_named(name: str, tmp_path: Path) -> None:
    gpu.do(name, 0, True, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())[name]
    assert report["planned"] and not report["done"]
    assert report["left_out"] == dict.fromkeys(report["planned"], gpu.NOT_REACHED)
    page = (tmp_path / "report.md").read_text()
    assert all(f"- {case}: {gpu.NOT_REACHED}" in page for case in report["planned"])


def test_an_optimizer_that_fails_does_not_take_the_others_along() -> None:
    shape = bench.Shape(tables=1, rows=20, dim=8, batch=4, ids=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.TBE_OPTIMIZERS, "Adagrad", EmbOptimType.NONE)
        failed: dict[str, str] = {}
        results = bench.bench_tbe(shape, torch.device("cpu"), 3, failed=failed)
        with pytest.raises(Exception, match="none|NONE|optimizer"):
            bench.bench_tbe(shape, torch.device("cpu"), 3)
    assert list(failed) == ["Adagrad"] and failed["Adagrad"]
    assert [r.optimizer for r in results] == [n for n in bench.TBE_OPTIMIZERS if n != "Adagrad"]


def test_tests_are_those_that_need_a_gpu() -> None:
    files = {Path(name).name: run for name, run in gpu.tests(part()).items()}
    assert {"test_engine_device.py", "test_sharding.py"} <= set(files)
    outcomes = files["test_engine_device.py"]()
    assert len(outcomes) > 10 and all("cuda" in name for name in outcomes)
    if not torch.cuda.is_available():
        assert set(outcomes.values()) == {"skipped: needs a CUDA device"}


def test_processes_end_with_their_time_and_say_what_was_wrong(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"timeit was ended: the time was over"):
        code = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(100)"
        part(3).run("timeit", "-n", 1, "-s", "import os, time", code)
    assert time.monotonic() - start < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    with pytest.raises(RuntimeError, match=r"ended with 1: .*No module named nothing_at_all"):
        part().run("nothing_at_all")
    with pytest.raises(RuntimeError, match=r"ended with 1: ZeroDivisionError"):
        part().run("timeit", "1 / 0")
    assert "loop" in part().run("timeit", "-n", 1, "-r", 1, "1")


def test_without_a_gpu_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path / "out")])
    assert gpu.main() == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Needs a GPU") and torch.__version__ in line
    assert not (tmp_path / "out").exists()


def test_a_part_that_crashes_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the others have found stays."""
    started: list[str] = []

    def run(self: gpu.Part, module: str, *words: Any, **options: Any) -> str:
        arguments = dict(zip(words[::2], words[1::2], strict=False))
        started.append(arguments["--part"])
        if started[-1] == "bench":
            raise RuntimeError("benchmarks.gpu ended with -9: it said nothing")
        gpu.do(started[-1], arguments["--seconds"], True, arguments["--out"])
        return ""

    monkeypatch.setattr(gpu.Part, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = ["--rehearse", "--seconds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["gpu", *options])
    assert gpu.main() == 0
    assert started == list(gpu.PARTS)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {*gpu.PARTS} < {*report} and all(
        report[name]["planned"] for name in {*started} - {"bench"}
    )
    assert "- the rest: benchmarks.gpu ended with -9" in (tmp_path / "report.md").read_text()


def test_it_takes_no_more_than_torchrec() -> None:
    """In an environment that trains, without the package's own requirements and extras."""
    ours = ("safetensors", "matplotlib", "pytest", "tensorboard", "jsonargparse", "yaml", "jinja2")
    block = f"import sys; sys.modules.update(dict.fromkeys({ours})); import benchmarks.gpu"
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=bench.REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
