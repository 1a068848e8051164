"""FrequencySGD on this machine's GPUs: one command, and a report to attach to an issue.

    python -m benchmarks.gpu                             # all parts, within ten minutes; `make gpu`
    python -m benchmarks.gpu --part bench --seconds 60   # one part of the same report
    python -m benchmarks.gpu --rehearse                  # the same code, tiny, on the CPU

It takes the Python that is given, installs nothing and needs no network (without its data the demo
is left out). Parts and what runs on several ranks are processes of their own. A part stops by
itself when its time is over; what was planned and is not in the report is named there, and why.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks import bench
from benchmarks.bench import REPOSITORY, Shape
from torchrec_freq import __version__, _versions
from torchrec_freq.engine.fused import FUSE
from torchrec_freq.output import write_text

SECONDS = {"tests": 150, "bench": 210, "profile": 50, "demo": 100}
NEEDS_GPU = re.compile(r"needs .*(GPU|CUDA)")  # why tests are skipped without one
NOT_REACHED = "not reached, the time was over"

Cases = dict[str, Callable[[], Any]]
"""What to do, the most important first; what it returns is JSON."""


class Part:
    """What a part is told, and where it says what of a case is missing."""

    def __init__(self, rehearse: bool, deadline: float) -> None:
        self.rehearse = rehearse
        self.deadline = deadline
        self.device = torch.device("cpu") if rehearse else torch.device("cuda", 0)
        self.ranks = 2 if rehearse else torch.cuda.device_count()
        self.left_out: dict[str, str] = {}

    def run(
        self, module: str, *words: object, ranks: int = 0, good: tuple[int, ...] = (0,), **to: Any
    ) -> str:
        """What a module printed; it and its ranks end when the time is over."""
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m"]
        command = [sys.executable, "-m", *(torchrun if ranks else []), module, *words]
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=REPOSITORY,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **to},
            text=True,
        )
        try:
            said, _ = process.communicate(timeout=max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{module} was ended: the time was over") from None
        finally:
            if process.returncode is None:
                process.terminate()  # torchrun ends its ranks; killed, it would leave them behind
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(40)
                process.kill()
        if process.returncode not in good:
            said = (said or "").strip() or "it said nothing"
            error = re.search(r"\w*(?:Error|Exception): \S.*|No module named .*", said)
            why = error[0] if error else said.splitlines()[-1]
            raise RuntimeError(f"{module} ended with {process.returncode}: {why}")
        return str(said)


def tests(part: Part) -> Cases:
    """The tests that are skipped without a GPU, file by file."""

    def outcomes(file: Path) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            xml = Path(folder, "junit.xml")
            options = ["-p", "benchmarks.gpu", "-p", "no:cacheprovider", "-o", "addopts="]
            part.run("pytest", file, *options, f"--junitxml={xml}", good=(0, 1))
            found = {}
            for case in ElementTree.parse(xml).iter("testcase"):
                said = [
                    f"{mark.tag}: {mark.get('message')}" for mark in case if mark.get("message")
                ]
                found[str(case.get("name"))] = said[0][:300] if said else "passed"
        return found

    files = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    return {
        str(file.relative_to(REPOSITORY)): functools.partial(outcomes, file)
        for file in files
        if "skipif(" in (text := file.read_text()) and NEEDS_GPU.search(text)
    }


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Keeps the tests that need a GPU: pytest calls it in :func:`tests`."""
    items[:] = [item for item in items if any(map(_needs_gpu, item.iter_markers("skipif")))]


def _needs_gpu(mark: Any) -> bool:
    return bool(NEEDS_GPU.search(mark.kwargs.get("reason", "")))


def shapes(part: Part, fields: int) -> list[Shape]:
    """Of bare tables: one, and what differs from it in so many fields at most."""
    base = Shape(tables=26, rows=200_000, dim=64, batch=8192, ids=1)
    values: dict[str, tuple[Any, ...]]
    values = {"ids": (20,), "zipf": (True,), "dim": (16, 128), "batch": (2048, 65536)}
    if part.rehearse:
        base = Shape(tables=2, rows=50, dim=8, batch=16, ids=1)
        values |= {"ids": (3,), "dim": (4, 16), "batch": (8, 32)}
    else:  # all optimizers' tables, Adagrad's sums among them, take half of the memory at most
        memory = torch.cuda.get_device_properties(part.device).total_memory
        while base.tables * base.rows * 128 * 4 * 6 > memory / 2:
            base = replace(base, rows=base.rows // 2)
    return bench.variations(base, values | {"half": (True,), "cached": (True,)}, fields)


def steps(part: Part) -> Cases:
    """Step times: bare tables, and sharded on 1, 2, 4 and so on ranks, each with a GPU."""
    turns = 3 if part.rehearse else 40
    base, *_ = shapes(part, 0)

    def bare(shape: Shape) -> list[dict[str, Any]]:
        gc.collect()  # the tables of the case before
        torch.cuda.empty_cache()
        failed: dict[str, str] = {}
        deadline = min(part.deadline, time.monotonic() + 8)  # of rows that come from the host
        results = bench.bench_tbe(shape, part.device, turns, deadline, failed)
        part.left_out |= {f"{shape}, {name}": why for name, why in failed.items()}
        return list(map(asdict, results))

    def sharded(shape: Shape, ranks: int) -> list[dict[str, Any]]:
        sizes = [shape.tables, shape.rows, shape.dim, shape.batch, shape.ids]
        with tempfile.TemporaryDirectory() as out:
            options = ["--turns", turns, "--seconds", 20, "--out", out, "--shape", *sizes]
            part.run("benchmarks.bench", "sharded", *options, ranks=ranks)
            return list(map(asdict, bench.load(Path(out))))

    def bare_cases(fields: int) -> Cases:
        return {str(shape): functools.partial(bare, shape) for shape in shapes(part, fields)}

    ranks = sorted({1, *(2**n for n in range(1, part.ranks.bit_length())), part.ranks})
    sharded_cases = {}
    for count in ranks:
        shape = replace(base, batch=base.batch * count)
        name = f"sharded on {count} ranks: {shape}"
        sharded_cases[name] = functools.partial(sharded, shape, count)
    return bare_cases(1) | sharded_cases | bare_cases(2)


def profile(part: Part) -> Cases:
    """A step by kernel, without a GPU by operator, beside row-wise Adagrad's."""
    times = 2 if part.rehearse else 20
    return {
        str(shape): functools.partial(bench.profile_tbe, shape, part.device, times)
        for shape in shapes(part, 1)[:3]
    }


def demo(part: Part) -> Cases:
    """A DLRM trained on MovieLens with three optimizers."""

    def train() -> list[str]:
        with tempfile.TemporaryDirectory() as out:
            size = ["--epochs", 1, *(["--limit", 3000] if part.rehearse else [])]
            said = part.run("examples.demo", *size, "--out", out, ranks=part.ranks)
        return [line for line in said.splitlines() if line.startswith("|")]

    return {f"examples.demo on {part.ranks} ranks": train}


PARTS = {"tests": tests, "bench": steps, "profile": profile, "demo": demo}


def do(name: str, seconds: float, rehearse: bool, out: Path) -> None:
    """Does the cases of a part until its time is over, and keeps the report up to date."""
    began = time.monotonic()
    part = Part(rehearse, began + seconds)
    cases = PARTS[name](part)
    done: dict[str, Any] = {}
    about = machine()
    for case, work in [("", lambda: None), *cases.items()]:
        if case and time.monotonic() < part.deadline:
            print(f"{name}: {case}", flush=True)
            try:
                done[case] = work()
            except Exception as error:
                part.left_out[case] = bench.reason(error)
        missing = {c: NOT_REACHED for c in cases if c not in done} | part.left_out
        took = time.monotonic() - began
        found = {"seconds": took, "planned": list(cases), "done": done, "left_out": missing}
        save({**read(out), "machine": about, name: found}, out)


def machine() -> dict[str, str]:
    """What the figures are of."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        driver = ""
    return {
        "devices": ", ".join(gpus) or "no GPU: a rehearsal on the CPU",
        "driver": driver or "unknown",
        "CUDA of torch": str(torch.version.cuda),
        "versions": f"{_versions.find()}, torchrec_freq {__version__}",
        "engine": "compiled" if os.environ.get(FUSE) == "1" else "not compiled",
        "Python": platform.python_version(),
        "system": platform.platform(),
    }


def read(out: Path) -> dict[str, Any]:
    """The report so far."""
    path = out / "report.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def save(report: dict[str, Any], out: Path) -> None:
    write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(out / "report.md", markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report, from its JSON alone."""
    lines = ["# FrequencySGD on GPUs", "", "| machine | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in report["machine"].items()]
    for name in (name for name in PARTS if name in report):
        found = report[name]
        done, planned = found["done"], found["planned"]
        of = f"{len(done)} of {len(planned)} planned cases in {found['seconds']:.0f} s."
        lines += ["", f"## {name}", "", of, ""]
        if name == "tests":
            lines += [f"- {test}: {said}" for part in done.values() for test, said in part.items()]
        elif name == "bench":
            lines += [
                bench.table([bench.result_of(entry) for part in done.values() for entry in part])
            ]
        elif name == "profile":
            for case, part in done.items():
                lines += [f"{case}:", "", bench.profile_table(part), ""]
        else:
            lines += sum(done.values(), [])
        if found["left_out"]:
            lines += ["", "Left out:", "", *(f"- {c}: {w}" for c, w in found["left_out"].items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", choices=PARTS, help="this one alone")
    add("--seconds", type=float, help=f"time of a part (default: {SECONDS})")
    add("--rehearse", action="store_true", help="on the CPU, with a few rows")
    add("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="of the report")
    args = parser.parse_args()
    if args.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available() or _versions.find().fbgemm_build == "cpu":
        found = f"{torch.cuda.device_count()} GPUs, {_versions.find()}"
        print(
            f"Needs a GPU that torch sees and FBGEMM's CUDA build; here: {found}. Else: --rehearse."
        )
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        limit = SECONDS[args.part] if args.seconds is None else args.seconds
        do(args.part, limit, args.rehearse, args.out)
    else:
        (args.out / "report.json").unlink(missing_ok=True)  # a new report
        for name, seconds in SECONDS.items():
            limit = seconds if args.seconds is None else args.seconds
            options = ["--part", name, "--seconds", limit, "--out", args.out.absolute()]
            options += ["--rehearse"] if args.rehearse else []
            try:
                whole = Part(args.rehearse, time.monotonic() + limit + 60)
                whole.run("benchmarks.gpu", *options, stdout=None, stderr=None)
            except RuntimeError as error:  # of a part that crashed, what it had done is kept
                empty = {"seconds": 0.0, "planned": [], "done": {}, "left_out": {}}
                report = {"machine": machine(), name: empty, **read(args.out)}
                report[name]["left_out"]["the rest"] = str(error)
                save(report, args.out)
    for file in ("report.md", "report.json"):
        print(args.out / file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
