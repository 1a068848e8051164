"""DLRM-DCNv2 on 8 to 1,024 GPUs, on paper: memory, time and exchange beside row-wise Adagrad.

    python -m benchmarks.scale

TorchRec's planner plans the tables for either optimizer and estimates their step; it knows no
optimizer's time. What FrequencySGD's operators read and write besides is counted (`launches`) for
the busiest rank, and divided by the HBM bandwidth that the planner takes. Nothing is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import ShardingType

from benchmarks import launches
from benchmarks.bench import ADAGRAD, OURS
from torchrec_freq.planner.search import HBM_KERNELS, Search
from torchrec_freq.planner.spec import Spec, read_spec

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
NUMBERS = 4
"""float64 that are summed over the ranks for each feature of tables that several ranks share, at
most: squares, counts, occurrences, and whether it had a gradient."""


def added_bytes(options: list[ShardingOption], spec: Spec) -> list[float]:
    """What the engine's operators move in a step, by rank; every row is looked up equally often.

    Without data-parallel tables, whose update is a pass over their few rows.
    """
    a_lookup, a_bag = launches.bytes_each()
    ranks = spec.cluster.ranks
    moved = [0.0] * ranks
    for option in options:
        if option.sharding_type == ShardingType.DATA_PARALLEL.value:
            continue
        samples = spec.batch_size * ranks
        lookups = samples * sum(option.input_lengths)
        bags = samples * len(option.input_lengths)
        for shard in option.shards:
            rows, columns = shard.size
            gradient = 4 * (columns - launches.DIM)  # it was counted for another width
            share = rows / option.tensor.shape[0]
            moved[shard.rank] += lookups * share * a_lookup + bags * (a_bag + gradient)
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument(
        "--global-batch", type=int, metavar="N", help="samples of all ranks (default: 8,192 a rank)"
    )
    parser.add_argument("--timeout", type=int, default=60, help="seconds of a search")
    arguments = parser.parse_args()
    print(
        f"| ranks | HBM, GB a rank: {OURS} | {ADAGRAD} | tables' step, ms | added traffic, MB "
        "| the same, ms | summed over the ranks, bytes |"
    )
    print("|---" * 7 + "|")
    for ranks in arguments.ranks:
        batch = arguments.global_batch and arguments.global_batch // ranks
        spec = read_spec(Path("dlrm-dcnv2"), ranks=ranks, batch_size=batch)
        ours, theirs = (Search(spec, name, None, arguments.timeout) for name in (OURS, ADAGRAD))
        for search in (ours, theirs):
            if not search.run(spec.constraints(HBM_KERNELS)):
                raise SystemExit(f"The tables do not fit into the HBM of {ranks} GPUs.")
        most = max(added_bytes(ours.options, spec))
        bandwidth = spec.cluster.topology().hbm_mem_bw  # bytes a millisecond
        features = sum(len(table.pooling_factors) for table in spec.tables)
        found, other = ours.result("in HBM"), theirs.result("in HBM")
        print(
            f"| {ranks} | {found.hbm_gb:.2f} | {other.hbm_gb:.2f} | {found.step_ms:.1f} "
            f"| {most / 1e6:,.0f} | {most / bandwidth:.2f} | {8 * NUMBERS * features} |"
        )


if __name__ == "__main__":
    main()
