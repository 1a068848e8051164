"""The settings of a training run: flags, a YAML file, and what cannot go together."""

from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_type_hints

from jsonargparse import ArgumentParser, Namespace
from torchrec.datasets.criteo import CAT_FEATURE_COUNT

from torchrec_freq.config import FrequencyConfig

DESCRIPTION: Final = """Trains TorchRec's DLRM on Criteo files, on any number of ranks.

The same command goes on from the last checkpoint in --out, also on another number of ranks.
Sizes are those of all ranks together unless said otherwise."""

MOST: Final = 2**62  # more does not fit what torch keeps it in


def number(default: Any, least: float = 1) -> Any:
    """A field that is a number, or a list of them, of at least so much."""
    metadata = {"least": least}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Samples; the last day is held out, its first half for validation, its second for the test.

    Args:
        folder: of day_0_dense.npy, day_0_sparse.npy, day_0_labels.npy, day_1_dense.npy and so on.
        synthetic: samples a day, four days, that are made up and written to the folder unless it
            exists. The folder is then .data/criteo-synthetic-N if none is given.
        rows: of each of the 26 tables; null: the largest id and one, found by the scan.
        max_rows: of a table; ids are taken modulo its rows. null: an id beyond its table is bad.
        scan: whether to check all samples before training, once a data set: ids in range, labels
            0 or 1, finite dense features.
        shuffle: whether to take the batches of an epoch in random order.
        threads: of a rank that read batches ahead, one each.
    """

    folder: Path | None = None
    synthetic: int | None = number(None, least=100)
    rows: list[int] | None = number(None)
    max_rows: int | None = number(None)
    scan: bool = True
    shuffle: bool = True
    threads: int = number(2)

    def __post_init__(self) -> None:
        if self.folder is None and self.synthetic is None:
            raise ValueError(
                "No data: give data.folder, or data.synthetic to train on made-up samples."
            )
        if self.rows is None and not self.scan:
            raise ValueError("data.scan is off, so the tables' rows are unknown: give data.rows.")
        if self.rows is not None and len(self.rows) != CAT_FEATURE_COUNT:
            raise ValueError(
                f"data.rows must be {CAT_FEATURE_COUNT} numbers, one a table; got {len(self.rows)}."
            )

    @property
    def path(self) -> Path:
        """The folder, of made-up samples too."""
        return self.folder or Path(".data") / f"criteo-synthetic-{self.synthetic}"


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model.

    Args:
        dim: columns of the tables, a multiple of 4.
        bottom: hidden layers of the dense features' network; one of dim follows.
        top: hidden layers of the last network; one of 1 follows.
        fp16_from: rows from which on a table is fp16 instead of fp32; 0: all are, null: none.
        autocast: whether the dense layers compute in bf16.
    """

    dim: int = number(16)
    bottom: list[int] = number([64])
    top: list[int] = number([64, 32])
    fp16_from: int | None = number(None, least=0)
    autocast: bool = False

    def __post_init__(self) -> None:
        if self.dim % 4:
            raise ValueError(f"model.dim must be a multiple of 4 for FBGEMM; got {self.dim}.")


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
    lr: float = number(0.05, least=0)
    dense_lr: float = number(1e-3, least=0)
    warmup: int = number(0, least=0)
    frequency: FrequencyConfig = field(default_factory=FrequencyConfig)

    def __post_init__(self) -> None:
        if self.name != "FrequencySGD" and self.frequency != FrequencyConfig():
            raise ValueError(
                f"optimizer.frequency is for FrequencySGD; optimizer.name is {self.name}."
            )


ShardingName = Literal[
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
]
KernelName = Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"]


@dataclass(frozen=True, kw_only=True)
class Planner:
    """How the tables are sharded. All of this may change when a run is resumed.

    Args:
        sharding: types that the planner may choose from; null: all that the optimizer works with.
            TorchRec trains data_parallel tables with FrequencySGD only.
        kernels: that it may choose from, dense for data_parallel; null: all.
        hbm_gb: GPU memory of a rank for tables and activations, in GB of 2^30 bytes; null:
            TorchRec's own figure.
        ddr_gb: host memory of a rank, in GB of 2^30 bytes; null: TorchRec's own figure.
        counts: file of row counts (python -m torchrec_freq count), from which the planner knows
            the hot rows; optimizer.frequency.count=frozen trains with them.
        report: whether to print the planner's report.
    """

    sharding: list[ShardingName] | None = None
    kernels: list[KernelName] | None = None
    hbm_gb: float | None = number(None, least=0)
    ddr_gb: float | None = number(None, least=0)
    counts: Path | None = None
    report: bool = False

    def __post_init__(self) -> None:
        if [] in (self.sharding, self.kernels):
            raise ValueError("planner.sharding and planner.kernels must not be empty; null: all.")


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

    every: int | None = number(None)
    samples: int | None = number(None)
    batch_size: int = number(16384)
    thresholds: int | None = number(None, least=2)

    def __post_init__(self) -> None:
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

    minutes: float = number(30, least=0)
    keep: int = number(2)
    not_saved: Literal["stop", "go_on"] = "stop"


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
        init_from: checkpoint of another run of the same model (its folder step-N), from which this
            run starts, at step 0, until it has a checkpoint of its own: with its weights, Adam,
            and what its tables' optimizer had learned. FrequencySGD and RowWiseAdagrad go on from
            each other's.
    """

    out: Path = Path("runs/train")
    batch_size: int = number(2048)
    epochs: int = number(1)
    max_steps: int | None = number(None)
    seed: int = number(0, least=0)
    log_every: int = number(50)
    init_from: Path | None = None
    data: Data
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    planner: Planner = field(default_factory=Planner)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)

    def __post_init__(self) -> None:
        name = self.optimizer.name
        if name != "FrequencySGD" and "data_parallel" in (self.planner.sharding or []):
            raise ValueError(
                f"planner.sharding: TorchRec does not train data_parallel tables with {name}. "
                "Leave it out, or use FrequencySGD."
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
        optimizer = asdict(self.optimizer)
        parts = {
            "data": {"shuffle": self.data.shuffle},
            "model": asdict(self.model),
            "optimizer.frequency": optimizer.pop("frequency"),
            "optimizer": optimizer,
        }
        flat = {f"{part}.{key}": v for part, values in parts.items() for key, v in values.items()}
        return flat | {"batch_size": self.batch_size, "seed": self.seed}


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from flags (None: those of the command line) and the YAML file of --config.

    Raises:
        ValueError: an unknown key, or a value that cannot be.
        SystemExit: after --help and --print_config.
    """
    parser = ArgumentParser(
        prog="torchrun --nproc-per-node N -m examples.criteo",
        description=DESCRIPTION,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(Settings)
    try:
        parsed = parser.parse_args(arguments)
        _check(Settings, parsed)
        parser.validate(parsed, skip_unset=False)  # a null for a number, too
        parsed = parser.instantiate(parsed)
    except (ArgumentError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("--config: the file is nested too deeply, or refers to itself.") from error
    return Settings(**{entry.name: parsed[entry.name] for entry in fields(Settings)})


def _check(section: Any, parsed: Namespace, prefix: str = "") -> None:
    """Refuses numbers out of range, and what jsonargparse takes for a section: anything."""
    kinds = get_type_hints(section)
    for entry in fields(section):
        name, value = f"{prefix}{entry.name}", parsed[entry.name]
        if is_dataclass(kind := kinds[entry.name]):
            if not isinstance(value, Namespace):
                raise ValueError(f"{name} must be a section of settings; got {value!r}.")
            _check(kind, value, f"{name}.")
        if (least := entry.metadata.get("least")) is None:
            continue
        for given in value if isinstance(value, list) else [value]:
            if isinstance(given, (int, float)) and not least <= given <= MOST:
                raise ValueError(f"{name} must be from {least} to 2^62; got {given}.")
