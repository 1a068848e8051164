"""Launching: the jobs that torchx generates, runs of it on this host, and the Slurm script."""

from __future__ import annotations

import configparser
import inspect
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import parse_args as parse_torchrun
from torchx.runner import get_runner
from torchx.schedulers import get_scheduler_factories
from torchx.schedulers.kubernetes_scheduler import sanitize_for_serialization
from torchx.specs.file_linter import get_fn_docstring
from torchx.specs.finder import ComponentValidationException
from torchx.specs.named_resources_aws import NAMED_RESOURCES
from torchx_runs import COMPONENT, REPOSITORY, environment, run_locally, torchx

from launch.components import HOSTS, dlrm

SBATCH = REPOSITORY / "launch" / "slurm.sbatch"
# Shells, templates and separators must leave these as they are.
TRAINING = ["--config", "my config.yaml", "--note", """it's "2 x 2": $HOME, $(false)"""]

# Stands for criteo where the launch alone is tested: each rank says what it was given.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]

def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1)  # a checkpoint
    Path(f"saved-{rank}").touch()
    os._exit(143)

signal.signal(signal.SIGTERM, stop)
said = {"args": sys.argv[1:], "env": dict(os.environ)}
Path("writing-" + rank).write_text(json.dumps(said))
Path("writing-" + rank).rename(f"ran-{attempt}-{rank}.json")
if os.environ.get("FAILS") == attempt and rank == "1":
    sys.exit(3)
if "WAITS" in os.environ:
    time.sleep(60)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder in which `-m examples.criteo` is the stand-in; it writes there what it was given."""
    folder = tmp_path / "stand-in"
    (folder / "examples").mkdir(parents=True)
    (folder / "examples" / "__init__.py").touch()
    (folder / "examples" / "criteo.py").write_text(STAND_IN)
    return folder


def said(folder: Path) -> dict[str, dict[str, Any]]:
    """What the stand-in's ranks were given, by `{restarts}-{rank}`."""
    files = sorted(folder.glob("ran-*.json"))
    return {path.stem.removeprefix("ran-"): json.loads(path.read_text()) for path in files}


def job(scheduler: str, *arguments: str, **options: str) -> Any:
    """What torchx would submit to the scheduler, by a dry run."""
    with get_runner() as runner:
        info = runner.dryrun_component(COMPONENT, list(arguments), scheduler, cfg=options)
    return info.request


def command_on_path(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def torchrun_arguments(
    command: Sequence[str], folder: Path, given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Namespace:
    """What torchrun itself reads from the command of a node, under that node's environment."""
    command_on_path(folder, "torchrun", r"""printf '%s\0' "$@" """)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    printed = subprocess.run(
        command, env=given | {"PATH": path}, capture_output=True, text=True, check=True
    )
    with monkeypatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        read: Namespace = parse_torchrun(printed.stdout.split("\0")[:-1])
    return read


def check_torchrun(read: Namespace, *, nodes: str, ranks: str, endpoint: str, id_: str) -> None:
    assert (read.nnodes, read.nproc_per_node) == (nodes, ranks)
    assert (read.rdzv_backend, read.rdzv_endpoint, read.rdzv_id) == ("c10d", endpoint, id_)
    assert read.module and read.training_script == "examples.criteo"
    assert read.training_script_args == TRAINING


OPTIONS = ["-j", "2x8", "-h", "h100x8", "--env", "A=1,B=two words", "--rdzv_port", "4711"]
OPTIONS += ["--max_restarts", "2", "--max_retries", "3", "--name", "my-run"]


def test_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = job("slurm", *OPTIONS, "--", *TRAINING, partition="gpu", time="4:00:00")
    script = tmp_path / "job.sh"
    script.write_text(request.materialize())
    # A job of two parts, one a node.
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert [line for line in lines if not line.startswith("#SBATCH --")] == ["#SBATCH hetjob"]
    wanted = "--requeue --ntasks-per-node=1 --partition=gpu --time=4:00:00 --cpus-per-task=88"
    for line in (lines[0], lines[2]):
        got = set(shlex.split(line)[1:])
        assert got >= {*wanted.split(), "--mem=1638400", "--gpus-per-task=8"}

    # What the script gives to srun, and what that starts.
    command_on_path(tmp_path, "srun", rf"""printf '%s\0' "$@" > {tmp_path}/srun-args; exit 1""")
    command_on_path(tmp_path, "scontrol", f"""echo "$@" >> {tmp_path}/requeued""")
    for restarts in "023":
        slurm = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": restarts}
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        ended = subprocess.run(["bash", script], env={"PATH": path} | slurm, capture_output=True)
        assert ended.returncode == 1
    assert (tmp_path / "requeued").read_text() == "requeue 77\n" * 2, "max_retries is 3"

    arguments = (tmp_path / "srun-args").read_text().split("\0")[:-1]
    between = arguments.index(":")
    for part in (arguments[:between], arguments[between + 1 :]):
        start = part.index("bash")
        exports = next(option for option in part[:start] if option.startswith("--export=ALL,"))
        given = dict(pair.split("=", 1) for pair in exports.split(",")[1:])
        assert given.items() >= {"A": "1", "B": "two words", "OMP_NUM_THREADS": "11"}.items()
        given["SLURM_JOB_NODELIST_HET_GROUP_0"] = "node-a"
        read = torchrun_arguments(part[start:], tmp_path, given, monkeypatch)
        check_torchrun(read, nodes="2", ranks="8", endpoint="node-a:4711", id_="77")
        assert read.max_restarts == 2


# torchx says that Volcano 1.4 did not count retries right.
@pytest.mark.filterwarnings(r"ignore:\s*Role train configured with restarts")
def test_kubernetes_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "type=volume,src=criteo,dst=/data,readonly,type=bind,src=/scratch,dst=/checkpoints"
    options = [*OPTIONS, "--image", "registry/image:1", "--mounts", mounts]
    request = job("kubernetes", *options, "--", *TRAINING, queue="research", namespace="ml")
    resource: Any = sanitize_for_serialization(request.resource)
    assert resource["apiVersion"].startswith("batch.volcano.sh/")
    assert resource["metadata"]["name"].startswith("my-run-")
    spec = resource["spec"]
    assert (spec["schedulerName"], spec["queue"], spec["maxRetry"]) == ("volcano", "research", 3)
    assert len(spec["tasks"]) == 2

    first = spec["tasks"][0]["name"].upper().replace("-", "_")
    for task in spec["tasks"]:
        assert task["replicas"] == 1 and task["minAvailable"] == 1
        events = {policy["event"]: policy["action"] for policy in task["policies"]}
        assert events == {"PodEvicted": "RestartJob", "PodFailed": "RestartJob"}
        pod = task["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "registry/image:1"
        limits = {"cpu": "88000m", "memory": "1638400M", "nvidia.com/gpu": "8"}
        assert container["resources"]["limits"] == limits
        places = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        sources = {volume["name"]: volume for volume in pod["volumes"]}
        assert places["/data"]["readOnly"] and not places["/checkpoints"]["readOnly"]
        claim = sources[places["/data"]["name"]]["persistentVolumeClaim"]
        assert claim["claimName"] == "criteo"
        assert sources[places["/checkpoints"]["name"]]["hostPath"]["path"] == "/scratch"

        given = {variable["name"]: variable["value"] for variable in container["env"]}
        assert given.items() >= {"A": "1", "B": "two words", "OMP_NUM_THREADS": "11"}.items()
        # Volcano tells each pod the hosts of each task, under the task's name.
        given[f"VC_{first}_HOSTS"] = "pod-0.my-run"
        read = torchrun_arguments(container["command"], tmp_path, given, monkeypatch)
        endpoint = "localhost:4711" if task is spec["tasks"][0] else "pod-0.my-run:4711"
        check_torchrun(
            read, nodes="2", ranks="8", endpoint=endpoint, id_=resource["metadata"]["name"]
        )
        assert read.max_restarts == 2


def test_named_hosts() -> None:
    (role,) = dlrm(j="1x8", h="aws_p5.48xlarge", env={"OMP_NUM_THREADS": "3"}).roles
    assert role.resource == NAMED_RESOURCES["aws_p5.48xlarge"]()
    assert role.env["OMP_NUM_THREADS"] == "3", "what the user says comes first"
    # Ours fit the torchx host of the same GPU, with something to spare.
    for ours, theirs in (("a100x8", "aws_p4d.24xlarge"), ("h100x8", "aws_p5.48xlarge")):
        host = NAMED_RESOURCES[theirs]()
        assert HOSTS[ours].gpu == host.gpu == 8
        assert HOSTS[ours].cpu < host.cpu and HOSTS[ours].memMB < host.memMB


def test_defaults_are_a_trial_on_cpu() -> None:
    given: dict[str, str] = {}
    app = dlrm(env=given)
    (role,) = app.roles
    assert (app.name, role.num_replicas, role.max_retries, role.mounts) == ("dlrm", 1, 0, [])
    assert (role.resource.cpu, role.resource.gpu) == (2, 0)
    assert role.env["OMP_NUM_THREADS"] == "1" and "PET_MAX_RESTARTS" not in role.env
    assert "--nnodes 1 --nproc_per_node 2 " in role.args[1]
    assert not given, "the caller's dict was changed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-j 2x", "-j 2x is not nodes x ranks"),
        ("-j 0x2", "-j 0x2 is not nodes x ranks"),
        ("-j 2x0", "-j 2x0 is not nodes x ranks"),
        ("-j 3:2x4", "-j 3:2x4 is not nodes x ranks"),
        ("-j 1x9 -h h100x8", "9 ranks on a node with 8 GPUs"),
        ("-j 1x2 --gpu 1", "2 ranks on a node with 1 GPUs"),
        ("-h h100x8 --gpu 4", "a named host has its own"),
        ("-h p5.48xlarge", "-h p5.48xlarge is not a host: .*Did you mean.*Ours: a100x8, h100x8"),
        ("--cpu 0", "--cpu 0 is below 1"),
        ("--gpu -1", "--gpu -1 is below 0"),
        ("--memMB 0", "--memMB 0 is below 1"),
        ("--max_restarts -1", "--max_restarts -1 is below 0"),
        ("--max_retries -1", "--max_retries -1 is below 0"),
        ("--rdzv_port 0", "--rdzv_port 0 is below 1"),
        ("--mounts src=a,dst=/b", "--mounts src=a,dst=/b cannot be read: .*type must be"),
        ("--mounts type=nfs,src=a,dst=/b", "cannot be read: .*'nfs'"),
        ("--mounts type=volume,src=a", "cannot be read: 'dst'.*dst=PATH"),
    ],
)
def test_bad_arguments(arguments: str, message: str) -> None:
    with pytest.raises(ComponentValidationException, match=message):
        job("local_cwd", *arguments.split())


def test_refusal_is_all_that_is_said(tmp_path: Path) -> None:
    ended = torchx("run", "--dryrun", "-s", "local_cwd", COMPONENT, "-j", "2x", home=tmp_path)
    assert ended.returncode == 1
    assert "Use a form such as 1x2" in ended.stderr and "Traceback" not in ended.stderr


def test_help(tmp_path: Path) -> None:
    ended = torchx("run", COMPONENT, "--help", home=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "Trains a DLRM" in ended.stdout
    _, descriptions = get_fn_docstring(dlrm)
    assert list(descriptions) == list(inspect.signature(dlrm).parameters)
    printed = " ".join(ended.stdout.split())
    for name, text in descriptions.items():
        assert text.strip(), f"{name} is not described"
        assert " ".join(text.split()) in printed


def test_builtin_components_are_still_there(tmp_path: Path) -> None:
    ended = torchx("builtins", home=tmp_path)
    assert {"dist.ddp", "dist.spmd", "utils.echo"} <= set(ended.stdout.split())


def test_torchxconfig(tmp_path: Path) -> None:
    # torchx skips what it does not know, so look ourselves, at what is commented out, too.
    text = (REPOSITORY / ".torchxconfig").read_text()
    config = configparser.ConfigParser()
    config.optionxform = str  # type: ignore[assignment, method-assign]
    config.read_string(
        "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines())
    )
    known = {
        "cli:run": {"workspace", "scheduler", "component"},
        "component:launch/components.py:dlrm": set(inspect.signature(dlrm).parameters),
    }
    for scheduler in ("local_cwd", "slurm", "kubernetes"):
        options = get_scheduler_factories()[scheduler](session_name="test").run_opts()
        known[scheduler] = {name for name, _ in options}
    assert set(config.sections()) == set(known)
    for section, names in known.items():
        assert set(config[section]) <= names, section

    # As the README has it: no -cfg, and no Docker here.
    component = "launch/components.py:dlrm"
    ended = torchx("run", "--dryrun", "-s", "kubernetes", component, "-j", "2x8", home=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "queue: default" in ended.stdout


def test_run_locally(stand_in: Path, tmp_path: Path) -> None:
    options = ["-j", "1x2", "--cpu", "6", "--env", "A=1", "--max_restarts", "1", "--"]
    ended = run_locally(stand_in, tmp_path / "logs", *options, *TRAINING, FAILS="0")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    ranks = said(stand_in)
    assert list(ranks) == ["0-0", "0-1", "1-0", "1-1"], "a rank failed, and all started again"
    for rank in ranks.values():
        assert rank["args"] == TRAINING
        assert rank["env"].items() >= {"A": "1", "OMP_NUM_THREADS": "3"}.items()
        assert rank["env"]["WORLD_SIZE"] == "2"
    assert list((tmp_path / "logs").rglob("SUCCESS"))
    # The store of the first attempt has the addresses of its ranks, so the second needs its own.
    ports = {attempt: ranks[f"{attempt}-0"]["env"]["MASTER_PORT"] for attempt in "01"}
    assert ports["0"] != ports["1"]


def test_failed_run_locally(stand_in: Path, tmp_path: Path) -> None:
    ended = run_locally(stand_in, tmp_path / "logs", "-j", "1x2", FAILS="0")
    assert ended.returncode == 1
    assert "FAILED" in ended.stderr
    assert list(said(stand_in)) == ["0-0", "0-1"]


class Slurm:
    """Stands for Slurm's commands: nodes are processes on this host, calls are written down."""

    def __init__(self, folder: Path, cwd: Path, *, nodes: int) -> None:
        folder.mkdir()
        self.folder, self.cwd = folder, cwd
        self.variables = {
            "SLURM_JOB_ID": str(free_port() - 20000),
            "SLURM_JOB_NODELIST": "node-[0-1]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_CPUS_PER_TASK": "6",
        }
        command_on_path(
            folder,
            "srun",
            f"""
            while [[ $1 == --* ]]; do echo "$1" >> {folder}/srun-options; shift; done
            for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do "$@" & tasks+=($!); done
            echo "${{tasks[@]}}" > {folder}/tasks
            # The real one kills its tasks.
            trap 'kill -KILL "${{tasks[@]}}"' TERM
            for task in "${{tasks[@]}}"; do wait "$task" || code=$?; done
            exit "${{code:-0}}"
            """,
        )
        command_on_path(
            folder,
            "scontrol",
            f"""
            case $1 in
                show) [[ $3 == 'node-[0-1]' ]] && echo localhost && echo node-1 ;;
                requeue) echo "$2" saved-* >> {folder}/requeued ;;
            esac
            """,
        )
        command_on_path(
            folder,
            "scancel",
            f"""[[ "$*" == "--signal=TERM $SLURM_JOB_ID" ]] && kill -TERM $(< {folder}/tasks)""",
        )

    def start(self, *arguments: str, **more: str) -> subprocess.Popen[str]:
        given = environment(**self.variables, **more)
        given["PATH"] = f"{self.folder}{os.pathsep}{given['PATH']}"
        return subprocess.Popen(
            ["bash", SBATCH, *arguments],
            cwd=self.cwd,
            env=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def requeued(self) -> list[str]:
        """The number of a job that was queued again, and what its ranks had saved by then."""
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []


def free_port() -> int:
    """One that the script can derive from a job's number."""
    while True:
        with socket.socket() as sock:
            port = random.randrange(20001, 30000)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def test_sbatch_runs_on_two_nodes(stand_in: Path, tmp_path: Path) -> None:
    slurm = Slurm(tmp_path / "slurm", stand_in, nodes=2)
    # RANKS stands for the GPUs that Slurm would name.
    process = slurm.start(*TRAINING, RANKS="1", OMP_NUM_THREADS="")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    ranks = said(stand_in)
    assert list(ranks) == ["0-0", "0-1"]
    nodes = {rank["env"]["GROUP_RANK"] for rank in ranks.values()}
    assert nodes == {"0", "1"}
    for rank in ranks.values():
        assert rank["args"] == TRAINING
        assert rank["env"]["OMP_NUM_THREADS"] == "6"
        assert rank["env"]["TORCHELASTIC_RUN_ID"] == slurm.variables["SLURM_JOB_ID"]
        assert rank["env"]["TORCHELASTIC_MAX_RESTARTS"] == "3"
        assert rank["env"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "--cpus-per-task=6" in (slurm.folder / "srun-options").read_text().split()
    assert not slurm.requeued()


def test_sbatch_before_the_time_limit(stand_in: Path, tmp_path: Path) -> None:
    slurm = Slurm(tmp_path / "slurm", stand_in, nodes=1)
    process = slurm.start(SLURM_GPUS_ON_NODE="2", WAITS="")
    deadline = time.monotonic() + 60
    while len(said(stand_in)) < 2:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    # Both ranks had the time to save, and only then the job was queued again.
    assert slurm.requeued() == [slurm.variables["SLURM_JOB_ID"], "saved-0", "saved-1"], printed
    assert process.returncode != 0


def test_sbatch_failure_is_not_queued_again(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path / "slurm", tmp_path, nodes=1)
    command_on_path(slurm.folder, "torchrun", "exit 7")
    process = slurm.start(RANKS="2")
    process.communicate(timeout=60)
    assert process.returncode == 7
    assert not slurm.requeued()


def test_sbatch_without_gpus(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path / "slurm", tmp_path, nodes=1)
    process = slurm.start()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "set RANKS" in printed and not (slurm.folder / "tasks").exists()
