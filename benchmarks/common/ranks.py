"""The ranks of a program: their group, which device each has, and errors that end all of them."""

import contextlib
import gc
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.rendezvous import rendezvous


@contextlib.contextmanager
def start_ranks() -> Iterator[torch.device]:
    """This rank's device, in a group of the ranks that torchrun has started, which it ends.

    A process that torchrun has not started is the only rank. On CUDA the group is nccl's, on CPU
    gloo's.
    """
    # What TorchRec and TorchMetrics 1.0 say about their own use of torch is no news to a reader.
    warnings.filterwarnings("ignore", module="torchrec|torchmetrics")
    warnings.filterwarnings("ignore", "Please use DTensor", FutureWarning)
    warnings.filterwarnings("ignore", "fbgemm::dense_embedding", UserWarning)
    # The root's: TorchRec warns of each data-parallel table that it has no sharding spec.
    for name in ("torchrec", "torch.fx", None):
        logging.getLogger(name).setLevel(logging.ERROR)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    connect("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        dist.barrier()  # no rank leaves while another still talks to it
    except SystemExit as meant:  # on every rank
        leave(meant)
        raise
    # Not after an error: NCCL may wait there for ranks that wait for this one.
    leave()


def leave(error: BaseException | None = None) -> None:
    """Ends the process group and its threads.

    gloo's threads live as long as anything holds the group, as models do. One that lets go of a
    tensor while the interpreter ends would abort the process (pytorch/pytorch#190489).

    Args:
        error: that ends the program; what it passed through on its way is forgotten.
    """
    dist.destroy_process_group()
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    for _ in range(3):  # what the first finds may hold circles that hold the group
        gc.collect()


def connect(backend: str) -> None:
    """Starts the process group.

    torchrun keeps one store over its restarts, in which the ranks would find the addresses of those
    that have died, and wait for them (pytorch/pytorch#135712). So each restart has keys of its own.
    A host that was replaced counts them anew: with several hosts, start torchrun with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which gives each restart a new store.
    """
    if "RANK" in os.environ:
        store, rank, ranks = next(rendezvous("env://"))
    else:
        store, rank, ranks = dist.HashStore(), 0, 1
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)


@contextlib.contextmanager
def together(
    refuse: Callable[[int | None, str], Exception], *refused: type[Exception]
) -> Iterator[None]:
    """A body that may fail on some ranks; then all of them raise, and none waits for another.

    Every rank must enter it.

    Args:
        refuse: makes what all ranks raise where one has one of the errors in `refused`, of its
            number if it has one and of what it says.

    Raises:
        RuntimeError: another rank has an error that is none of these. Where it is this one's, that.
    """
    failure: Exception | CheckpointException | None = None
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        failure = error
    known = isinstance(failure, refused)
    said = gather(failure and (known, getattr(failure, "errno", None), str(failure)))
    # An error that is known comes first: others may be what DCP makes of it.
    failed = [(*report, rank) for rank, report in enumerate(said) if report]
    if not failed:
        return
    known, number, message, rank = max(failed, key=lambda report: report[0])
    if set(said) != {said[0]}:
        message = f"on rank {rank}: {message}"
    if known:
        raise refuse(number, message) from failure
    raise failure or RuntimeError(message)


def gather(value: Any) -> list[Any]:
    """The values of all ranks, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
