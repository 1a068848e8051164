"""Compares optimizers of embedding tables on public data, or on a file of yours.

    python -m benchmarks.study quick            the main comparison, some minutes
    python -m benchmarks.study full             all settings, baselines, options and lr
    python -m benchmarks.study report           tables and pictures of what has been run so far
    python -m benchmarks.study file clicks.parquet --label clicked --time when

A run that has its line in results.jsonl is not run again, so a study that was cut off goes on where
it was; delete the file after a change to an optimizer.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import files
from benchmarks.study import report, runner
from benchmarks.study.config import FORMS, FULL, Setting
from benchmarks.study.model import MODELS
from benchmarks.study.search import Results
from benchmarks.study.tables import CUDA

WORKERS = 1 if CUDA else os.cpu_count() or 1


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "benchmarks.study", description=__doc__, formatter_class=formatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in (*FORMS, "report"):
        command = commands.add_parser(name)
        command.add_argument("--data", type=Path, default=Path(".data"), help="of the data sets")
        command.add_argument("--out", type=Path, default=Path("runs/study"), help="of results")
        command.add_argument("--tables", type=Path, help="of RESULTS.md and pictures, if not --out")
        command.add_argument("--only", default="", help="settings whose name begins so")
    command = commands.add_parser("file", description=files.__doc__, formatter_class=formatter)
    command.add_argument("file", type=Path, help="Parquet, or CSV with a line of column names")
    command.add_argument("--label", required=True, help="column of 0 and 1")
    command.add_argument("--time", help="column to order the samples by; without it, at random")
    command.add_argument("--dense", default="", help="columns of numbers, separated by commas")
    command.add_argument("--model", choices=MODELS, default="DLRM")
    command.add_argument("--batch-size", type=int, default=1024)
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--out", type=Path, help="folder of results (default: runs/FILE's name)")
    for command in commands.choices.values():
        command.add_argument("--workers", type=int, default=WORKERS, help="processes")
    return parser.parse_args(arguments)


def study(args: argparse.Namespace) -> str:
    results = Results(args.out / "results.jsonl")
    if args.command != "report":
        chosen = [s for s in FORMS[args.command] if s.name.startswith(args.only)]
        runner.run_all(chosen, results, args.data, args.workers)
    return report.write(results, FULL, args.tables or args.out, "Results of the study")


def study_file(args: argparse.Namespace) -> str:
    out = args.out or Path("runs") / args.file.stem
    dense = [name.strip() for name in args.dense.split(",") if name.strip()]
    if args.batch_size < 1 or args.seeds < 1 or args.workers < 1:
        raise ValueError("--batch-size, --seeds and --workers must be at least 1.")
    folder = files.prepare(args.file, args.label, args.time, dense, out / "samples")
    setting = Setting(args.file.name, args.model, args.batch_size, seeds=args.seeds)
    results = Results(out / "results.jsonl")
    runner.run_all([setting], results, folder, args.workers)
    order = f"in the order of {args.time}" if args.time else "in a random order"
    return report.write(results, [setting], out, f"Optimizers on {args.file.name}, {order}")


def main() -> None:
    args = parse()
    try:
        print(study_file(args) if args.command == "file" else study(args))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
