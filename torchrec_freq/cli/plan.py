"""What fits on a cluster: plans of TorchRec's planner for several optimizers, side by side.

SPEC is a TOML file of the tables and the cluster, or one that comes with the package: criteo-1tb
(882 million rows) or dlrm-dcnv2 (204 million rows, several ids a sample). For each optimizer the
tables are planned in HBM; where they do not fit, with the largest in host memory behind a cache.
Nothing is allocated.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from tqdm import tqdm

from torchrec_freq.analysis.traffic import TableTraffic
from torchrec_freq.cli.arguments import number_below, whole_number
from torchrec_freq.cli.terminal import VisibleFormatter, as_json
from torchrec_freq.counts.stored import open_stored
from torchrec_freq.output import check_output, write_text
from torchrec_freq.planner.search import OPTIMIZERS, Result, plan
from torchrec_freq.planner.spec import MOST_RANKS, Spec, read_spec

HELP: Final = "plan tables on a cluster, with FrequencySGD beside other optimizers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what :func:`run` takes."""
    counts_help = (
        "counts or checkpoint with the spec's table names: hot shards cost more, caches are sized "
        "by table (default: all rows equal)"
    )
    timeout_help = (
        "take the best plan of this long a search; on 1024 ranks it takes minutes (default: search "
        "to the end)"
    )
    ranks_help = f"GPUs, up to {MOST_RANKS} (default: the spec's)"
    add, whole, names = parser.add_argument, whole_number, list(OPTIMIZERS)
    add("spec", type=Path, help="a .toml file, criteo-1tb or dlrm-dcnv2")
    add("--counts", type=Path, metavar="PATH", help=counts_help)
    add("--ranks", type=partial(whole, most=MOST_RANKS), help=ranks_help)
    add("--hbm-gb", type=number_below, help="HBM of a GPU, GB of 2^30 bytes")
    add("--batch-size", type=whole, metavar="SAMPLES", help="samples of a rank")
    add("--optimizer", nargs="+", choices=names, default=names, help="to plan (default: all)")
    add("--timeout", type=whole, metavar="SECONDS", help=timeout_help)
    add("--json", type=Path, metavar="FILE", help="also write the plans here")
    add("--report", action="store_true", help="also print TorchRec's report of each plan")


def run(arguments: argparse.Namespace) -> None:
    """Plans what the command line says, and prints a table."""
    spec = read_spec(
        arguments.spec,
        ranks=arguments.ranks,
        hbm_gb=arguments.hbm_gb,
        batch_size=arguments.batch_size,
    )
    if arguments.json is not None:
        check_output(arguments.json)
    counts = None if arguments.counts is None else _read_counts(arguments.counts, spec)
    # TorchRec warns of each data-parallel table that it has no sharding spec.
    logging.getLogger().setLevel(logging.ERROR)
    results = []
    with _reports() if arguments.report else contextlib.nullcontext():
        for optimizer in tqdm(arguments.optimizer, "plan", unit=" optimizers", disable=None):
            results.append(plan(spec, optimizer, counts, arguments.timeout))
    print(table(spec, results))
    if arguments.json is not None:
        write_text(arguments.json, as_json(results) + "\n")


@contextlib.contextmanager
def _reports() -> Iterator[None]:
    """TorchRec's reports go to the output."""
    logger = logging.getLogger("torchrec.distributed.planner.stats")
    level, handler = logger.level, logging.StreamHandler(sys.stdout)
    handler.setFormatter(VisibleFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _read_counts(path: Path, spec: Spec) -> dict[str, TableTraffic]:
    rows = {table.name: table.rows for table in spec.tables}
    stored = open_stored(path)
    for table in stored:
        if rows.get(table.name) != table.rows:
            raise ValueError(
                f"{path}: table {table.name!r} of {table.rows} rows is not in the spec, which has "
                + ", ".join(f"{name} ({n} rows)" for name, n in rows.items())
            )
    return {t.name: TableTraffic.of_blocks(t.blocks(), t.rows, table=t.name) for t in stored}


def table(spec: Spec, results: Sequence[Result]) -> str:
    """The plans as a Markdown table."""
    cluster = spec.cluster
    lines = [
        f"{len(spec.tables)} tables, {spec.rows:,} rows, on {cluster.ranks} x {cluster.hbm_gb:g} "
        f"GB HBM ({1 - cluster.reserved:.0%} of it for tables), {spec.batch_size} samples a rank:",
        "",
        "| optimizer | fits | tables, GB | HBM, GB a rank | DDR, GB a rank | step, ms "
        "| cache load factors | slowest rank / mean | planned in, s |",
        "|---" * 9 + "|",
    ]

    def number(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    for r in results:
        factors = sorted(f"{factor:.2f}" for factor in r.load_factors.values())
        cached = " to ".join(dict.fromkeys(factors[:1] + factors[-1:]))
        cells = [r.optimizer, r.fits, *map(number, (r.tables_gb, r.hbm_gb, r.ddr_gb, r.step_ms))]
        cells += [
            f"{cached} ({len(factors)} tables)" if factors else "",
            number(r.imbalance, 2),
            number(r.seconds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
