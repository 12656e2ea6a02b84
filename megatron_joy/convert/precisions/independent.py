"""Stored weights back to fp32 by other people's code where there is some, by plain numpy where there is none.

It proves what `schemes.py` wrote: nothing is shared with it but the tensors. FP8 blocks: transformers'
`Fp8Dequantize`. compressed-tensors' formats: that package's own compressors. SGLang's int8 blocks are read by nothing
that runs without a GPU.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_joy.convert.precisions.config import COMPRESSED
from megatron_joy.convert.precisions.schemes import Scheme
from megatron_joy.convert.precisions.table import Precision

Dequantise = Callable[[Mapping[str, Tensor]], Tensor]


def _by_transformers(stored: Mapping[str, Tensor]) -> Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    found: Tensor = Fp8Dequantize(None)._dequantize_one(stored["weight"], stored["weight_scale_inv"], torch.float32)
    return found


def _by_numpy(stored: Mapping[str, Tensor], tile: tuple[int, int]) -> Tensor:
    """Each scale is repeated over its block (a Kronecker product with ones) and cut to the matrix."""
    values = stored["weight"].numpy().astype(np.float32)
    scales = np.kron(stored["weight_scale_inv"].numpy(), np.ones(tile, np.float32))
    return torch.from_numpy(values * scales[: values.shape[0], : values.shape[1]])


def _by_compressed_tensors(stored: Mapping[str, Tensor], name: str) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    form, weights, activations = COMPRESSED[name]
    scheme: Any = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    # In fp32: the package computes in the scale's format.
    state = {key: tensor.float() if key == "weight_scale" else tensor for key, tensor in stored.items()}
    found: Tensor = BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"]
    return found.float()


def independent(precision: Precision, scheme: Scheme) -> tuple[Dequantise, str]:
    """(the function, whose it is)."""
    if precision.method == "fp8":
        return _by_transformers, "transformers' Fp8Dequantize"
    if precision.method == "compressed-tensors":
        return lambda stored: _by_compressed_tensors(stored, precision.name), "compressed-tensors' decompress"
    return lambda stored: _by_numpy(stored, scheme.tile), "a Kronecker product in numpy"
