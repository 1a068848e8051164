"""Counts from row-wise Adagrad: a run's sums of squares, from its checkpoint, as a file of counts.

Loaded with torchrec_freq.load_row_counts(model, *torchrec_freq.load_counts(path)), it gives every
row the rate that row-wise Adagrad gave it, but for rounding. The checkpoint is one of
torch.distributed.checkpoint, of any sharding plan, with the model's state and its fused
optimizer's. Memory holds the counts of all tables (4 bytes a row), the sums of one, and twice a
shard as a rank saved it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from torch import Tensor

from torchrec_freq.cli.arguments import add_counts_file, one_each, whole_numbers
from torchrec_freq.cli.terminal import progress, visible
from torchrec_freq.counts.adagrad import counts_of_sums
from torchrec_freq.counts.files import save_counts
from torchrec_freq.counts.stored_sums import open_sums, tables_without_sums
from torchrec_freq.output import check_output

HELP: Final = "turn the sums in a row-wise Adagrad's checkpoint into a file of counts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what :func:`run` takes."""
    lookups_help = (
        "occurrences of ids so far, over all batches and ranks: one number for all tables, or one "
        "for each, in the order of their names (default: unknown; the largest count of a table is "
        "then 2^29, and its shares change hardly any more)"
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder that holds .metadata")
    add_counts_file(parser)
    add("--lookups", type=whole_numbers, metavar="N[,N...]", help=lookups_help)


def run(arguments: argparse.Namespace) -> None:
    """Converts the sums of the checkpoint that the command line names."""
    output: Path = arguments.output
    check_output(output)
    stored = open_sums(arguments.checkpoint)
    names = [table.name for table in stored]
    lookups = one_each("--lookups", arguments.lookups or [None], "tables", names)
    counts: dict[str, Tensor] = {}
    squares: dict[str, float] = {}
    rows, rounded = sum(table.rows for table in stored), 0
    with progress(rows, "rows") as bar:
        for table in stored:
            bar.set_description(visible(table.name))
            sums_R = table.read()
            found = counts_of_sums(sums_R, lookups[table.name])
            counts[table.name], squares[table.name] = found
            rounded += int(((sums_R > 0) & (found[0] == 0)).sum())
            bar.update(table.rows)
    save_counts(output, counts, squares)
    print(f"{visible(str(output))}: {len(counts)} tables, {rows:,} rows")
    if rounded:
        print(f"{rounded:,} rows had too little for a count of 1: they have 0, as if never seen.")
    if others := tables_without_sums(arguments.checkpoint):
        print(f"Not in it, as the checkpoint has no sums of them: {visible(', '.join(others))}")
