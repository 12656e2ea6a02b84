"""Our FP8 emulation against Transformer Engine's own kernels on this GPU: quantised bytes, scales, then products.

    python benchmarks/gpu/fp8_bits.py [--out FILE]

Bytes and inverse scales of `tensorwise` (Float8CurrentScaling) and `blockwise` (Float8BlockScaling, 1 x 128 and
128 x 128) in both directions are compared one by one with `megatron_joy.precision.scaling` on the CPU. Then forward,
dgrad and wgrad of its linear and grouped linear with `precision.emulation`, as a relative error in the
Frobenius norm beside that of the same product without FP8. MXFP8 needs a Blackwell GPU and isn't here. Exit code 1
where a byte or a scale differs or a product is further away than BOUND, 2 without a GPU or Transformer Engine.
"""

import argparse
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_joy.model.backends.select import transformer_engine_problem
from megatron_joy.precision.emulation import Emulation, fp8_grouped, fp8_linear
from megatron_joy.precision.scaling import E4M3, E5M2, SCALINGS, quantize, quantize_weight

SHAPES = ((128, 128), (256, 384), (144, 272), (16, 1536), (4096, 2048))
KINDS = ("normal", "spread", "zeros", "tiny", "huge", "infinite")
DTYPES = (torch.bfloat16, torch.float32)
FORMATS = (E4M3, E5M2)
TILE = 128
# A product is rounded to bf16 (2 ** -9 at most, half of that as a mean); the emulation is 0.03 to 0.06 from bf16's own.
BOUND = 4e-3


def values(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A matrix on the CPU, the same in every run."""
    random = torch.Generator().manual_seed(1000 * KINDS.index(kind) + SHAPES.index(shape))
    x = torch.randn(shape, generator=random)
    if kind == "spread":
        x *= 10.0 ** torch.linspace(-8, 0, shape[0])[:, None]
    elif kind == "zeros":
        x[: shape[0] // 2] = 0.0
        x[:, : shape[1] // 2] *= (torch.arange(shape[1] // 2) % 3 == 0).float()
    elif kind == "tiny":
        x *= 1e-39  # subnormal in both number formats
    elif kind == "huge":
        x *= 1e37
    elif kind == "infinite":
        x[1, 3], x[-1, -1] = float("inf"), -float("inf")
    return x.to(dtype)


def _difference(what: str, theirs: Tensor, ours: Tensor) -> dict[str, Any]:
    """How many numbers differ in their bits, and the first that does; shapes must be equal."""
    if theirs.shape != ours.shape:
        return {"what": what, "differing": -1, "of": ours.numel(), "shapes": [list(theirs.shape), list(ours.shape)]}
    # A copy, because a view of other elements wants strides that an expanded scale doesn't have.
    theirs, ours = (x.cpu().flatten().clone(memory_format=torch.contiguous_format) for x in (theirs, ours))
    apart = theirs.view(torch.uint8) != ours.view(torch.uint8)
    found: dict[str, Any] = {"what": what, "differing": int(apart.sum()), "of": apart.numel()}
    if found["differing"]:
        at = int(apart.nonzero()[0]) // theirs.element_size()
        found["first"] = [at, float(theirs[at]), float(ours[at])]
    return found


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def tensorwise(engine: Any, x: Tensor, fp8: torch.dtype, kernel: Any) -> Iterator[dict[str, Any]]:
    """One scale for the whole matrix."""
    quantizer = engine.Float8CurrentScalingQuantizer(kernel, x.device, rowwise=True, columnwise=True)
    theirs, ours = quantizer(x.cuda()), quantize(x, fp8, SCALINGS["tensorwise"], 1, [x.shape[0]])
    yield _difference("bytes", theirs._data, _bytes(ours.values))
    yield _difference("transposed bytes", theirs._transpose, _bytes(ours.values.t()))
    yield _difference("scale", theirs._scale_inv.flatten(), ours.scale_inv.flatten()[:1])


def tiles(engine: Any, x: Tensor, fp8: torch.dtype, kernel: Any) -> Iterator[dict[str, Any]]:
    """1 x 128 along columns, and 128 x 1 along rows from the same numbers."""
    quantizer = engine.Float8BlockQuantizer(kernel, rowwise=True, columnwise=True, block_scaling_dim=1)
    theirs, (rows, columns), rules = quantizer(x.cuda()), x.shape, SCALINGS["blockwise"]
    along, over = (quantize(x, fp8, rules, dimension, [rows]) for dimension in (1, 0))
    yield _difference("bytes", theirs._rowwise_data, _bytes(along.values))
    # Transformer Engine pads the other dimension of the scales to a multiple of 4.
    yield _difference("scales", theirs._rowwise_scale_inv[:, :rows], along.scale_inv[:, ::TILE].t())
    yield _difference("bytes over rows", theirs._columnwise_data, _bytes(over.values.t()))
    yield _difference("scales over rows", theirs._columnwise_scale_inv[:, :columns], over.scale_inv[::TILE])


def blocks(engine: Any, x: Tensor, fp8: torch.dtype, kernel: Any) -> Iterator[dict[str, Any]]:
    """128 x 128, as weights are."""
    quantizer = engine.Float8BlockQuantizer(kernel, rowwise=True, columnwise=True, block_scaling_dim=2)
    theirs, ours = quantizer(x.cuda()), quantize_weight(x, fp8, SCALINGS["blockwise"], -1)
    inverse = ours.scale_inv[::TILE, ::TILE]
    yield _difference("bytes", theirs._rowwise_data, _bytes(ours.values))
    yield _difference("scales", theirs._rowwise_scale_inv[:, : inverse.shape[1]], inverse)
    yield _difference("transposed bytes", theirs._columnwise_data, _bytes(ours.values.t()))
    yield _difference("transposed scales", theirs._columnwise_scale_inv[:, : inverse.shape[0]], inverse.t())


CHECKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "tensorwise": tensorwise,
    "1x128": tiles,
    "128x128": blocks,
}


def compare_bits(engine: Any) -> list[dict[str, Any]]:
    """A row for each rule, format, number format, kind of numbers and shape: what differs, or what went wrong."""
    kernels = {E4M3: engine.DType.kFloat8E4M3, E5M2: engine.DType.kFloat8E5M2}
    rows = []
    for name, fp8, dtype, kind, shape in itertools.product(CHECKS, FORMATS, DTYPES, KINDS, SHAPES):
        row = {"rule": name, "fp8": str(fp8), "dtype": str(dtype), "kind": kind, "shape": list(shape)}
        try:
            row["compared"] = list(CHECKS[name](engine, values(kind, shape, dtype), fp8, kernels[fp8]))
        except Exception as error:  # one kernel that refuses a shape must not hide the others
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(row)
    return rows


def _apart(mine: Tensor, wanted: Tensor) -> float:
    wanted = wanted.float()
    return float((mine.detach().float().cpu() - wanted).norm() / wanted.norm())


def _emulated(x: Tensor, weight: Tensor, grad: Tensor, product: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    out = product(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def compare_products(engine: Any, scaling: str) -> list[dict[str, Any]]:
    """Forward, dgrad and wgrad of the linear and of the grouped linear (an idle expert among them) in bf16."""
    recipes = {"tensorwise": ("Float8CurrentScaling", "HYBRID"), "blockwise": ("Float8BlockScaling", "E4M3")}
    name, form = recipes[scaling]
    module = sys.modules["transformer_engine.common.recipe"]
    recipe = getattr(module, name)(fp8_format=getattr(module.Format, form))
    emulation = Emulation(scaling, "hybrid" if form == "HYBRID" else "e4m3")
    tokens, inputs, outputs, experts = 512, 768, 384, 4
    splits = [144, 0, 256, 112]
    ends = torch.tensor(splits).cumsum(0).int()
    random = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(tokens, width, generator=random).bfloat16() for width in (inputs, outputs))
    weights = (torch.randn(experts, outputs, inputs, generator=random) / inputs**0.5).bfloat16()

    def plain(a: Tensor, w: Tensor) -> Tensor:
        return a @ w.t()

    def grouped(a: Tensor, w: Tensor) -> Tensor:
        return torch.cat([part @ one.t() for part, one in zip(a.split(splits), w, strict=True)])

    kinds: dict[str, tuple[Any, ...]] = {
        "linear": (
            engine.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16),
            weights[0],
            (),
            lambda a, w: fp8_linear(a, w, emulation),
            plain,
        ),
        "grouped linear": (
            engine.GroupedLinear(experts, inputs, outputs, bias=False, params_dtype=torch.bfloat16),
            weights,
            (splits,),
            lambda a, w: fp8_grouped(a, w, ends, emulation),
            grouped,
        ),
    }
    rows = []
    for kind, (layer, weight, more, emulated, exact) in kinds.items():
        parameters = list(layer.parameters())
        with torch.no_grad():
            for parameter, one in zip(parameters, weight.view(-1, outputs, inputs), strict=True):
                parameter.copy_(one)
        on_gpu = x.cuda().requires_grad_()
        with engine.fp8_autocast(enabled=True, fp8_recipe=recipe):
            out = layer(on_gpu, *more)
        out.backward(grad.cuda())
        theirs = (out, on_gpu.grad, torch.stack([p.grad for p in parameters]).view(weight.shape))
        ours = _emulated(x, weight, grad, emulated)
        wanted = _emulated(x.float(), weight.float(), grad.float(), exact)
        for part, a, b, c in zip(("forward", "dgrad", "wgrad"), theirs, ours, wanted, strict=True):
            apart = {"from_emulation": _apart(a, b), "fp8_from_fp32": _apart(a, c)}
            rows.append(
                {"rule": scaling, "module": kind, "product": part, **apart, "holds": apart["from_emulation"] <= BOUND}
            )
    return rows


def show(result: dict[str, Any]) -> bool:
    """The result for reading; whether everything held."""
    good = True
    for name, kind in itertools.product(CHECKS, KINDS):
        rows = [row for row in result["bits"] if (row["rule"], row["kind"]) == (name, kind)]
        parts = [part for row in rows for part in row.get("compared", [])]
        errors = [row for row in rows if "error" in row]
        bad = [part for part in parts if part["differing"]]
        count = sum(part["of"] for part in parts)
        good &= not bad and not errors
        differing = sum(part["differing"] for part in bad)
        print(f"{name:<11}{kind:<9}{count:>12,} bytes, {differing:>9,} differ, {len(errors)} errors")
        for example in (bad[:1], errors[:1]):
            if example:
                print("   first:", json.dumps(example[0]))
    for row in result["products"]:
        good &= row["holds"]
        print(f"{row['rule']} {row['module']} {row['product']}: {row['from_emulation']:.1e} from the emulation, "
              f"{row['fp8_from_fp32']:.1e} from fp32")  # fmt: skip
    return good and not result["errors"]


def main() -> int:
    """Compares, prints and says how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    problem = transformer_engine_problem()
    if problem is not None:
        print(f"fp8_bits.py: nothing to compare with: {problem}", file=sys.stderr)
        return 2
    engine = sys.modules["transformer_engine.pytorch"]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "bits": [], "products": [], "errors": [],
    }  # fmt: skip

    def part(name: str, work: Callable[[], list[dict[str, Any]]]) -> None:
        try:
            result[name] += work()
        except Exception:
            result["errors"].append(traceback.format_exc())
            print(result["errors"][-1], file=sys.stderr)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")

    for scaling in ("tensorwise", "blockwise"):
        part("products", lambda scaling=scaling: compare_products(engine, scaling))  # type: ignore[misc]
    part("bits", lambda: compare_bits(engine))
    return 0 if show(result) else 1


if __name__ == "__main__":
    sys.exit(main())
