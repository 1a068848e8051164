"""What fits on a cluster: plans of TorchRec's planner for several optimizers, side by side.

SPEC is a TOML file of the tables and the cluster, or one that comes with the package: criteo-1tb
(882 million rows) or dlrm-dcnv2 (204 million rows, several ids a sample). For each optimizer the
tables are planned in HBM; where they do not fit, with the largest in host memory behind a cache.
Nothing is allocated.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.planner.proposers import (
    EmbeddingOffloadScaleupProposer,
    Proposer,
)
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    ShardingOption,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import DataType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from tqdm import tqdm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from torchrec_freq.commands.arguments import whole_number
from torchrec_freq.commands.terminal import VisibleFormatter
from torchrec_freq.files import load_counts
from torchrec_freq.optimizer import FrequencySGD
from torchrec_freq.output import check_output, write_text
from torchrec_freq.planner import Counts, FrequencyStats, make_planner, shard_loads
from torchrec_freq.traffic import TableTraffic

HELP: Final = "plan tables on a cluster, with FrequencySGD beside other optimizers"

GB: Final = 1 << 30
"""As in TorchRec's planner and its reports."""

OPTIMIZERS: Final[Mapping[str, type[torch.optim.Optimizer]]] = {
    "FrequencySGD": FrequencySGD,
    "SGD": torch.optim.SGD,
    "RowWiseAdagrad": RowWiseAdagrad,
    "Adagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
}
SPECS: Final = Path(__file__).parent / "specs"
MOST_RANKS: Final = 4096
"""With as many, TorchRec's planner takes most of a minute to its first plan; its time grows with
the ranks."""

# Of rows, samples, gigabytes and such: above all hardware, and below what overflows.
_MOST: Final = 10**12

_DTYPES: Final = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}
_HBM_KERNELS: Final = [EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value]
_CACHED: Final = EmbeddingComputeKernel.FUSED_UVM_CACHING.value


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """A table of a spec.

    Attributes:
        rows: number of rows.
        dim: columns; a multiple of 4.
        dtype: of the weights: fp32, fp16 or bf16.
        pooling: mean ids a sample, of one feature or of each feature that reads the table.
    """

    name: str
    rows: int
    dim: int
    dtype: str = "fp32"
    pooling: float | Sequence[float] = 1

    def __post_init__(self) -> None:
        try:
            torch.nn.ModuleDict({self.name: torch.nn.Identity()})  # as TorchRec will
        except KeyError as error:
            raise ValueError(
                f"table {self.name!r}: a module cannot have this name: {error.args[0]}"
            ) from error
        for field, value, most in (("rows", self.rows, _MOST), ("dim", self.dim, 1 << 16)):
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(
                    f"table {self.name!r}: {field} must be a whole number >= 1 and <= {most}; got "
                    f"{value!r}"
                )
        if self.dim % 4:
            raise ValueError(f"table {self.name!r}: dim must be a multiple of 4; got {self.dim}")
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"table {self.name!r}: dtype must be one of {', '.join(_DTYPES)}; got "
                f"{self.dtype!r}"
            )
        if not self.pooling_factors or not all(
            type(ids) in (int, float) and 0 < ids <= _MOST for ids in self.pooling_factors
        ):
            raise ValueError(
                f"table {self.name!r}: pooling must be above 0 and <= {_MOST}, or a list of such "
                f"numbers; got {self.pooling!r}"
            )

    @property
    def pooling_factors(self) -> list[float]:
        """Mean ids a sample, by feature."""
        return list(self.pooling) if isinstance(self.pooling, list) else [self.pooling]  # type: ignore[list-item]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The ranks of a spec and their memory; bandwidths in GB a second, None for TorchRec's own.

    Attributes:
        ranks_per_host: None for one host.
        hbm_gb: of a rank.
        ddr_gb: of a host.
        reserved: share of the HBM that is kept for dense layers, activations and all else.
    """

    ranks: int
    ranks_per_host: int | None = None
    hbm_gb: float = 80
    ddr_gb: float = 1024
    reserved: float = 0.15
    hbm_bandwidth: float | None = None
    ddr_bandwidth: float | None = None
    hbm_to_ddr_bandwidth: float | None = None
    intra_host_bandwidth: float | None = None
    inter_host_bandwidth: float | None = None

    def __post_init__(self) -> None:
        for name in ("ranks", "ranks_per_host"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"cluster: {name} must be a whole number >= 1; got {value!r}")
        if self.ranks > MOST_RANKS:
            raise ValueError(
                f"cluster: ranks must be <= {MOST_RANKS}; got {self.ranks}. TorchRec's planner "
                "takes minutes to hours for its first plan on more"
            )
        if type(self.reserved) not in (int, float) or not 0 <= self.reserved < 1:
            raise ValueError(f"cluster: reserved must be 0 to below 1; got {self.reserved!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (
                field.name != "reserved"
                and value is not None
                and not (type(value) in (int, float) and 0 < value <= _MOST)
            ):
                raise ValueError(
                    f"cluster: {field.name} must be a number above 0 and <= {_MOST}; got {value!r}"
                )
        if self.ranks % self.per_host:
            raise ValueError(
                f"cluster: ranks must be a multiple of ranks_per_host ({self.per_host}); got "
                f"{self.ranks}"
            )

    @property
    def per_host(self) -> int:
        """Ranks of a host."""
        return min(self.ranks_per_host or self.ranks, self.ranks)

    def topology(self) -> Topology:
        """The cluster as the planner knows it, with GPUs."""

        def rate(bandwidth: float | None) -> float | None:
            return None if bandwidth is None else bandwidth * GB / 1000  # bytes a millisecond

        hardware = HardwareConfig(
            hbm_cap_bytes=int(self.hbm_gb * GB),
            ddr_cap_bytes=int(self.ddr_gb * GB / self.per_host),
            intra_host_bw=rate(self.intra_host_bandwidth),
            inter_host_bw=rate(self.inter_host_bandwidth),
            hbm_mem_bw=rate(self.hbm_bandwidth),
            ddr_mem_bw=rate(self.ddr_bandwidth),
            hbm_to_ddr_mem_bw=rate(self.hbm_to_ddr_bandwidth),
        )
        trainer = TrainerConfig(world_size=self.ranks, local_world_size=self.per_host)
        return TopologyFactory.create_topology(
            trainer, hardware, KernelConfig(compute_device="cuda")
        )


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Tables and a cluster to plan them on.

    Attributes:
        batch_size: samples of a rank's batch.
    """

    batch_size: int
    tables: Sequence[TableSpec]
    cluster: Cluster

    @property
    def rows(self) -> int:
        """Of all tables."""
        return sum(table.rows for table in self.tables)

    def constraints(self, kernels: Sequence[str]) -> dict[str, ParameterConstraints]:
        """By table, for the planner."""
        return {
            table.name: ParameterConstraints(
                compute_kernels=list(kernels), pooling_factors=table.pooling_factors
            )
            for table in self.tables
        }

    def model(self, optimizer: type[torch.optim.Optimizer]) -> EmbeddingBagCollection:
        """The tables without memory, with an optimizer named for them."""
        collection = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=table.name,
                    num_embeddings=table.rows,
                    embedding_dim=table.dim,
                    feature_names=[f"{table.name}_{i}" for i in range(len(table.pooling_factors))],
                    data_type=_DTYPES[table.dtype],
                )
                for table in self.tables
            ],
            device=torch.device("meta"),
        )
        apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": 0.1})
        return collection


def read_spec(path: Path, **overrides: Any) -> Spec:
    """A spec from a TOML file, or from the name of one in :data:`SPECS`.

    Args:
        overrides: values in place of the file's, for ``batch_size`` and the cluster; None is none.

    Raises:
        ValueError: not a spec; the message names the file and the key.
        OSError: the file cannot be read.
    """
    if not path.suffix:
        shipped = SPECS / f"{path}.toml"
        if not shipped.exists():
            names = ", ".join(sorted(file.stem for file in SPECS.glob("*.toml")))
            raise ValueError(f"No spec {str(path)!r}: give a .toml file, or one of {names}.")
        path = shipped
    try:
        data = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    try:
        return _spec(data, {key: value for key, value in overrides.items() if value is not None})
    except (TypeError, ValueError) as error:
        # A record's constructor names the key that it does not have, or lacks.
        raise ValueError(f"{path}: {error}".replace(".__init__()", "")) from error


def _spec(data: dict[str, Any], overrides: Mapping[str, Any]) -> Spec:
    shared = {key: data.pop(key) for key in ("dim", "dtype", "pooling") if key in data}
    tables, cluster = data.pop("tables", None), data.pop("cluster", None)
    if not (
        isinstance(tables, list) and tables and all(isinstance(t, dict) for t in tables)
    ) or not isinstance(cluster, dict):
        raise ValueError("needs a list of tables, tables = [{...}], and a section [cluster]")
    names = [table.get("name") for table in tables]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError("every table needs a name of its own")
    data |= {key: value for key, value in overrides.items() if key == "batch_size"}
    cluster |= {key: value for key, value in overrides.items() if key != "batch_size"}
    batch_size = data.pop("batch_size", None)
    if type(batch_size) is not int or not 1 <= batch_size <= _MOST:
        raise ValueError(
            f"batch_size must be a whole number of samples >= 1 and <= {_MOST}; got {batch_size!r}"
        )
    if data:
        raise ValueError(f"unknown keys: {', '.join(data)}")
    return Spec(
        batch_size=batch_size,
        tables=[TableSpec(**{**shared, **table}) for table in tables],
        cluster=Cluster(**cluster),
    )


@dataclass(frozen=True, kw_only=True)
class Result:
    """A plan for one optimizer.

    Attributes:
        fits: "in HBM", "with a cache" or "no".
        tables_gb: weights and optimizer state over all ranks, in HBM or DDR, with the space for a
            batch's ids and outputs.
        hbm_gb, ddr_gb: of the rank that has most.
        step_ms: the planner's estimate of a step of the embedding tables, on the slowest rank.
        load_factors: share of a cached table's rows that are in HBM, by table.
        imbalance: elements that the slowest rank reads, as a multiple of the mean; None without
            counts.
        seconds: planning time.
    """

    optimizer: str
    fits: str
    tables_gb: float | None = None
    hbm_gb: float | None = None
    ddr_gb: float | None = None
    step_ms: float | None = None
    load_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    imbalance: float | None = None
    seconds: float = 0


def plan(
    spec: Spec, optimizer: str, counts: Counts | None = None, timeout_seconds: int | None = None
) -> Result:
    """Plans a spec's tables with one of :data:`OPTIMIZERS`.

    Args:
        counts: by table name. With them, row-wise shards have their own loads, and caches grow
            into the memory that is left where they serve most.
        timeout_seconds: at least 1; ends the search of each of at most three plans with the best so
            far.

    Returns:
        The plan in HBM; if there is none, the one with cached tables in host memory.
    """
    search = _Search(spec, optimizer, counts, timeout_seconds)
    if search.run(spec.constraints(_HBM_KERNELS)):
        return search.result("in HBM")
    if not search.run(spec.constraints([*_HBM_KERNELS, _CACHED])):
        return Result(optimizer=optimizer, fits="no", seconds=search.seconds)
    if counts is not None:
        # TorchRec divides the memory for caches over tables of which all else is settled.
        search.run(_settled(search.options), EmbeddingOffloadScaleupProposer())
    return search.result("with a cache")


def _settled(options: Sequence[ShardingOption]) -> dict[str, ParameterConstraints]:
    """Constraints that leave of each table only what a plan chose."""
    return {
        option.name: ParameterConstraints(
            sharding_types=[option.sharding_type],
            compute_kernels=[option.compute_kernel],
            min_partition=option.shards[0].size[1],
            pooling_factors=option.input_lengths,
        )
        for option in options
    }


class _Search(FrequencyStats):
    """Searches of the planner for one optimizer, and the last plan that was found."""

    def __init__(
        self, spec: Spec, optimizer: str, counts: Counts | None, timeout_seconds: int | None
    ) -> None:
        super().__init__()
        self._spec, self._optimizer, self._counts = spec, optimizer, counts
        self._timeout_seconds = timeout_seconds
        self.seconds = 0.0

    def run(
        self, constraints: dict[str, ParameterConstraints], proposer: Proposer | None = None
    ) -> bool:
        """Whether there is a plan."""
        planner = make_planner(
            self._spec.cluster.topology(),
            self._spec.batch_size,
            constraints,
            counts=self._counts,
            proposer=proposer,
            storage_reservation=FixedPercentageStorageReservation(self._spec.cluster.reserved),
            stats=self,
            timeout_seconds=self._timeout_seconds,
        )
        sharder: Any = EmbeddingBagCollectionSharder()
        try:
            self.plan = planner.plan(self._spec.model(OPTIMIZERS[self._optimizer]), [sharder])
        except PlannerError:
            return False
        self.options = self._reported
        return True

    def log(self, *args: Any, best_plan: list[ShardingOption], **kwargs: Any) -> None:
        """Keeps what the planner reports, also of a failure, besides logging it."""
        super().log(*args, best_plan=best_plan, **kwargs)
        self._reported = best_plan
        self.seconds += kwargs["run_time"]

    def result(self, fits: str) -> Result:
        """Figures of the last plan."""
        ranks = self._spec.cluster.ranks
        hbm, ddr, step = [0] * ranks, [0] * ranks, [0.0] * ranks
        for option in self.options:
            for shard in option.shards:
                hbm[shard.rank] += shard.storage.hbm
                ddr[shard.rank] += shard.storage.ddr
                step[shard.rank] += shard.perf.total
        return Result(
            optimizer=self._optimizer,
            fits=fits,
            tables_gb=(sum(hbm) + sum(ddr)) / GB,
            hbm_gb=max(hbm) / GB,
            ddr_gb=max(ddr) / GB,
            step_ms=max(step),
            load_factors={
                option.name: option.cache_load_factor or UVM_CACHING_RATIO
                for option in self.options
                if option.compute_kernel == _CACHED
            },
            imbalance=self._imbalance(),
            seconds=self.seconds,
        )

    def _imbalance(self) -> float | None:
        if self._counts is None:
            return None
        ids = {table.name: sum(table.pooling_factors) for table in self._spec.tables}
        read = [0.0] * self._spec.cluster.ranks
        for load in shard_loads(self.plan, self._counts):
            read[load.rank] += ids[load.table] * load.share * load.columns
        return max(read) * len(read) / sum(read) if sum(read) else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what :func:`run` takes."""
    parser.add_argument("spec", type=Path, help="a .toml file, criteo-1tb or dlrm-dcnv2")
    parser.add_argument(
        "--counts",
        type=Path,
        metavar="FILE",
        help="file of counts with the spec's table names: hot shards cost more, caches are sized "
        "by table (default: all rows equal)",
    )
    parser.add_argument(
        "--ranks", type=whole_number, help=f"GPUs, up to {MOST_RANKS} (default: the spec's)"
    )
    parser.add_argument("--hbm-gb", type=float, help="HBM of a GPU, GB of 2^30 bytes")
    parser.add_argument(
        "--batch-size", type=whole_number, metavar="SAMPLES", help="samples of a rank"
    )
    parser.add_argument(
        "--optimizer",
        nargs="+",
        choices=OPTIMIZERS,
        default=list(OPTIMIZERS),
        help="those to plan (default: all)",
    )
    parser.add_argument(
        "--timeout",
        type=whole_number,
        metavar="SECONDS",
        help="take the best plan of this long a search; on 1024 ranks it takes minutes "
        "(default: search to the end)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plans here")
    parser.add_argument(
        "--report", action="store_true", help="also print TorchRec's report of each plan"
    )


def run(arguments: argparse.Namespace) -> None:
    """Plans what the command line says, and prints a table.

    Raises:
        ValueError: a wrong spec or file of counts.
        OSError: a file cannot be read or written.
    """
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
    with _reports() if arguments.report else contextlib.nullcontext():
        results = [
            plan(spec, optimizer, counts, arguments.timeout)
            for optimizer in tqdm(
                arguments.optimizer, desc="plan", unit=" optimizers", disable=None
            )
        ]
    print(table(spec, results))
    if arguments.json is not None:
        text = json.dumps([dataclasses.asdict(result) for result in results], indent=1)
        write_text(arguments.json, text + "\n")


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
    counts = load_counts(path).counts
    for name, counts_R in counts.items():
        if rows.get(name) != counts_R.numel():
            raise ValueError(
                f"{path}: table {name!r} of {counts_R.numel()} rows is not in the spec, which has "
                + ", ".join(f"{table} ({n} rows)" for table, n in rows.items())
            )
    return {name: TableTraffic.of(counts_R, table=name) for name, counts_R in counts.items()}


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
        factors = sorted({f"{factor:.2f}" for factor in r.load_factors.values()})
        cached = (
            f"{' to '.join(factors[:: max(len(factors) - 1, 1)])} ({len(r.load_factors)} tables)"
        )
        lines.append(
            f"| {r.optimizer} | {r.fits} | {number(r.tables_gb)} | {number(r.hbm_gb)} "
            f"| {number(r.ddr_gb)} | {number(r.step_ms)} | {cached} | {number(r.imbalance, 2)} "
            f"| {r.seconds:.1f} |"
        )
    return "\n".join(lines)
