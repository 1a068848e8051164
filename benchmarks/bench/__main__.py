"""What a step costs with FrequencySGD, beside FBGEMM's row-wise Adagrad, its SGD and counter mode.

    python -m benchmarks.bench                     # step times here; `make bench`
    python -m benchmarks.bench --gpu               # and all that a GPU can tell; `make gpu`
    python -m benchmarks.bench --gpu --rehearse    # the same, tiny, on the CPU
    python -m benchmarks.bench --part tables       # one part of it

The optimizers take turns, a step each, on the same ids; the time of eight steps is compared with
that of row-wise Adagrad's in the same turn. Each part is a process of its own, and what it has
found is kept if it fails or its time is over. With --gpu all of it takes ten minutes at most,
installs nothing and needs no network (without its data the demo is left out).
"""

import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from benchmarks.bench.measure import TURN, WARM_UP, Step, measure
from benchmarks.bench.workloads import BASE, OURS, Shape, bare_tables, sharded
from benchmarks.common.ranks import start_ranks
from torchrec_freq import __version__, _versions
from torchrec_freq.output import write_text

REPOSITORY: Final = Path(__file__).resolve().parents[2]
REFERENCE: Final = (
    Shape(tables=8, rows=200_000, dim=64, batch=2048, ids=10),
    Shape(tables=26, rows=100_000, dim=64, batch=2048, ids=1),
    Shape(tables=26, rows=100_000, dim=16, batch=4096, ids=1),
    Shape(tables=26, rows=100_000, dim=128, batch=2048, ids=1),
    Shape(tables=26, rows=100_000, dim=64, batch=128, ids=1),  # small: the fixed cost shows
)
LARGE: Final = (  # the most important first, the slowest last
    Shape(tables=26, rows=200_000, dim=64, batch=8192, ids=1),
    Shape(tables=26, rows=200_000, dim=64, batch=8192, ids=20),
    Shape(tables=26, rows=200_000, dim=128, batch=65536, ids=1, half=True),
    Shape(tables=26, rows=200_000, dim=64, batch=8192, ids=1, cached=True),
)
TINY: Final = tuple(Shape(2, 50, 8, 16, ids, half) for ids in (1, 3) for half in (False, True))
SECONDS: Final = {"tests": 150, "tables": 150, "sharded": 120, "profile": 50, "demo": 100}
"""Of the parts, with --gpu."""


@dataclass(frozen=True)
class Job:
    """A process, or some ranks of it, that do a part."""

    name: str
    module: str
    words: tuple[object, ...]
    ranks: int = 0

    def run(self, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
        """What it said, how long it took, and what went wrong."""
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", self.ranks, "-m"]
        command = [sys.executable, "-m", *(torchrun if self.ranks else []), self.module]
        print(f"\n{self.name}", flush=True)
        began, lines = time.monotonic(), []
        process = subprocess.Popen(
            [*map(str, command), *map(str, self.words)],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONWARNINGS": "ignore"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        timer = threading.Timer(seconds, process.terminate)  # torchrun then ends its ranks
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line.rstrip())
            code = process.wait()
        finally:
            over = timer.finished.is_set()
            timer.cancel()
            process.terminate()
        error = None
        if over:
            error = "ended: its time was over"
        elif code:
            why = [said for said in lines if re.match(r"\w*(Error|Exception|error)\b.*:", said)]
            error = f"ended with {code}: {(why or lines or ['it said nothing'])[-1]}"
        return {"seconds": time.monotonic() - began, "said": lines, "error": error}


def jobs(args: argparse.Namespace) -> dict[str, list[Job]]:
    """By part."""
    same = ["--out", args.out.absolute()] + [f"--{n}" for n in ("gpu", "rehearse") if vars(args)[n]]
    worker = partial(Job, module="benchmarks.bench")
    counts = sorted({1, args.ranks, *(2**n for n in range(args.ranks.bit_length()) if args.gpu)})
    few = ("--epochs", 1, *(("--limit", 3000) if args.rehearse else ()))
    quiet = ("-q", "-ra", "--color=no", "--continue-on-collection-errors")
    return {
        "tests": [Job("tests", "pytest", ("tests", "-m", "gpu", *quiet))],
        "tables": [worker("tables", words=("--work", "tables", *same))],
        "sharded": [
            worker(f"sharded on {n} ranks", words=("--work", "sharded", *same), ranks=n)
            for n in counts
        ],
        "profile": [worker("profile", words=("--work", "profile", *same))],
        "demo": [Job("demo", "examples.demo", (*few, "--out", args.out / "demo"), args.ranks)],
    }


# What a process of the parts does.


def work(part: str, gpu: bool, rehearse: bool, out: Path) -> None:
    """Times the cases of a part and adds what it finds to the records."""
    shapes = TINY if rehearse else (*REFERENCE, *(LARGE if gpu else ()))
    with start_ranks() as device:
        torch.manual_seed(dist.get_rank())
        if part == "profile":
            for shape in shapes[:3]:
                profile(shape, device)
            return
        if part == "tables":
            cases = {
                ("bare tables", shape): partial(bare_tables, shape, device) for shape in shapes
            }
        else:
            shape = LARGE[0] if gpu and not rehearse else shapes[0]
            cases = {
                (name, shape): partial(sharded, shape, device, dlrm=name == "DLRM")
                for name in ("collection", "DLRM")
            }
        ranks = dist.get_world_size()
        names = {case: f"{case[0]}, {ranks} | {case[1]}" for case in cases}
        keep({"planned": list(names.values())}, out)
        for case, makers in cases.items():
            steps = working(names[case], makers(), out)
            turns, warm_up = (1, TURN) if rehearse else (16 if gpu else 8, WARM_UP)
            lookups = case[1].lookups // ranks
            found = measure(steps, device, lookups, turns, warm_up)
            base = found[BASE].ms
            for name, measured in found.items():
                ratios = [ms / other for ms, other in zip(measured.ms, base, strict=True)]
                ratio = statistics.quantiles(ratios) if len(ratios) > 1 else ratios * 3
                entry = {"case": names[case], "optimizer": name, "lookups": lookups, "ratio": ratio}
                keep(entry | vars(measured) | {"ms": statistics.median(measured.ms)}, out)
                if name == OURS and dist.get_rank() == 0:
                    print(f"{names[case]}: {ratio[1]:.2f} of {BASE}'s step", flush=True)
            steps.clear()  # the memory of the tables
            gc.collect()


def working(case: str, makers: Mapping[str, Callable[[], Step]], out: Path) -> dict[str, Step]:
    """The steps of the optimizers that work."""
    steps = {}
    for name, make in makers.items():
        try:
            step = make()
            step(0)
        except Exception as error:
            if name in (BASE, OURS):
                raise
            line = (str(error).strip() or "-").splitlines()[0]
            keep({"left out": f"{case}, {name}", "why": f"{type(error).__name__}: {line}"}, out)
        else:
            steps[name] = step
    return steps


def keep(entry: dict[str, Any], out: Path) -> None:
    if dist.get_rank() == 0:
        with (out / "records.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


def profile(shape: Shape, device: torch.device) -> None:
    """Prints where a step spends its time, by operator, on a GPU by kernel too."""
    makers = bare_tables(shape, device)
    order = f"self_{device.type}_time_total"
    for name in (BASE, OURS):
        step = makers[name]()
        for number in range(WARM_UP):
            step(number)
        with torch.profiler.profile() as profiler:
            for number in range(TURN):
                step(number)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        averages = profiler.key_averages()
        print(f"{name}, {TURN} steps, {shape}")
        print(averages.table(sort_by=order, row_limit=16, max_name_column_width=60), flush=True)


# The report.


def machine() -> dict[str, str]:
    """What the figures are of."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "GPUs": ", ".join(gpus) or "none",
        "CUDA of torch": str(torch.version.cuda),
        "versions": f"{_versions.find()}, torchrec_freq {__version__}",
        "Python": platform.python_version(),
        "system": f"{platform.platform()}, {os.cpu_count()} cores",
    }


def table(records: list[dict[str, Any]]) -> str:
    """A line a case: times beside row-wise Adagrad's, and what FrequencySGD has more."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if "case" in record:
            found.setdefault(record["case"], {})[record["optimizer"]] = record
    others = list(dict.fromkeys(name for case in found.values() for name in case if name != BASE))
    titles = ["workload, ranks", "tables x rows x dim, batch, ids a bag", f"{BASE}, ms", *others]
    titles += ["operators more", "bytes a lookup more, read and written", "at the peak"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for case, of in found.items():
        cells = [case, f"{of[BASE]['ms']:.3g}"]
        for name in others:
            low, middle, high = of[name]["ratio"] if name in of else (0, 0, 0)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})" if name in of else "")
        few, most = (
            ours - base
            for ours, base in zip(of[OURS]["operators"], of[BASE]["operators"], strict=True)
        )
        cells.append(f"{few}, {most} in a sampled step")
        for kind in ("bytes_moved", "bytes_peak"):
            cells.append(f"{(of[OURS][kind] - of[BASE][kind]) / of[OURS]['lookups']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + (
        f"\n\nMedian ratio to the step of {BASE} in a turn of {TURN} steps (quartiles); operators "
        f"and bytes: {OURS} less {BASE}, on this rank."
    )


def markdown(report: dict[str, Any]) -> str:
    """The report, from its JSON alone."""
    records = report["records"]
    lines = ["# A step of FrequencySGD", "", "| machine | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in report["machine"].items()]
    lines += ["", "## Steps", "", table(records)]
    planned = [case for record in records for case in record.get("planned", ())]
    done = {record.get("case") for record in records}
    left_out = [f"{r['left out']}: {r['why']}" for r in records if "left out" in r]
    left_out += [f"{case}: not reached" for case in planned if case not in done]
    for name, job in report["jobs"].items():
        if job["error"]:
            left_out.append(f"{name}: {job['error']}")
        said = job["said"]
        if name == "demo":
            lines += ["", "## demo", "", *(line for line in said if line.startswith("|"))]
        elif name in ("tests", "profile"):
            lines += ["", f"## {name}", "", "```text", *said, "```"]
    if left_out:
        lines += ["", "## Left out", "", *(f"- {line}" for line in left_out)]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--gpu", action="store_true", help="on this machine's GPUs, with more shapes, and all parts"
    )
    add("--rehearse", action="store_true", help="on the CPU, with a few rows")
    add("--part", choices=SECONDS, help="this one alone")
    add("--ranks", type=int, default=torch.cuda.device_count() or 2, help="most of a sharded model")
    add("--seconds", type=float, help=f"time of a part (default: with --gpu {SECONDS})")
    add("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="of the report")
    add("--work", choices=SECONDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.work:
        work(args.work, args.gpu, args.rehearse, args.out)
        return 0
    blind = not torch.cuda.is_available() or _versions.find().fbgemm_build == "cpu"
    if args.gpu and not args.rehearse and blind:
        found = f"{torch.cuda.device_count()} GPUs, {_versions.find()}"
        print(f"Needs a GPU and FBGEMM's CUDA build; here: {found}. Else: --rehearse.")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    records = args.out / "records.jsonl"
    records.write_text("")
    report: dict[str, Any] = {"machine": machine(), "jobs": {}, "records": []}
    chosen = [args.part] if args.part else SECONDS if args.gpu else ["tables", "sharded"]
    for part in chosen:
        of_part = jobs(args)[part]
        seconds = args.seconds or (SECONDS[part] if args.gpu else 3600)
        for job in of_part:
            environment = {"CUDA_VISIBLE_DEVICES": ""} if args.rehearse else {}
            report["jobs"][job.name] = job.run(seconds / len(of_part), environment)
            report["records"] = [json.loads(line) for line in records.read_text().splitlines()]
            write_text(args.out / "report.json", json.dumps(report, indent=1) + "\n")
            write_text(args.out / "report.md", markdown(report))
    print(f"\n{markdown(report)}\n{args.out / 'report.md'}\n{args.out / 'report.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
