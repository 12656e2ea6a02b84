"""How much of a gradient's rounding error becomes the update's: Newton-Schulz in several number formats.

    python benchmarks/muon_sensitivity.py

takes matrices of singular values that fall as 1/i^2 (as gradients' do), changes them by one part in 10^7 and prints how
far apart the two results are (Frobenius norm of the difference over that of the result), the median of 20 matrices.
"""

import json
import statistics

import torch

from megatron_joy.optim.newton_schulz import COEFFICIENTS, orthogonalize, triples

CHANGE, MATRICES, ROWS, COLUMNS = 1e-7, 20, 128, 384
FORMATS = {
    "fp64": (torch.float64, "highest"),
    "fp32": (torch.float32, "highest"),
    "fp32, products in bf16": (torch.float32, "medium"),  # Megatron-core's default for Muon, where there are units
    "bf16": (torch.bfloat16, "highest"),
}


def gradient(seed: int) -> torch.Tensor:
    """fp64 [rows, columns]."""
    random = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(ROWS, ROWS, generator=random, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(COLUMNS, ROWS, generator=random, dtype=torch.float64))
    return left @ torch.diag(torch.arange(1, ROWS + 1, dtype=torch.float64) ** -2) @ right.T


def spread(name: str, dtype: torch.dtype, precision: str, seed: int) -> float:
    """Relative difference of the results of a gradient and of the same one, changed."""
    given = gradient(seed)
    noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64)
    pair = torch.stack([given, given + CHANGE * given.norm() * noise / noise.norm()])
    torch.set_float32_matmul_precision(precision)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    # One by one: a batched product needn't round each of its parts alike.
    first, second = (orthogonalize(one[None].to(work), triples(name, 5), dtype).double() for one in pair)
    return float((first - second).norm() / first.norm())


def main() -> None:
    for name in COEFFICIENTS:
        for label, (dtype, precision) in FORMATS.items():
            found = statistics.median(spread(name, dtype, precision, seed) for seed in range(MATRICES))
            print(json.dumps({"coefficients": name, "format": label, "spread": float(f"{found:.1e}")}))


if __name__ == "__main__":
    main()
