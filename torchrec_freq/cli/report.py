"""What stored counts say of the tables: how skewed, at which rates, how cacheable, how balanced.

FILE is a file of counts, or the folder of a checkpoint of torch.distributed.checkpoint that has the
fused optimizer's state. Memory holds a block of the counts at a time.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Final

from torchrec_freq.analysis.report import Settings, TableReport, describe
from torchrec_freq.analysis.traffic import BLOCKS, TableTraffic
from torchrec_freq.cli.arguments import number_below, whole_numbers
from torchrec_freq.cli.report_tables import markdown, text_tables
from torchrec_freq.cli.terminal import as_json, progress, visible
from torchrec_freq.config import DEFAULT_OWN_WEIGHT, FrequencyConfig
from torchrec_freq.counts.stored import Blocks, open_stored
from torchrec_freq.output import check_folder, check_output, write_text

HELP: Final = "show what counts say: skew, learning rates, caches, balance of shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what :func:`run` takes."""
    page_help = (
        "also write report.html (one file, plots inside) and a PNG a table here; needs the extra "
        "torchrec-freq[report]"
    )
    lookups_help = "lookups of a table in a global batch, for caches (default: %(default)s)"
    miss_help = (
        "of a batch's distinct rows that the recommended cache misses (default: %(default)s)"
    )
    ranks_help = "numbers of row-wise shards (default: 2,4,8,16,32,64)"
    rule_help = "option of FrequencySGD, which is not stored (default: %(default)s)"
    paper_help = "the tables train with normalize=None, the paper's rule"
    share, ranks = partial(number_below, end=1), partial(whole_numbers, most=BLOCKS)
    add, lookups = parser.add_argument, Settings.batch_lookups
    add("file", nargs="+", type=Path, metavar="FILE", help="counts or checkpoint")
    add("-o", "--output", type=Path, metavar="FOLDER", help=page_help)
    add("--json", type=Path, metavar="FILE", help="also write the figures here")
    add("--batch-lookups", type=number_below, default=lookups, metavar="N", help=lookups_help)
    add("--miss-rate", type=share, default=Settings.miss_rate, metavar="SHARE", help=miss_help)
    add("--ranks", type=ranks, default=Settings.ranks, metavar="N[,N...]", help=ranks_help)
    add("--lr", type=number_below, help="learning rate (default: multiples of it)")
    add("--min-count", type=float, default=1, help=rule_help)
    add("--own-weight", type=float, default=DEFAULT_OWN_WEIGHT, help=rule_help)
    add("--no-normalize", action="store_true", help=paper_help)


def run(arguments: argparse.Namespace) -> None:
    """Reads the counts that the command line names, prints tables, and writes the page."""
    output: Path | None = arguments.output
    page: Any = None if output is None else _page()  # before an hour of reading
    config = FrequencyConfig(
        min_count=arguments.min_count,
        own_weight=arguments.own_weight,
        normalize=None if arguments.no_normalize else "table",
    )
    given = {
        name: getattr(arguments, name) for name in ("batch_lookups", "miss_rate", "ranks", "lr")
    }
    settings = Settings(**given, config=config)
    stored = [(str(path), table) for path in arguments.file for table in open_stored(path)]
    if output is not None:
        check_folder(output)
    if arguments.json is not None:
        check_output(arguments.json)
    reports: list[TableReport] = []
    plots: list[bytes] = []
    with progress(sum(table.rows for _, table in stored), "rows") as bar:
        for source, table in stored:
            bar.set_description(visible(table.name))
            blocks = _shown(table.blocks(), bar)
            traffic = TableTraffic.of_blocks(blocks, table.rows, table=table.name)
            histogram = traffic.histogram
            table = table.counted(histogram.lookups, histogram.rows_seen)
            reports.append(describe(table, traffic, source, settings))
            if page is not None:
                plots.append(page.plot(reports[-1], table, histogram, settings))
    parts = text_tables(reports, settings)
    print("\n".join(map(markdown, parts)))
    if output is not None:
        page.write(output, reports, plots, parts)
        print(f"{visible(str(output))}: report.html and {len(plots)} plots")
    if arguments.json is not None:
        write_text(arguments.json, as_json(reports) + "\n")


def _shown(blocks: Blocks, bar: Any) -> Blocks:
    for first, counts_R in blocks:
        yield first, counts_R
        bar.update(len(counts_R))


def _page() -> Any:
    try:
        from torchrec_freq.cli import report_page
    except ImportError as error:
        raise ValueError(
            f"-o needs {error.name}: pip install 'torchrec-freq[report]', or do without -o."
        ) from error
    return report_page
