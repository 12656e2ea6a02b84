"""Megatron-core's distributed optimizer around Muon."""

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_joy.optim.layout import ON_MUON
from megatron_joy.optim.muon import BUFFER, Muon
from megatron_joy.optim.split import matrices_of
from megatron_joy.platform.process import Process


class MuonDistributedOptimizer(DistributedOptimizer):
    """ZeRO-1 of whole matrices: everything but what is said here is Megatron-core's.

    * Its state has one tensor a parameter, the momentum.
    * It gathers updated weights of its own buckets: Megatron-core leaves marked ones to its layer-wise optimizer, which
      is not used here (docs/optimizer.md says why).
    """

    def __init__(
        self,
        optimizer: Muon,
        config: OptimizerConfig,
        chunks: Sequence[DistributedDataParallel],
        process: Process,
        expert: bool,
    ) -> None:
        groups = process.groups
        super().__init__(
            optimizer,
            config,
            None,
            lambda muon, config=None: muon.init_state(),
            model_chunks=list(chunks),
            per_model_buffers={i: _marked(chunk, expert) for i, chunk in enumerate(chunks)},
            data_parallel_group=groups.intra_expt_dp if expert else groups.intra_dp_cp,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=(groups.tp_ep_pp if expert else groups.mp).rank(),
            distributed_optimizer_instance_id=0,
        )
        # As Megatron-core's builder sets them: norms are summed over all ranks, parts that TP ranks share counted once.
        self.grad_stats_parallel_group = groups.intra_dist_opt
        self.tp_group, self.expert_tp_group = groups.tp, groups.expt_tp
        self._own = {id(bucket) for buffer in self.buffers for bucket in buffer.buckets}
        for chunk in chunks:
            for name, param in chunk.named_parameters():
                if param in self.model_param_group_index_map:
                    self._describe(optimizer, name, param, process)

    def _describe(self, muon: Muon, name: str, param: Any, process: Process) -> None:
        """Tells Muon which matrices this rank's shard of a parameter is."""
        matrices = matrices_of(name, param, process.groups)
        owned = self._get_model_param_range_map(param)["param"]
        if matrices is None or owned.start % matrices.size or owned.end % matrices.size:
            raise RuntimeError(f"{name}: elements {owned.start} to {owned.end} are no whole matrices")
        group, position = self.model_param_group_index_map[param]
        muon.matrices[muon.param_groups[group]["params"][position]] = matrices

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """The state's tensors."""
        return (BUFFER,)

    def start_param_sync_for_bucket_group_subset(self) -> None:
        """Gathers the updated weights of this optimizer's buckets from their owners."""
        for chunk in self.model_chunks:
            for bucket_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                if any(id(bucket) in self._own for bucket in bucket_group.buckets):
                    chunk._start_bucket_group_param_sync(bucket_group, force_sync=False)


def _marked(chunk: DistributedDataParallel, expert: bool) -> list[Any]:
    buffers = chunk.expert_parallel_buffers if expert else chunk.buffers
    return [buffer for buffer in buffers if getattr(buffer.params[0], ON_MUON, False)]
