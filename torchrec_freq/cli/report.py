"""What stored counts say of the tables: how skewed, at which rates, how cacheable, how balanced.

FILE is a file of counts, or the folder of a checkpoint of torch.distributed.checkpoint that has the
fused optimizer's state, which rates need. Memory holds a block of a table at a time.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from torchrec_freq.analysis.report import NOTES, TableReport, describe
from torchrec_freq.analysis.traffic import BLOCKS
from torchrec_freq.cli.arguments import number_below, whole_numbers
from torchrec_freq.cli.terminal import progress, visible
from torchrec_freq.config import FrequencyConfig
from torchrec_freq.counts.stored import open_stored
from torchrec_freq.output import check_folder, check_output, write_text

HELP: Final = "show what counts say: skew, learning rates, caches, balance of shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what :func:`run` takes."""
    page_help = "also write report.html and plots here; needs the extra torchrec-freq[report]"
    lookups_help = "lookups of a table in a global batch, for caches (default: %(default)s)"
    miss_help = "of a batch's distinct rows, for the least load factor (default: %(default)s)"
    rule_help = "option of FrequencySGD, which is not stored (default: %(default)s)"
    paper_help = "the tables train with normalize=None, the paper's rule, and this min_count"
    share, ranks = partial(number_below, end=1), partial(whole_numbers, most=BLOCKS)
    add, counts = parser.add_argument, [2, 4, 8, 16, 32, 64]
    prior = FrequencyConfig.prior_count
    add("file", nargs="+", type=Path, metavar="FILE", help="counts or checkpoint")
    add("-o", "--output", type=Path, metavar="FOLDER", help=page_help)
    add("--json", type=Path, metavar="FILE", help="also write the figures here")
    add("--batch-lookups", type=number_below, default=1 << 16, metavar="N", help=lookups_help)
    add("--miss-rate", type=share, default=0.1, metavar="SHARE", help=miss_help)
    add("--ranks", type=ranks, default=counts, metavar="N[,N...]", help="numbers of shards")
    add("--lr", type=number_below, default=1.0, help="learning rate (default: multiples of it)")
    add("--prior-count", type=float, default=prior, help=rule_help)
    add("--min-count", type=float, help=paper_help)


def run(arguments: argparse.Namespace) -> None:
    """Reads the counts that the command line names, prints tables, and writes the page."""
    output: Path | None = arguments.output
    page = None if output is None else _page()  # before an hour of reading
    config = FrequencyConfig(prior_count=arguments.prior_count)
    if arguments.min_count is not None:
        config = FrequencyConfig(normalize=None, min_count=arguments.min_count)
    names = ("lr", "batch_lookups", "miss_rate", "ranks")
    settings = {name: getattr(arguments, name) for name in names}
    stored = [(str(path), table) for path in arguments.file for table in open_stored(path)]
    if output is not None:
        check_folder(output)
    if arguments.json is not None:
        check_output(arguments.json)
    reports, without = list[TableReport](), list[str]()
    with progress(sum(table.rows for _, table in stored), "rows") as bar:
        for source, table in stored:
            bar.set_description(visible(table.name))
            report = describe(table, source, config, progress=bar.update, **settings)
            reports += [report] if report else []
            without += [] if report else [table.name]
    if not reports:
        raise ValueError(f"{arguments.file[0]}: no table has counts.")
    for title, lines in text_tables(reports).items():
        print(f"{title}\n\n{markdown(lines)}\n{NOTES[title]}\n")
    if without:
        print(f"Left out, as they have no counts: {visible(', '.join(without))}")
    if output is not None and page is not None:
        page.write(output, reports, text_tables(reports), arguments.batch_lookups)
        print(f"{visible(str(output))}: report.html and {len(reports)} plots")
    if arguments.json is not None:
        records = [{"source": r.source, "name": r.name, **r.figures} for r in reports]
        write_text(arguments.json, json.dumps(records, indent=1) + "\n")


def _page() -> Any:
    try:
        return importlib.import_module("torchrec_freq.cli.report_page")
    except ImportError as error:
        raise ValueError(
            f"-o needs {error.name}: pip install 'torchrec-freq[report]', or do without -o."
        ) from error


def text_tables(reports: Sequence[TableReport]) -> dict[str, list[list[str]]]:
    """Each part of the reports as a header and a line for each table."""
    several = len({report.source for report in reports}) > 1
    names = [visible(f"{r.source}: {r.name}" if several else r.name) for r in reports]
    tables = {title: [["table", *reports[0].figures[title]]] for title in NOTES}
    for name, report in zip(names, reports, strict=True):
        for title, figures in report.figures.items():
            tables[title].append([name, *map(_cell, figures.values())])
    return tables


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table in Markdown that is also readable as it is."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in table]
    width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    header, *body = (
        f"| {' | '.join([first.ljust(width), *map(str.rjust, rest, widths)])} |\n"
        for first, *rest in lines
    )
    rule = f"|{'-' * (width + 2)}|" + "".join(f"{'-' * (w + 1)}:|" for w in widths)
    return f"{header}{rule}\n{''.join(body)}"


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.3g}"
