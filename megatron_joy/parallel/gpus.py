"""GPUs by vendor's figures: memory, peak and links, for planning a run and for saying how well one uses its machine."""

from dataclasses import dataclass

from megatron_joy.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes, dense bf16 FLOP/s; `names`: what the driver calls the very devices that the figures are of.

    `hbm`: bytes/s of its memory. `link`: bytes/s to others of its node (NVLink, one direction). `network`:
    bytes/s of its share of the node's network cards in NVIDIA's DGX of that generation (8 GPUs, a card each).
    """

    memory: float
    bf16: float
    source: str
    names: tuple[str, ...]
    hbm: float
    link: float
    network: float
    per_node: int = 8


# Other forms of the same chips (PCIe, NVL, cut-down ones) are slower and have no row.
GPUS = {
    "a100-80g": Gpu(
        80e9,
        312e12,
        "NVIDIA A100 datasheet (SXM); DGX A100: 200 Gb/s a GPU",
        ("NVIDIA A100-SXM4-80GB",),
        hbm=2.039e12,
        link=300e9,
        network=25e9,
    ),
    "h100-80g": Gpu(
        80e9,
        989.4e12,
        "NVIDIA H100 datasheet (SXM), without sparsity; DGX H100: 400 Gb/s a GPU",
        ("NVIDIA H100 80GB HBM3",),
        hbm=3.35e12,
        link=450e9,
        network=50e9,
    ),
    "h200-141g": Gpu(
        141e9,
        989.4e12,
        "NVIDIA H200 datasheet (SXM), without sparsity; DGX H200: 400 Gb/s a GPU",
        ("NVIDIA H200",),
        hbm=4.8e12,
        link=450e9,
        network=50e9,
    ),
    "b200-180g": Gpu(
        180e9,
        2250e12,
        "NVIDIA HGX B200 at 1,000 W, without sparsity; DGX B200: 400 Gb/s a GPU",
        ("NVIDIA B200",),
        hbm=7.7e12,
        link=900e9,
        network=50e9,
    ),
}


def gpu_named(name: str) -> Gpu:
    """A row of GPUS; UserError for another name."""
    if name not in GPUS:
        raise UserError(f"--gpu {name}: not in the table of GPUs; known are {', '.join(GPUS)}")
    return GPUS[name]


def peak_of_device(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device that a driver calls so; None for one that the table doesn't have."""
    return next((gpu.bf16 for gpu in GPUS.values() if device_name in gpu.names), None)
