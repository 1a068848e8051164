"""What fits on a cluster: TorchRec's planner for several optimizers, before there is a GPU.

    python -m torchrec_freq plan user=50000000x64 item=10000000x64x20 --ranks 8 --hbm-gb 80

A TABLE is NAME=ROWSxCOLUMNS, with xIDS for several ids a sample. For each optimizer the tables are
planned in HBM; where they do not fit, in host memory too, behind a cache. Nothing is allocated.
"""

from __future__ import annotations

import argparse
import logging
import re
from functools import partial
from typing import Final, NamedTuple

import torch
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import DataType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from tqdm import tqdm

from torchrec_freq.cli.arguments import number_below, whole_number
from torchrec_freq.cli.report import markdown
from torchrec_freq.cli.terminal import visible
from torchrec_freq.optimizer import FrequencySGD
from torchrec_freq.planner import make_planner

HELP: Final = "plan tables on a cluster, with FrequencySGD beside other optimizers"

_GB: Final = 1 << 30
_MOST_RANKS: Final = 4096
"""With as many, TorchRec's planner takes most of a minute to its first plan."""
_OPTIMIZERS: Final[dict[str, type[torch.optim.Optimizer]]] = {
    "FrequencySGD": FrequencySGD,
    "SGD": torch.optim.SGD,
    "RowWiseAdagrad": RowWiseAdagrad,
    "Adagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
}
_KERNELS: Final = {
    "in HBM": ["fused", "dense"],
    "with a cache": ["fused", "dense", "fused_uvm_caching"],
}


class Table(NamedTuple):
    """A table of the command line: rows, columns, and mean ids in a sample."""

    name: str
    rows: int
    columns: int
    ids: float


def parse_table(text: str) -> Table:
    """A table from ``NAME=ROWSxCOLUMNS[xIDS]``."""
    match = re.fullmatch(r"([^.]+)=(\d{1,12})x(\d{1,5})(?:x(\d{1,9}(?:\.\d+)?))?", text, re.DOTALL)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=ROWSxCOLUMNS or …xIDS")
    table = Table(match[1], int(match[2]), int(match[3]), float(match[4] or 1))
    if not (table.rows and table.columns and table.ids) or table.columns % 4:
        raise argparse.ArgumentTypeError(
            f"{text!r}: rows, columns and ids must be above 0, columns a multiple of 4"
        )
    if hasattr(torch.nn.ModuleDict(), table.name):
        raise argparse.ArgumentTypeError(f"{text!r}: TorchRec cannot have a table of this name")
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what :func:`run` takes."""
    add, names, share = parser.add_argument, list(_OPTIMIZERS), partial(number_below, end=1)
    memory = partial(number_below, end=1e9)
    reserved_help = "share of the HBM for all but tables (default: %(default)s)"
    timeout_help = "take the best plan of this long a search (default: search to the end)"
    add("table", nargs="+", type=parse_table, metavar="TABLE", help="NAME=ROWSxCOLUMNS[xIDS]")
    add("--ranks", type=partial(whole_number, most=_MOST_RANKS), default=8, help="GPUs (8)")
    add("--ranks-per-host", type=whole_number, default=8, metavar="RANKS", help="at most (8)")
    add("--hbm-gb", type=memory, default=80, help="HBM of a GPU, GB of 2^30 bytes (80)")
    add("--ddr-gb", type=memory, default=1024, help="memory of a host (1024)")
    add("--reserved", type=share, default=0.15, metavar="SHARE", help=reserved_help)
    add("--batch-size", type=whole_number, default=8192, help="samples of a rank (8192)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the weights (fp32)")
    add("--optimizer", nargs="+", choices=names, default=names, help="to plan (default: all)")
    add("--timeout", type=whole_number, metavar="SECONDS", help=timeout_help)
    add("--report", action="store_true", help="also print TorchRec's statistics of each plan")


def run(arguments: argparse.Namespace) -> None:
    """Plans what the command line says, and prints a table."""
    tables, ranks = arguments.table, arguments.ranks
    per_host = min(arguments.ranks_per_host, ranks)
    if ranks % per_host:
        raise ValueError(f"--ranks {ranks} is no multiple of --ranks-per-host {per_host}.")
    if len({table.name for table in tables}) < len(tables):
        raise ValueError("Every TABLE needs a name of its own.")
    logging.getLogger().setLevel(logging.ERROR)  # TorchRec warns of each data-parallel table
    topology = Topology(
        ranks,
        "cuda",
        hbm_cap=int(arguments.hbm_gb * _GB),
        ddr_cap=int(arguments.ddr_gb * _GB / per_host),
        local_world_size=per_host,
    )
    lines = [["optimizer", "fits", "HBM, GB a rank", "DDR, GB a rank", "step, ms"]]
    for name in tqdm(arguments.optimizer, "plan", unit=" optimizers", disable=None):
        for fits in _KERNELS:
            figures, page = _plan(arguments, topology, name, fits)
            if figures:
                break
        lines.append([name, *([fits, *figures] if figures else ["no", "", "", ""])])
        if arguments.report:
            print(name, *map(visible, page), sep="\n")
    rows = sum(table.rows for table in tables)
    print(f"{len(tables)} tables, {rows:,} rows, {ranks} GPUs:\n\n{markdown(lines)}", end="")


def _plan(
    arguments: argparse.Namespace, topology: Topology, optimizer: str, fits: str
) -> tuple[list[str], list[str]]:
    """Figures for the rank that has most, none without a plan; and TorchRec's statistics."""
    tables: list[Table] = arguments.table
    dtype = DataType(arguments.dtype.upper())
    configs = [EmbeddingBagConfig(t.rows, t.columns, t.name, dtype, [t.name]) for t in tables]
    collection = EmbeddingBagCollection(configs, device=torch.device("meta"))
    apply_optimizer_in_backward(_OPTIMIZERS[optimizer], collection.parameters(), {"lr": 0.1})
    constraints = {
        t.name: ParameterConstraints(compute_kernels=_KERNELS[fits], pooling_factors=[t.ids])
        for t in tables
    }
    stats, sharder = EmbeddingStats(), EmbeddingBagCollectionSharder()
    planner = make_planner(
        topology,
        arguments.batch_size,
        constraints,
        storage_reservation=FixedPercentageStorageReservation(arguments.reserved),
        stats=stats,
        timeout_seconds=arguments.timeout,
    )
    try:
        planner.plan(collection, [sharder])
    except PlannerError:
        return [], stats._stats_table
    sums = torch.zeros(topology.world_size, 3, dtype=torch.float64)
    for shard in (shard for option in planner._best_plan for shard in option.shards):
        storage = shard.storage
        figures = [storage.hbm / _GB, storage.ddr / _GB, shard.perf.total]
        sums[shard.rank] += torch.tensor(figures, dtype=torch.float64)
    return [f"{most:.2f}" for most in sums.amax(0).tolist()], stats._stats_table
