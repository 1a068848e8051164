"""Trains TorchRec's DLRM on Criteo files or made-up ones.

    torchrun --standalone --nproc-per-node 2 -m criteo --config criteo/smoke.yaml

The same on two CPU ranks (gloo) and on many GPUs (nccl). --help lists the settings. Run again, it
goes on from the last checkpoint, on any number of ranks; SIGTERM makes one and ends it with code
143 (torchrun waits --shutdown-timeout seconds for that, 30 unless told).
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous

from benchmarks.study import planted
from criteo.config import Settings, parse
from criteo.data import Batches, Day, Days, find_days
from criteo.loop import Loop
from criteo.model import build
from criteo.monitor import Summary
from criteo.ranks import Refused, gather, say_error, together
from criteo.scan import Scan, scan
from examples.checkpoint import Checkpoints, NotSaved
from examples.demo import optimizer_bytes
from torchrec_freq.output import check_folder


def prepare(settings: Settings) -> tuple[list[Day], list[int], Scan | None]:
    """The days, the rows of the tables, and what the scan found. All ranks must call it.

    Raises:
        ValueError: files that cannot be trained on, the same on every rank.
    """
    with together():  # before hours of work
        if dist.get_rank() == 0:
            check_folder(settings.out)
    data = settings.data
    # Rank 0 alone, then one rank of each host that does not see its folder.
    for writes in (dist.get_rank() == 0, int(os.environ.get("LOCAL_RANK", 0)) == 0):
        with together():
            if data.synthetic is not None and writes:
                task = planted.Task(samples=data.synthetic, held_out=data.synthetic)
                planted.generate(task, data.path)
    with together():
        days = find_days(data.path)
        if data.synthetic is not None and any(day.samples != data.synthetic for day in days):
            raise ValueError(
                f"{data.path} holds other data than data.synthetic={data.synthetic} asks for. "
                "Leave it out to train on them, or name another data.folder."
            )
    seen = gather([(day.files["dense"].name, day.samples) for day in days])
    if other := [rank for rank, files in enumerate(seen) if files != seen[0]]:
        raise ValueError(f"Rank {other[0]} sees other files in {data.path} than rank 0.")
    # Ids that are taken modulo the rows have no upper bound.
    bounds = None if data.max_rows is not None else data.rows
    found = None
    if data.scan:
        found = scan(Days(days), bounds, settings.out / "scan.json")
        if found.bad and data.bad_rows == "stop":
            raise ValueError(
                f"{found.message()}\nRepair the files, or leave these rows out with "
                "--data.bad_rows skip."
            )
        if found.bad and dist.get_rank() == 0:
            print(f"Left out: {found.message()}", flush=True)
    if data.rows is not None:
        rows = data.rows
    else:
        assert found is not None
        rows = [max(largest, 0) + 1 for largest in found.largest]
    if data.max_rows is not None:
        rows = [min(count, data.max_rows) for count in rows]
    return days, rows, found


@dataclass(frozen=True)
class Run:
    """What is to be trained, and what a summary says of it."""

    loop: Loop
    rows: int
    bad_rows: int
    lasting: dict[str, Any]


def set_up(settings: Settings, device: torch.device) -> Run:
    """The model and its data, after the last checkpoint if there is one.

    Raises:
        ValueError, OSError: data, settings or checkpoints that cannot be gone on with.
    """
    days, rows, found = prepare(settings)
    bad = np.array([] if found is None else found.bad, dtype=np.int64)
    first_held_out = sum(day.samples for day in days[:-1])
    train_days = Days(days[:-1], bad[bad < first_held_out])
    last_day = Days(days[-1:], bad[bad >= first_held_out] - first_held_out)
    half = (len(last_day) + 1) // 2  # as TorchRec halves it
    valid, test = range(half), range(half, len(last_day))
    if len(train_days) < settings.batch_size:
        raise ValueError(
            f"batch_size {settings.batch_size} is more than the {len(train_days)} train samples."
        )
    if len(test) < dist.get_world_size():
        raise ValueError(
            f"The last day's {len(last_day)} samples are too few to hold out: each half needs one "
            f"for each of the {dist.get_world_size()} ranks."
        )

    def batches(days: Days, part: range, batch_size: int, **options: Any) -> Batches:
        modulo = settings.data.max_rows is not None
        return Batches(days, part, rows=rows, modulo=modulo, batch_size=batch_size, **options)

    evaluation = settings.evaluation
    some = evaluation.samples and max(evaluation.samples, dist.get_world_size())
    training = build(settings, rows, device)
    lasting = {**settings.lasting(), "train samples": len(train_days), "rows": rows}
    loop = Loop(
        settings,
        training,
        batches(
            train_days,
            range(len(train_days)),
            settings.batch_size,
            whole=True,
            order_seed=settings.seed if settings.data.shuffle else None,
        ),
        {
            "some": batches(last_day, valid[:some], evaluation.batch_size),
            "valid": batches(last_day, valid, evaluation.batch_size),
            "test": batches(last_day, test, evaluation.batch_size),
        },
        Checkpoints(settings.out / "checkpoints", settings=lasting, keep=settings.checkpoint.keep),
    )
    return Run(loop, sum(rows), len(bad), lasting)


def train(settings: Settings, device: torch.device) -> None:
    """Trains to the end, and leaves a summary.

    Raises:
        Refused: data, settings, checkpoints or a loss that cannot be gone on with.
        NotSaved: a checkpoint or the summary cannot be written.
    """
    try:
        run = set_up(settings, device)
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error
    loop = run.loop
    loop.run()
    end = loop.progress.curve[-1]
    summary = Summary(
        steps=loop.step,
        samples=loop.step * settings.batch_size,
        ranks=dist.get_world_size(),
        device=device.type,
        seconds=loop.progress.seconds,
        train_loss=loop.progress.train_loss,
        valid=end["valid"],
        test=end["test"],
        optimizer_bytes_per_row=optimizer_bytes(loop.training.model) / run.rows,
        bad_rows=run.bad_rows,
        checkpoint=str(loop.checkpoints.folder / f"step-{loop.step:08}"),
        curve=loop.progress.curve,
        settings=run.lasting,
    )
    if dist.get_rank() == 0:
        try:
            summary.write(settings.out / "summary.json")
        except OSError as error:
            raise NotSaved(error.errno, str(error)) from error
        print(summary.table(), flush=True)


def connect(backend: str) -> None:
    """Starts the process group.

    torchrun keeps one store over its restarts, in which the ranks would find the addresses of those
    that have died, and wait for them (pytorch/pytorch#135712). So each restart has keys of its own.
    A host that was replaced counts them anew: with several hosts, start torchrun with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which gives each restart a new store.
    """
    store, rank, ranks = next(rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)


@record
def main() -> None:
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        with contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO()):
            settings = parse()  # prints help, once
        if "RANK" not in os.environ:
            raise ValueError("Start it with torchrun, which sets the ranks (see --help).")
        settings.for_ranks(int(os.environ["WORLD_SIZE"]))
    except ValueError as error:  # the same on every rank
        if first:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    # What TorchRec and TorchMetrics 1.0 say about their own use of torch is no news to a reader.
    warnings.filterwarnings("ignore", module="torchrec|torchmetrics")
    warnings.filterwarnings("ignore", "Please use DTensor", FutureWarning)
    warnings.filterwarnings("ignore", "fbgemm::dense_embedding", UserWarning)
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # TorchRec warns of each data-parallel table that it has no sharding spec.
    logging.getLogger().setLevel(logging.ERROR)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    connect("nccl" if device.type == "cuda" else "gloo")
    try:
        train(settings, device)
    except (Refused, NotSaved) as error:
        say_error(str(error))
        raise SystemExit(2) from None
    except SystemExit:  # SIGTERM, on every rank
        dist.destroy_process_group()
        raise
    # Not after an error: NCCL may wait there for ranks that wait for this one.
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
