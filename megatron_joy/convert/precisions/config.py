"""`quantization_config` of config.json: written for a precision, and read as the scheme of a folder's weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_joy.convert.precisions.schemes import Scheme, fp8_blocks, int4_groups, int8_tiles
from megatron_joy.convert.precisions.table import JOINED, Precision
from megatron_joy.errors import UserError

KEY = "quantization_config"
_WEIGHTS = {"type": "int", "symmetric": True, "dynamic": False, "observer": "minmax", "actorder": None}
_PER_TOKEN = {"symmetric": True, "strategy": "token", "dynamic": True}
# precision -> (format, its weights, its activations), as compressed-tensors' QuantizationScheme names them
COMPRESSED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "int8-channel": (
        "int-quantized",
        _WEIGHTS | {"num_bits": 8, "strategy": "channel"},
        _PER_TOKEN | {"type": "int", "num_bits": 8},
    ),
    "int4": ("pack-quantized", _WEIGHTS | {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "int4-fp8": (
        "pack-quantized",
        _WEIGHTS | {"num_bits": 4, "strategy": "group", "group_size": 128},
        _PER_TOKEN | {"type": "float", "num_bits": 8},
    ),
}


def modules_left_out(names: Iterable[str]) -> list[str]:
    """Names of the linear modules among weights that are not quantised, and of what engines join them into."""
    modules = [name.removesuffix(".weight") for name in names if not name.endswith(("norm.weight", "_bias"))]
    modules = [name for name in modules if not name.endswith("embed_tokens")]
    members, joined = JOINED
    last = f".{members[-1]}"
    return sorted({*modules, *(m.removesuffix(last) + f".{j}" for m in modules if m.endswith(last) for j in joined)})


def quantization_config(precision: Precision, unquantised: Iterable[str]) -> dict[str, Any] | None:
    """The value of config.json's key; None where nothing is quantised."""
    scheme = precision.scheme
    if scheme is None:
        return None
    modules = modules_left_out(unquantised)
    if precision.method == "compressed-tensors":
        form, weights, activations = COMPRESSED[precision.name]
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
            "format": form,
        }
        return {
            "quant_method": precision.method,
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": modules,
            "kv_cache_scheme": None,
        }
    blocks: dict[str, Any] = {
        "quant_method": precision.method,
        "activation_scheme": "dynamic",
        "weight_block_size": list(scheme.tile),
    }
    if precision.method == "fp8":
        return blocks | {"fmt": "e4m3", "modules_to_not_convert": modules}
    return blocks | {"ignored_layers": modules}


def scheme_of(config: Mapping[str, Any], where: Path) -> Scheme:
    """How a folder's weights are stored. Raises UserError for a form that cannot be read."""
    method = config.get("quant_method")
    if method in ("fp8", "blockwise_int8"):
        block = config.get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            raise UserError(f"{where}: {KEY}.weight_block_size is {block}; expected two whole numbers, as [128, 128]")
        tile = (block[0], block[1])
        if method == "fp8" and config.get("scale_fmt", "float") not in ("float", None):
            raise UserError(f"{where}: {KEY}.scale_fmt is {config['scale_fmt']}; expected fp32 scales")
        return fp8_blocks(tile) if method == "fp8" else int8_tiles("int8-block", tile, "weight_scale_inv")
    if method == "compressed-tensors":
        return _compressed(config, where)
    raise UserError(
        f"{where}: weights are quantised ({method or 'unnamed'}); expected fp8, blockwise_int8 or compressed-tensors"
    )


def _compressed(config: Mapping[str, Any], where: Path) -> Scheme:
    groups = config.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f"{where}: {KEY}.config_groups: expected one group with weights")
    form = config.get("format")
    found = (form, weights.get("type"), weights.get("num_bits"), weights.get("strategy"), weights.get("symmetric"))
    if found == ("int-quantized", "int", 8, "channel", True):
        return int8_tiles("int8-channel", (1, 0), "weight_scale")
    size = weights.get("group_size")
    if found == ("pack-quantized", "int", 4, "group", True) and isinstance(size, int) and size > 0 and size % 8 == 0:
        return int4_groups(size)
    raise UserError(
        f"{where}: {KEY} is {' '.join(map(str, found))} group_size {size}; expected int-quantized int 8 channel "
        "or pack-quantized int 4 group, symmetric"
    )
