"""What is to be planned: tables and a cluster, from a file of TOML."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import DataType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GB: Final = 1 << 30
"""As in TorchRec's planner and its reports."""

SPECS: Final = Path(__file__).parent / "specs"

MOST_RANKS: Final = 4096
"""With as many, TorchRec's planner takes most of a minute to its first plan; its time grows with
the ranks."""

_MOST: Final = 10**12
"""Of rows, samples, gigabytes and such: above all hardware, and below what overflows."""

_DTYPES: Final = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}


def _check(name: str, value: Any, most: int = _MOST, *, whole: bool = False) -> None:
    if type(value) not in ((int,) if whole else (int, float)) or not 0 < value <= most:
        number = "a whole number >= 1" if whole else "a number above 0"
        raise ValueError(f"{name} must be {number} and <= {most}; got {value!r}")


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
        table = f"table {self.name!r}"
        try:
            torch.nn.ModuleDict({self.name: torch.nn.Identity()})  # as TorchRec will
        except KeyError as error:
            raise ValueError(f"{table}: a module cannot have this name: {error.args[0]}") from error
        _check(f"{table}: rows", self.rows, whole=True)
        _check(f"{table}: dim", self.dim, 1 << 16, whole=True)
        if self.dim % 4:
            raise ValueError(f"{table}: dim must be a multiple of 4; got {self.dim}")
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"{table}: dtype must be one of {', '.join(_DTYPES)}; got {self.dtype!r}"
            )
        factors: list[Any] = self.pooling_factors
        for ids in factors or [factors]:
            _check(f"{table}: pooling, or each of a list,", ids)

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
        for name, value in vars(self).items():
            if name == "reserved":
                if type(value) not in (int, float) or not 0 <= value < 1:
                    raise ValueError(f"cluster: reserved must be 0 to below 1; got {value!r}")
            elif value is not None:
                most = MOST_RANKS if name == "ranks" else _MOST
                _check(f"cluster: {name}", value, most, whole=name.startswith("ranks"))
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
        kernels = KernelConfig(compute_device="cuda")
        return TopologyFactory.create_topology(trainer, hardware, kernels)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Tables and a cluster to plan them on.

    Attributes:
        batch_size: samples of a rank's batch.
    """

    batch_size: int
    tables: Sequence[TableSpec]
    cluster: Cluster

    def __post_init__(self) -> None:
        _check("batch_size", self.batch_size, whole=True)

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


def read_spec(path: Path, *, batch_size: int | None = None, **cluster: Any) -> Spec:
    """A spec from a TOML file, or from the name of one in :data:`SPECS`.

    Args:
        batch_size, cluster: values in place of the file's; None is none.

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
    if batch_size is not None:
        data["batch_size"] = batch_size
    try:
        return _spec(data, {key: value for key, value in cluster.items() if value is not None})
    except (TypeError, ValueError) as error:
        # A record's constructor names the key that it does not have, or lacks.
        raise ValueError(f"{path}: {error}".replace(".__init__()", "")) from error


def _spec(data: dict[str, Any], given: Mapping[str, Any]) -> Spec:
    shared = {key: data.pop(key) for key in ("dim", "dtype", "pooling") if key in data}
    tables, cluster = data.pop("tables", None), data.pop("cluster", None)
    if not (isinstance(tables, list) and tables and isinstance(cluster, dict)) or not all(
        isinstance(table, dict) for table in tables
    ):
        raise ValueError("needs a list of tables, tables = [{...}], and a section [cluster]")
    names = [table.get("name") for table in tables]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError("every table needs a name of its own")
    return Spec(
        **data,
        tables=[TableSpec(**{**shared, **table}) for table in tables],
        cluster=Cluster(**{**cluster, **given}),
    )
