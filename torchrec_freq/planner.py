"""FrequencySGD in TorchRec's planner: the memory of its counters."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed as dist
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ShardingOption, Storage

from torchrec_freq.register import trains_with_frequency, without_optimizer

COUNTER_BYTES: Final = 4
"""Bytes of a row's counter."""


class FrequencyStorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's estimate of storage, with the counters of FrequencySGD as they are allocated.

    A shard of ``r`` rows has counters of ``4 r`` bytes, whatever its columns and type, beside the
    table: in HBM on a GPU, also for tables in host memory (UVM); in host memory on a CPU. TorchRec
    takes an optimizer that it does not know for a second table. The estimate for tables with
    another optimizer is TorchRec's.

    Takes the arguments of ``EmbeddingStorageEstimator``.
    """

    def estimate(
        self, sharding_options: list[ShardingOption], sharder_data_map: dict[str, Any]
    ) -> None:
        """Sets ``storage`` of each option's shards, in bytes."""
        ours = [
            option
            for option in sharding_options
            if trains_with_frequency(
                option.tensor, sharder_data_map[option.module_type_key].fused_params
            )
        ]
        with without_optimizer({id(o.tensor): o.tensor for o in ours}.values()):
            super().estimate(sharding_options, sharder_data_map)
        if self._is_inference:
            return
        on_device = self._topology.compute_device != "cpu"
        for option in ours:
            for shard in option.shards:
                counters = COUNTER_BYTES * shard.size[0]
                shard.storage += Storage(
                    hbm=counters if on_device else 0, ddr=0 if on_device else counters
                )


def make_planner(
    topology: Topology | None = None,
    batch_size: int | None = None,
    constraints: dict[str, ParameterConstraints] | None = None,
    **kwargs: Any,
) -> EmbeddingShardingPlanner:
    """TorchRec's planner, which knows what FrequencySGD needs: in place of its constructor.

    >>> planner = make_planner(Topology(world_size=8, compute_device="cuda"), batch_size=1024)

    Args:
        topology: the ranks and their memory; None for those of the default process group.
        batch_size: samples of a rank's batch; None for TorchRec's default.
        constraints: by table name.
        kwargs: further arguments of ``EmbeddingShardingPlanner``, except ``enumerator``.
    """
    if topology is None:
        topology = Topology(
            world_size=dist.get_world_size(),
            local_world_size=get_local_size(),
            compute_device="cuda" if torch.cuda.is_available() else "cpu",
        )
    enumerator = EmbeddingEnumerator(topology, batch_size or BATCH_SIZE, constraints)
    # In place of the stock storage estimator; the perf estimator stays as TorchRec chose it.
    enumerator._estimators = [
        FrequencyStorageEstimator(topology=topology, constraints=constraints)
        if type(estimator) is EmbeddingStorageEstimator
        else estimator
        for estimator in enumerator._estimators
    ]
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=enumerator,
        constraints=constraints,
        **kwargs,
    )
