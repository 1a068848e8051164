"""Runs the study and writes its tables and pictures.

    python -m benchmarks.study quick     some minutes: the main comparison
    python -m benchmarks.study full      all experiments
    python -m benchmarks.study report    tables and pictures of what has been run so far

make study and make study-full are the first two; the latter writes benchmarks/study/RESULTS.md.

A run that has its line in results.jsonl is not run again, so a study that was cut off goes on where
it was; delete the file after a change to an optimizer. Data sets other than MovieLens-100K and the
synthetic ones are used if they are in the data folder: ml-1m (as published) and criteo (day_*.npy
files, at least two days).
"""

import argparse
import os
from pathlib import Path

from benchmarks.study import report
from benchmarks.study.config import EXPERIMENTS
from benchmarks.study.runner import run_all
from benchmarks.study.sweep import Results


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("command", choices=[*EXPERIMENTS, "report"])
    parser.add_argument("--data", type=Path, default=Path(".data"), help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of results")
    parser.add_argument(
        "--tables", type=Path, help="folder of tables and pictures (default: --out)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args()
    results = Results(args.out / "results.jsonl")
    if args.command != "report":
        run_all(EXPERIMENTS[args.command], results, args.data, args.workers)
    print(report.write(results, args.tables or args.out))


if __name__ == "__main__":
    main()
