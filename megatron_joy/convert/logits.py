"""Logits of one model, in a process of its own: `python -m megatron_joy.convert.logits KIND PATH IDS OUT DTYPE`.

KIND megatron: PATH is a checkpoint, computed by the very model that trains. KIND transformers: PATH is an exported
folder, loaded without any code of ours. Both in fp32 on the values of DTYPE. IDS and OUT are .npy files: [1, s] int64,
[1, s, v] fp32. The two kinds never share a process: the stand-ins for Megatron-core's CUDA names are for it alone.
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROUNDING = {"bf16": torch.bfloat16, "fp32": torch.float32}


def megatron_logits(path: Path, ids: Tensor, precision: str) -> Tensor:
    """ids [1, s] -> logits [1, s, v] fp32 of the training model with the checkpoint's weights in `precision`."""
    from megatron_joy.platform import process as processes  # isort: skip - before anything of Megatron-core

    from megatron_joy.checkpoint.load import load_checkpoint
    from megatron_joy.convert.source import open_source
    from megatron_joy.model.build import build_model
    from megatron_joy.recipe.schema import LayoutSection, PrecisionSection

    source = open_source(path)
    model = source.recipe.model.model_copy(update={"backend": "portable"})
    recipe = source.recipe.model_copy(
        update={"layout": LayoutSection(), "model": model, "precision": PrecisionSection(params_dtype="fp32")}
    )
    process = processes.start(recipe.layout, recipe.seed)
    try:
        (chunk,) = build_model(recipe, process)
        load_checkpoint(source.checkpoint, chunks=[chunk], optimizer=None, process=process)
        chunk.eval()
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.copy_(parameter.to(ROUNDING[precision]))
            logits: Tensor = chunk(ids, torch.arange(ids.shape[1])[None], None)
        return logits
    finally:
        processes.stop()


def transformers_logits(folder: Path, ids: Tensor) -> Tensor:
    """ids [1, s] -> logits [1, s, v] fp32 of transformers' own model class; no code from the folder is run."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

    from megatron_joy.convert.dequantised import open_folder

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model: Any
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    quantised = config.get("quantization_config", {})
    if "blockwise_int8" in quantised.values() or "int-quantized" in quantised.values():
        # transformers has no name for SGLang's form, and of compressed-tensors' int8 it reads all but experts: it gets
        # the dequantised weights.
        weights = open_folder(folder, config)
        state = {name: weights.read(name) for name in weights.shapes}
        del config["quantization_config"], config["model_type"], options["local_files_only"]
        kind = DeepseekV3Config.from_dict(config)
        model = DeepseekV3ForCausalLM.from_pretrained(None, config=kind, state_dict=state, **options)
    elif config.pop("model_type") == "deepseek_v3":
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
    else:
        # Another name for the same architecture, which only the serving engines know.
        model = DeepseekV3ForCausalLM.from_pretrained(folder, config=DeepseekV3Config.from_dict(config), **options)
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def main(arguments: list[str]) -> None:
    """See the module."""
    kind, path, ids_path, out_path, precision = arguments
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    ids = torch.from_numpy(np.load(ids_path))
    computed = {
        "megatron": lambda: megatron_logits(Path(path), ids, precision),
        "transformers": lambda: transformers_logits(Path(path), ids),
    }[kind]()
    np.save(out_path, computed.float().numpy())


if __name__ == "__main__":
    main(sys.argv[1:])
