"""The settings of a training run, and the only place that checks them: flags, YAML, messages."""

import math
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Final, Literal, get_args, get_type_hints

from jsonargparse import ArgumentParser, Namespace
from torchrec.datasets.criteo import CAT_FEATURE_COUNT
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ShardingType

from torchrec_freq.config import FrequencyConfig

DESCRIPTION: Final = """Trains TorchRec's DLRM on Criteo files, on any number of ranks.

The same command goes on from the last checkpoint in --out, also on another number of ranks.
Sizes are those of all ranks together unless said otherwise."""

_MOST: Final = 2**62  # more does not fit what torch keeps it in

SHARDING_TYPES: Final = [kind.value for kind in ShardingType]
KERNELS: Final = [
    EmbeddingComputeKernel.FUSED.value,
    EmbeddingComputeKernel.FUSED_UVM.value,
    EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
    EmbeddingComputeKernel.DENSE.value,
]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Samples; the last day is held out, its first half for validation, its second for the test.

    Args:
        folder: of day_0_dense.npy, day_0_sparse.npy, day_0_labels.npy, day_1_dense.npy and so on.
        synthetic: samples a day, four days, that are made up and written to the folder unless it
            exists. The folder is then .data/criteo-synthetic-N if none is given.
        rows: of each of the 26 tables; null: the largest id and one, found by the scan.
        max_rows: of a table; ids are taken modulo its rows. null: an id beyond its table is bad.
        scan: whether to check all samples before training, once a data set.
        bad_rows: what to do with samples that have an id out of range, a label that is not 0 or 1,
            or a dense feature that is no finite number.
        shuffle: whether to take the batches of an epoch in random order.
        threads: of a rank that read batches ahead, one each.
    """

    folder: Path | None = None
    synthetic: int | None = None
    rows: list[int] | None = None
    max_rows: int | None = None
    scan: bool = True
    bad_rows: Literal["stop", "skip"] = "stop"
    shuffle: bool = True
    threads: int = 2

    def __post_init__(self) -> None:
        if self.folder is None and self.synthetic is None:
            raise ValueError(
                "No data: give data.folder, or data.synthetic to train on made-up samples."
            )
        _at_least(100, self, "data.synthetic")
        _at_least(1, self, "data.rows", "data.max_rows", "data.threads")
        if self.rows is None and not self.scan:
            raise ValueError("data.scan is off, so the tables' rows are unknown: give data.rows.")
        if self.rows is not None and len(self.rows) != CAT_FEATURE_COUNT:
            raise ValueError(
                f"data.rows must be {CAT_FEATURE_COUNT} numbers, one a table; got {len(self.rows)}."
            )
        if self.bad_rows == "skip" and not self.scan:
            raise ValueError("data.bad_rows=skip needs data.scan, which finds them.")

    @property
    def path(self) -> Path:
        """The folder, of made-up samples too."""
        return self.folder or Path(".data") / f"criteo-synthetic-{self.synthetic}"


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model.

    Args:
        kind: TorchRec's DLRM, or DLRM_DCN with a cross network in place of the dot products.
        dim: columns of the tables, a multiple of 4.
        bottom: hidden layers of the dense features' network; one of dim follows.
        top: hidden layers of the last network; one of 1 follows.
        dcn_layers: of DLRM_DCN.
        dcn_rank: of DLRM_DCN's low-rank matrices.
        fp16_from: rows from which on a table is fp16 instead of fp32; 0: all are, null: none.
        autocast: whether the dense layers compute in bf16.
    """

    kind: Literal["DLRM", "DLRM_DCN"] = "DLRM"
    dim: int = 16
    bottom: list[int] = field(default_factory=lambda: [64])
    top: list[int] = field(default_factory=lambda: [64, 32])
    dcn_layers: int | None = None
    dcn_rank: int | None = None
    fp16_from: int | None = None
    autocast: bool = False

    def __post_init__(self) -> None:
        _at_least(1, self, "model.dim", "model.bottom", "model.top")
        _at_least(1, self, "model.dcn_layers", "model.dcn_rank")
        _at_least(0, self, "model.fp16_from")
        if self.dim % 4:
            raise ValueError(f"model.dim must be a multiple of 4 for FBGEMM; got {self.dim}.")
        given = [self.dcn_layers is not None, self.dcn_rank is not None]
        if self.kind == "DLRM" and any(given):
            raise ValueError("model.dcn_layers and dcn_rank are for model.kind=DLRM_DCN.")
        if self.kind == "DLRM_DCN" and not all(given):
            raise ValueError("model.kind=DLRM_DCN needs model.dcn_layers and model.dcn_rank.")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizers: one of the tables, and Adam for the dense layers.

    Args:
        name: of the tables' optimizer.
        lr: learning rate of the tables.
        dense_lr: learning rate of Adam.
        warmup: steps over which both rates rise from 0, linearly.
        frequency: options of FrequencySGD.
    """

    name: Literal["FrequencySGD", "SGD", "RowWiseAdagrad", "Adagrad"] = "FrequencySGD"
    lr: float = 0.05
    dense_lr: float = 1e-3
    warmup: int = 0
    frequency: FrequencyConfig = field(default_factory=FrequencyConfig)

    def __post_init__(self) -> None:
        for name, rate in (("lr", self.lr), ("dense_lr", self.dense_lr)):
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"optimizer.{name} must be a finite number >= 0; got {rate}.")
        _at_least(0, self, "optimizer.warmup")
        if self.name != "FrequencySGD" and self.frequency != FrequencyConfig():
            raise ValueError(
                f"optimizer.frequency is for FrequencySGD; optimizer.name is {self.name}."
            )


@dataclass(frozen=True, kw_only=True)
class Planner:
    """How the tables are sharded. All of this may change when a run is resumed.

    Args:
        sharding: types that the planner may choose from (table_wise, row_wise, column_wise,
            table_row_wise, table_column_wise, grid_shard, data_parallel); null: all that the
            optimizer works with. TorchRec trains data_parallel tables with FrequencySGD only.
        kernels: that it may choose from (fused, fused_uvm, fused_uvm_caching, and dense for
            data_parallel); null: all.
        hbm_gb: GPU memory of a rank for tables and activations, in GB of 2^30 bytes; null:
            TorchRec's own figure.
        ddr_gb: host memory of a rank, in GB of 2^30 bytes; null: TorchRec's own figure.
        counts: file of row counts (python -m torchrec_freq count), from which the planner knows
            the hot rows; optimizer.frequency.count=frozen trains with them.
        report: whether to print the planner's report.
    """

    sharding: list[str] | None = None
    kernels: list[str] | None = None
    hbm_gb: float | None = None
    ddr_gb: float | None = None
    counts: Path | None = None
    report: bool = False

    def __post_init__(self) -> None:
        for name, known in (("sharding", SHARDING_TYPES), ("kernels", KERNELS)):
            chosen: Sequence[str] | None = getattr(self, name)
            if chosen is not None and (not chosen or not set(chosen) <= set(known)):
                raise ValueError(
                    f"planner.{name} must be some of {', '.join(known)}; got {chosen}."
                )
        for name in ("hbm_gb", "ddr_gb"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"planner.{name} must be a number above 0; got {value}.")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When and how AUC and log loss are measured. The end is always one of the times.

    Args:
        every: steps from one evaluation on the validation samples to the next; null: none but the
            last.
        samples: of the validation half that are used before the end; null: all.
        batch_size: samples, all ranks.
        thresholds: of a binned AUC, which needs the same memory for any number of samples. null:
            the exact AUC, which gathers 12 bytes a sample on every rank.
    """

    every: int | None = None
    samples: int | None = None
    batch_size: int = 16384
    thresholds: int | None = None

    def __post_init__(self) -> None:
        _at_least(1, self, "evaluation.every", "evaluation.samples", "evaluation.batch_size")
        _at_least(2, self, "evaluation.thresholds")
        if self.samples is not None and self.every is None:
            raise ValueError(
                "evaluation.samples is for the evaluations along the way: give evaluation.every."
            )


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Checkpoints. One is also made at the end and after SIGTERM.

    Args:
        minutes: from one checkpoint to the next, by the clock of rank 0.
        keep: how many of the last ones are kept.
        not_saved: what to do where a checkpoint along the way cannot be written, as on a full disk:
            stop, or go_on and try again when the next one is due. The last good one is kept.
    """

    minutes: float = 30
    keep: int = 2
    not_saved: Literal["stop", "go_on"] = "stop"

    def __post_init__(self) -> None:
        if not self.minutes >= 0:
            raise ValueError(f"checkpoint.minutes must be >= 0; got {self.minutes}.")
        _at_least(1, self, "checkpoint.keep")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The run.

    Args:
        out: folder of the checkpoints, the TensorBoard files and the summary. Every rank must see
            the same one.
        batch_size: samples a step, all ranks.
        epochs: passes over the train days; samples that do not fill a batch are left out.
        max_steps: ends the run sooner.
        seed: of the initial weights and the order of the batches.
        log_every: steps from one line of figures to the next. Checkpoints and SIGTERM wait for
            one, as only there the host waits for the device.
        init_from: checkpoint of another run of the same model (its folder step-N), from whose
            weights and Adam this run starts, at step 0, until it has a checkpoint of its own.
        init_counts: what the optimizer of the tables starts from. sums: what that of init_from had
            learned, row-wise Adagrad's sums or FrequencySGD's counts, so that every row keeps its
            rate; zero: nothing; else a file of counts for FrequencySGD (python -m torchrec_freq
            count or from-adagrad).
    """

    out: Path = Path("runs/train")
    batch_size: int = 2048
    epochs: int = 1
    max_steps: int | None = None
    seed: int = 0
    log_every: int = 50
    init_from: Path | None = None
    init_counts: str = "sums"
    data: Data
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    planner: Planner = field(default_factory=Planner)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)

    def __post_init__(self) -> None:
        _at_least(1, self, "batch_size", "epochs", "max_steps", "log_every")
        _at_least(0, self, "seed")
        sharding = self.planner.sharding or []
        if self.optimizer.name != "FrequencySGD" and "data_parallel" in sharding:
            raise ValueError(
                f"planner.sharding: TorchRec does not train data_parallel tables with "
                f"{self.optimizer.name}. Leave it out, or use FrequencySGD."
            )
        name = self.optimizer.name
        if self.init_counts not in ("sums", "zero") and name != "FrequencySGD":
            raise ValueError(
                f"init_counts={self.init_counts}: a file of counts is for FrequencySGD; "
                f"optimizer.name is {name}. Use sums or zero."
            )
        if self.init_from and self.init_counts == "sums" and name in ("SGD", "Adagrad"):
            raise ValueError(
                f"init_counts=sums: {name} cannot go on from another optimizer's sums. Use zero."
            )
        if self.optimizer.frequency.count == "frozen" and self.planner.counts is None:
            raise ValueError("optimizer.frequency.count=frozen needs the file planner.counts.")

    def for_ranks(self, ranks: int) -> None:
        """Refuses a number of ranks that the batches cannot be shared by.

        Gradients are means over the ranks, so unequal shares would weigh samples unequally. In an
        evaluation they may be unequal, but no rank goes without.
        """
        if self.batch_size % ranks:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of the {ranks} ranks. "
                f"Try {max(1, self.batch_size // ranks) * ranks}."
            )
        if self.evaluation.batch_size < ranks:
            raise ValueError(
                f"evaluation.batch_size {self.evaluation.batch_size} is less than the {ranks} "
                "ranks. Each needs a sample."
            )

    def lasting(self) -> dict[str, Any]:
        """What a run must have in common with the checkpoint that it resumes."""
        lasting = {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "data.shuffle": self.data.shuffle,
        }
        for name, part in (
            ("model", self.model),
            ("optimizer", self.optimizer),
            ("optimizer.frequency", self.optimizer.frequency),
        ):
            lasting |= {f"{name}.{key}": value for key, value in vars(part).items()}
        del lasting["optimizer.frequency"]
        return lasting


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from flags (None: those of the command line) and the YAML file of --config.

    Raises:
        ValueError: an unknown key, or a value that cannot be.
        SystemExit: after --help and --print_config.
    """
    parser = ArgumentParser(
        prog="torchrun --nproc-per-node N -m criteo",
        description=DESCRIPTION,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(Settings)
    try:
        parsed = parser.parse_args(arguments)
        _check_kinds(Settings, parsed)
        parsed = parser.instantiate(parsed)
    except (ArgumentError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("--config: the file is nested too deeply, or refers to itself.") from error
    return Settings(**{entry.name: parsed[entry.name] for entry in fields(Settings)})


def _check_kinds(section: Any, parsed: Any, prefix: str = "") -> None:
    """Refuses what jsonargparse takes from a file: a null for a number, anything for a section."""
    for name, kind in get_type_hints(section).items():
        value = parsed[name]
        if is_dataclass(kind):
            if not isinstance(value, Namespace):
                raise ValueError(f"{prefix}{name} must be a section of settings; got {value!r}.")
            _check_kinds(kind, value, f"{prefix}{name}.")
        elif value is None and NoneType not in get_args(kind):
            raise ValueError(f"{prefix}{name} must not be null; leave it out for its default.")


def _at_least(minimum: int, part: object, *paths: str) -> None:
    """Refuses settings of a part, named by their paths, that are smaller, or vast."""
    for path in paths:
        setting = getattr(part, path.split(".")[-1])
        for value in setting if isinstance(setting, list) else [setting]:
            if value is not None and value < minimum:
                raise ValueError(f"{path} must be at least {minimum}; got {value}.")
            if value is not None and value > _MOST:
                raise ValueError(f"{path} must be at most {_MOST}; got {value}.")
