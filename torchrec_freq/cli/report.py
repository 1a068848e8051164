"""What stored counts say of the tables: how skewed, at which rates, how cacheable, how balanced.

FILE is a file of counts, or the folder of a checkpoint of torch.distributed.checkpoint that has the
fused optimizer's state. Memory holds a block of the counts at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm

from torchrec_freq.analysis.report import (
    Settings,
    TableReport,
    describe,
)
from torchrec_freq.analysis.traffic import BLOCKS, TableTraffic
from torchrec_freq.cli.arguments import whole_numbers
from torchrec_freq.cli.report_tables import markdown, text_tables
from torchrec_freq.cli.terminal import visible
from torchrec_freq.config import DEFAULT_OWN_WEIGHT, FrequencyConfig
from torchrec_freq.counts.stored import open_stored
from torchrec_freq.output import check_folder, check_output, write_text

HELP: Final = "show what counts say: skew, learning rates, caches, balance of shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what :func:`run` takes."""
    parser.add_argument("file", nargs="+", type=Path, metavar="FILE", help="counts or checkpoint")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="also write report.html (one file, plots inside) and a PNG a table here; needs the "
        "extra torchrec-freq[report]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument(
        "--batch-lookups",
        type=_positive,
        default=Settings.batch_lookups,
        metavar="N",
        help="lookups of a table in a global batch, for caches (default: %(default)s)",
    )
    parser.add_argument(
        "--miss-rate",
        type=_share,
        default=Settings.miss_rate,
        metavar="SHARE",
        help="of a batch's distinct rows that the recommended cache misses (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks",
        type=partial(whole_numbers, most=BLOCKS),
        default=Settings.ranks,
        metavar="N[,N...]",
        help="numbers of row-wise shards (default: 2,4,8,16,32,64)",
    )
    parser.add_argument(
        "--lr", type=_positive, metavar="LR", help="learning rate (default: multiples of it)"
    )
    parser.add_argument(
        "--min-count",
        type=float,
        default=1,
        help="option of FrequencySGD, which is not stored (default: %(default)s)",
    )
    parser.add_argument(
        "--own-weight",
        type=float,
        default=DEFAULT_OWN_WEIGHT,
        help="option of FrequencySGD, which is not stored (default: %(default)s)",
    )
    parser.add_argument(
        "--no-normalize",
        action="store_true",
        help="the tables train with normalize=None, the paper's rule",
    )


def run(arguments: argparse.Namespace) -> None:
    """Reads the counts that the command line names, prints tables, and writes the page.

    Raises:
        ValueError: a file without counts, wrong arguments, or a missing extra.
        OSError: a file cannot be read or written.
    """
    output: Path | None = arguments.output
    page: Any = None if output is None else _page()  # before an hour of reading
    settings = Settings(
        batch_lookups=arguments.batch_lookups,
        miss_rate=arguments.miss_rate,
        ranks=arguments.ranks,
        lr=arguments.lr,
        config=FrequencyConfig(
            min_count=arguments.min_count,
            own_weight=arguments.own_weight,
            normalize=None if arguments.no_normalize else "table",
        ),
    )
    stored = [(str(path), table) for path in arguments.file for table in open_stored(path)]
    if output is not None:
        check_folder(output)
    if arguments.json is not None:
        check_output(arguments.json)
    reports: list[TableReport] = []
    plots: list[bytes] = []
    rows = sum(table.rows for _, table in stored)
    # Without a terminal no bar is drawn.
    with tqdm(total=rows, unit=" rows", unit_scale=True, disable=None) as bar:
        for source, table in stored:
            bar.set_description(visible(table.name))
            traffic = TableTraffic.of(torch.empty(0, dtype=torch.int32), 0, table.rows)
            for first, counts_R in table.blocks():
                traffic += TableTraffic.of(counts_R, first, table.rows, table=table.name)
                bar.update(len(counts_R))
            table = table.counted(traffic.histogram.lookups, traffic.histogram.rows_seen)
            reports.append(describe(table, traffic, source, settings))
            if page is not None:
                plots.append(page.plot(reports[-1], table, traffic.histogram, settings))
    parts = text_tables(reports, settings)
    print("\n".join(map(markdown, parts)))
    if output is not None:
        page.write(output, reports, plots, parts)
        print(f"{visible(str(output))}: report.html and {len(plots)} plots")
    if arguments.json is not None:
        values = json.dumps([dataclasses.asdict(report) for report in reports], indent=1)
        write_text(arguments.json, values + "\n")


def _page() -> Any:
    try:
        from torchrec_freq.cli import report_page
    except ImportError as error:
        raise ValueError(
            f"-o needs {error.name}: pip install 'torchrec-freq[report]', or do without -o."
        ) from error
    return report_page


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _share(text: str) -> float:
    if (number := _positive(text)) >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return number
