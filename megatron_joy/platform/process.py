"""This process's device, process groups and random state. The one place that touches Megatron-core's globals."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_joy.errors import UserError
from megatron_joy.platform import cpu, cudnn
from megatron_joy.platform.rank import RankInfo, rank_info
from megatron_joy.platform.rendezvous import rendezvous
from megatron_joy.recipe.schema import LayoutSection

if not cpu.install():
    cudnn.prefer_torchs()

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed


@dataclass(frozen=True)
class Process:
    """What every room needs to know about where it runs: passed explicitly, never looked up."""

    info: RankInfo
    device: torch.device
    groups: ProcessGroupCollection
    virtual_pipeline_size: int

    @property
    def is_first_rank(self) -> bool:
        """True on global rank 0, which writes what is written once."""
        return self.info.rank == 0

    @property
    def is_last_pipeline_stage(self) -> bool:
        """True where losses are computed (with interleaving, for the last chunk)."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1


def start(layout: LayoutSection, seed: int, timeout_minutes: float = 30.0) -> Process:
    """Joins the world and builds the process groups of a layout.

    Raises UserError when the launched world is not the layout's TP x CP x PP x DP.
    """
    info = rank_info()
    if info.world_size != layout.world_size:
        raise UserError(
            f"layout: TP {layout.tensor_model_parallel_size} x CP {layout.context_parallel_size} x PP "
            f"{layout.pipeline_model_parallel_size} x DP {layout.data_parallel_size} needs {layout.world_size} "
            f"processes, {info.world_size} were started; start {layout.world_size} or set layout.data_parallel_size"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", _gpu_of(info))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join_world(info, timeout_minutes)
    build_groups(layout)
    model_parallel_cuda_manual_seed(seed)
    return Process(
        info,
        device,
        ProcessGroupCollection.use_mpu_process_groups(),
        layout.virtual_pipeline_model_parallel_size,
    )


def _hash_store() -> Any:
    return dist.HashStore()  # type: ignore[attr-defined]


def _join_world(info: RankInfo, timeout_minutes: float) -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if info.world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=_hash_store(), rank=0, world_size=1, timeout=timeout)
        return
    address, port = rendezvous(info)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))  # where torch looks
    try:
        dist.init_process_group(backend, rank=info.rank, world_size=info.world_size, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(f"MASTER_PORT {port}: in use on {address}; set MASTER_PORT to a free one") from None


def _gpu_of(info: RankInfo) -> int:
    """The local rank's; the only one where the launcher shows each rank its own (srun --gpus-per-task)."""
    visible = torch.cuda.device_count()
    if info.local_rank >= visible > 1:
        raise UserError(
            f"rank {info.rank}: is local rank {info.local_rank} and sees {visible} GPUs; start one rank for each GPU"
        )
    return info.local_rank if visible > 1 else 0


def build_groups(layout: LayoutSection) -> None:
    """Megatron-core's process groups for a layout, replacing those of an earlier layout in this process."""
    parallel_state.destroy_model_parallel()
    interleaved = layout.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=interleaved if interleaved > 1 else None,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
    )


def stop() -> None:
    """Leaves the world; safe to call when it was never joined."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[Process]:
    """A world of this process only, whatever launched it: for looking at a model without running it.

    Raises RuntimeError in a process that has joined a larger world, whose groups it would replace.
    """
    if joined := dist.is_initialized():
        if dist.get_world_size() > 1:
            raise RuntimeError("process.alone() was called in a process that has joined a world")
    else:
        dist.init_process_group("gloo", store=_hash_store(), rank=0, world_size=1)
    build_groups(LayoutSection())
    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        yield Process(RankInfo(0, 1, 0, 1, "none"), torch.device("cpu"), groups, 1)
    finally:
        if not joined:
            stop()


def tensor_parallel_group() -> dist.ProcessGroup:
    """For modules that Megatron-core builds without a group: it gives none to duplicated linears."""
    return parallel_state.get_tensor_model_parallel_group()


def is_first_stage(virtual_stage: int | None) -> bool:
    """Whether this pipeline chunk holds the embedding."""
    return bool(parallel_state.is_pipeline_first_stage(ignore_virtual=virtual_stage is None, vp_stage=virtual_stage))


def is_last_stage(virtual_stage: int | None) -> bool:
    """Whether this pipeline chunk holds the head and the MTP layer."""
    return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=virtual_stage is None, vp_stage=virtual_stage))


def select_virtual_stage(virtual_stage: int) -> None:
    """Tells Megatron-core which chunk is being built."""
    parallel_state.set_virtual_pipeline_model_parallel_rank(virtual_stage)
