"""torchx component that trains criteo on nodes x ranks, under any of torchx's schedulers.

    torchx run -s local_cwd launch/components.py:dlrm -j 1x2 -- --config FILE
    torchx run launch/components.py:dlrm --help

It is named by its file. An entry point `torchx.components` would give it a short name and hide all
components that torchx brings, `dist.ddp` among them. Hosts are a table here for a like reason: an
entry point `torchx.named_resources` hides nothing, but has to name an installed module.
"""

# torchx reads the annotations of a component from its source and knows Optional, Dict and List
# only. It runs the file inside its own module: no relative imports, no `from __future__`.
from typing import Dict, List, Optional

from torchx import specs
from torchx.components.dist import ddp, parse_nnodes
from torchx.specs.finder import ComponentValidationException

# Hosts with eight GPUs, each a little less than the smallest common host of its kind has (cloud
# instances and DGX), as Kubernetes keeps some of a node for itself. torchx knows more of them, such
# as aws_p4d.24xlarge and aws_p5.48xlarge. Which GPU it is, the partition or the queue decides.
HOSTS = {
    "a100x8": specs.Resource(cpu=88, gpu=8, memMB=600 * 1024),
    "h100x8": specs.Resource(cpu=88, gpu=8, memMB=1600 * 1024),
}
# What a node has unless told otherwise: enough for a trial on CPU.
CPU, GPU, MEM_MB = 2, 0, 8192


def dlrm(
    *args: str,
    j: str = "1x2",
    h: Optional[str] = None,
    cpu: int = CPU,
    gpu: int = GPU,
    memMB: int = MEM_MB,
    image: str = "torchrec-freq",
    name: str = "dlrm",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Trains a DLRM with criteo, one rank a GPU (or a CPU process).

    Usage: torchx run -s SCHEDULER launch/components.py:dlrm -j 2x8 -h h100x8 -- --config FILE

    Args:
        args: arguments of criteo, after `--`
        j: nodes x ranks of each node, such as 2x8; MIN:MAXxRANKS for a number of nodes that varies
        h: host by name, in place of cpu, gpu and memMB: a100x8, h100x8, or a torchx named resource
            such as aws_p5.48xlarge
        cpu: CPU cores of each node
        gpu: GPUs of each node; 0 trains on CPU
        memMB: host memory of each node in MB
        image: container image with this repository (see launch/Dockerfile); local_cwd and slurm
            run in the current folder instead
        name: name of the job
        env: environment of the ranks, as A=1,B=2; OMP_NUM_THREADS is cores / ranks unless given;
            with slurm, export a value that has a comma before torchx run
        mounts: type=volume,src=CLAIM,dst=PATH[,readonly] or
            type=bind,src=HOST_PATH,dst=PATH[,readonly], for container schedulers only
        max_restarts: how often torchrun starts the ranks of a job again after one of them fails;
            they resume from the last checkpoint
        max_retries: how often the scheduler starts the job again after it failed
        rdzv_port: port on the first node where the nodes meet; a job of one node takes a free one
    """
    if h and (cpu, gpu, memMB) != (CPU, GPU, MEM_MB):
        raise ComponentValidationException(
            f"-h {h} and --cpu, --gpu or --memMB: a named host has its own. Give one or the other."
        )
    for option, value, least in (
        ("cpu", cpu, 1),
        ("gpu", gpu, 0),
        ("memMB", memMB, 1),
        ("max_restarts", max_restarts, 0),
        ("max_retries", max_retries, 0),
        ("rdzv_port", rdzv_port, 1),
    ):
        if value < least:
            raise ComponentValidationException(f"--{option} {value} is below {least}.")
    try:
        least_nodes, most_nodes, ranks, _ = parse_nnodes(j)
    except ValueError:
        least_nodes = most_nodes = ranks = 0
    if not (1 <= least_nodes <= most_nodes and ranks >= 1):
        raise ComponentValidationException(
            f"-j {j} is not nodes x ranks of each node. Use a form such as 1x2, 2x8 or 1:2x8."
        )
    try:
        specs.parse_mounts(mounts or [])
    except (KeyError, ValueError) as error:
        raise ComponentValidationException(
            f"--mounts {','.join(mounts or [])} cannot be read: {error}. "
            "Use type=volume,src=CLAIM,dst=PATH[,readonly], with type= first in each."
        ) from None
    try:
        if not h:
            host = specs.Resource(cpu=cpu, gpu=gpu, memMB=memMB)
        else:
            host = HOSTS[h] if h in HOSTS else specs.get_named_resources(h)
    except KeyError as error:
        raise ComponentValidationException(
            f"-h {h} is not a host: {error.args[0]} Ours: {', '.join(HOSTS)}."
        ) from None
    if 0 < host.gpu < ranks:
        raise ComponentValidationException(
            f"-j {j}: {ranks} ranks on a node with {host.gpu} GPUs. Each rank needs its own."
        )

    defaults = {
        "OMP_NUM_THREADS": str(max(1, host.cpu // ranks)),
        # Otherwise ranks that torchrun starts again find the addresses of the dead ones in its
        # store, and wait for them.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if max_restarts:
        # dist.ddp has no such option, but torchrun reads each of its options from PET_*.
        defaults["PET_MAX_RESTARTS"] = str(max_restarts)
    app = ddp(
        *args,
        m="examples.criteo",
        image=image,
        name=name,
        j=j,
        env=defaults | (env or {}),
        max_retries=max_retries,
        rdzv_port=rdzv_port,
        mounts=mounts,
    )
    app.roles[0].resource = host
    return app
