"""GPUs by vendor's figures: memory and peak, for planning a run and for saying how well one uses its machine."""

from dataclasses import dataclass

from megatron_joy.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes, dense bf16 FLOP/s; `names`: what the driver calls the very devices that the figures are of."""

    memory: float
    bf16: float
    source: str
    names: tuple[str, ...]


# Other forms of the same chips (PCIe, NVL, cut-down ones) are slower and have no row.
GPUS = {
    "a100-80g": Gpu(80e9, 312e12, "NVIDIA A100 datasheet (SXM)", ("NVIDIA A100-SXM4-80GB",)),
    "h100-80g": Gpu(80e9, 989.4e12, "NVIDIA H100 datasheet (SXM), without sparsity", ("NVIDIA H100 80GB HBM3",)),
    "h200-141g": Gpu(141e9, 989.4e12, "NVIDIA H200 datasheet (SXM), without sparsity", ("NVIDIA H200",)),
    "b200-180g": Gpu(180e9, 2250e12, "NVIDIA HGX B200 at 1,000 W, without sparsity", ("NVIDIA B200",)),
}


def gpu_named(name: str) -> Gpu:
    """A row of GPUS; UserError for another name."""
    if name not in GPUS:
        raise UserError(f"--gpu {name}: not in the table of GPUs; known are {', '.join(GPUS)}")
    return GPUS[name]


def peak_of_device(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device that a driver calls so; None for one that the table doesn't have."""
    return next((gpu.bf16 for gpu in GPUS.values() if device_name in gpu.names), None)
