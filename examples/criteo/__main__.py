"""Trains TorchRec's DLRM on Criteo files or made-up ones.

    torchrun --standalone --nproc-per-node 2 -m examples.criteo --config examples/criteo/smoke.yaml

The same on two CPU ranks (gloo) and on many GPUs (nccl). --help lists the settings. Run again, it
goes on from the last checkpoint, on any number of ranks; SIGTERM makes one and ends it with code
143 (torchrun waits --shutdown-timeout seconds for that, 30 unless told).
"""

import contextlib
import io
import json
import os
import sys
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from benchmarks.common import planted
from benchmarks.common.checkpoint import Checkpoints, NotSaved
from benchmarks.common.ranks import gather, start_ranks
from benchmarks.common.ranks import together as agreed
from benchmarks.common.training import optimizer_bytes
from examples.criteo.batches import Batches
from examples.criteo.days import Day, Days, find_days
from examples.criteo.loop import Loop
from examples.criteo.model import build
from examples.criteo.progress import table
from examples.criteo.refusal import Refused, say_error, together
from examples.criteo.scan import scan
from examples.criteo.settings import Settings, parse
from torchrec_freq.output import check_folder, write_text


def prepare(settings: Settings) -> tuple[list[Day], list[int]]:
    """The days, and the rows of the tables. All ranks must call it.

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
    seen = gather([(day.path("dense").name, day.samples) for day in days])
    if other := [rank for rank, files in enumerate(seen) if files != seen[0]]:
        raise ValueError(f"Rank {other[0]} sees other files in {data.path} than rank 0.")
    rows = data.rows
    if data.scan:
        # Ids that are taken modulo the rows have no upper bound.
        bounds = None if data.max_rows is not None else data.rows
        largest = scan(Days(days), bounds, settings.out / "scan.json")
        rows = rows or [most + 1 for most in largest]
    assert rows is not None
    return days, [min(count, data.max_rows or count) for count in rows]


def set_up(settings: Settings, device: torch.device, days: list[Day], rows: list[int]) -> Loop:
    """The model and its data, after the last checkpoint if there is one.

    Raises:
        ValueError, OSError: data, settings or checkpoints that cannot be gone on with.
    """
    train_days, last_day = Days(days[:-1]), Days(days[-1:])
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
    modulo = None if settings.data.max_rows is None else rows
    evaluation = settings.evaluation
    some = evaluation.samples and max(evaluation.samples, dist.get_world_size())
    return Loop(
        settings,
        build(settings, rows, device),
        Batches(
            train_days,
            range(len(train_days)),
            rows=modulo,
            batch_size=settings.batch_size,
            whole=True,
            order_seed=settings.seed if settings.data.shuffle else None,
        ),
        {
            name: Batches(last_day, part, rows=modulo, batch_size=evaluation.batch_size)
            for name, part in (("some", valid[:some]), ("valid", valid), ("test", test))
        },
        Checkpoints(
            settings.out / "checkpoints",
            settings={**settings.lasting(), "train samples": len(train_days), "rows": rows},
            keep=settings.checkpoint.keep,
        ),
    )


def train(settings: Settings, device: torch.device) -> None:
    """Trains to the end, and leaves a summary.

    Raises:
        Refused: data, settings, checkpoints or a loss that cannot be gone on with.
        NotSaved: a checkpoint or the summary cannot be written.
    """
    try:
        days, rows = prepare(settings)
        loop = set_up(settings, device, days, rows)
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error
    loop.run()
    progress, samples = loop.progress, loop.step * settings.batch_size
    summary = {
        **asdict(progress),  # of training, without evaluations and checkpoints; all restarts
        "steps": loop.step,
        "samples": samples,
        "ranks": dist.get_world_size(),
        "device": device.type,
        "samples_per_second": samples / progress.seconds if progress.seconds else 0.0,
        "valid": progress.curve[-1]["valid"],
        "test": progress.curve[-1]["test"],
        "optimizer_bytes_per_row": optimizer_bytes(loop.training.model) / sum(rows),
        "checkpoint": str(loop.checkpoints.folder / f"step-{loop.step:08}"),
        "settings": loop.checkpoints.settings,
    }
    with agreed(NotSaved, OSError):
        if dist.get_rank() == 0:
            write_text(settings.out / "summary.json", json.dumps(summary, indent=1) + "\n")
            print(table(summary), flush=True)


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
    with start_ranks() as device:
        try:
            train(settings, device)
        except (Refused, NotSaved) as error:  # of all ranks
            say_error(str(error))
            raise SystemExit(2) from None


if __name__ == "__main__":
    main()
