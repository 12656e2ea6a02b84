"""config.json and generation_config.json of the DeepSeek-V3 family against a recipe's model; without torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_joy.errors import UserError
from megatron_joy.recipe.schema import ModelSection

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

# Keys whose name and meaning are the recipe's (facts: arXiv 2604.03044 Table 1 and the released config.json).
SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_nextn_predict_layers",
    "first_k_dense_replace",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "rope_theta",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
)
# What the architecture is and no recipe can change; a folder that says otherwise is another architecture.
FIXED_KEYS: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "moe_layer_freq": 1,
    "rope_scaling": None,
    "rope_interleave": True,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
# Said for the engines' sake; of no consequence for the weights.
COURTESY_KEYS: dict[str, Any] = {"attention_dropout": 0.0, "use_cache": True}
ARCHITECTURE = "DeepseekV3ForCausalLM"
# family -> what it says about itself. The released JoyAI has the second; every engine reads the first without code.
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"architectures": [ARCHITECTURE], "model_type": "deepseek_v3"},
    "joyai_llm_flash": {"architectures": [ARCHITECTURE], "model_type": "joyai_llm_flash"},
}
MODEL_TYPES = [str(family["model_type"]) for family in FAMILIES.values()]
# Of no consequence for what a model computes, so a config.json may lack it.
OPTIONAL_KEYS = {"initializer_range"}
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
# transformers 5 writes these where other writers have the key on the right.
SYNONYMS = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that begin, end and pad a text; None where the tokenizer has no such token."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    def as_config(self) -> dict[str, int | None]:
        """With Hugging Face's names."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def model_config(
    model: ModelSection, family: str, precision: str, vocabulary: int, special: SpecialTokens
) -> dict[str, Any]:
    """The content of config.json. Raises UserError for an unknown family."""
    if family not in FAMILIES:
        raise UserError(f"--family {family}: not a known family; expected {' or '.join(FAMILIES)}")
    values = model.model_dump()
    return (
        FAMILIES[family]
        | {key: values[key] for key in SHARED_KEYS}
        | {"vocab_size": vocabulary, "num_key_value_heads": model.num_attention_heads}
        | FIXED_KEYS
        | COURTESY_KEYS
        | special.as_config()
        | {"torch_dtype": DTYPE_NAMES[precision]}
    )


def generation_config(special: SpecialTokens) -> dict[str, Any]:
    """The content of generation_config.json: where a text ends; sampling is left to the user."""
    return {key: value for key, value in special.as_config().items() if value is not None}


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises UserError when it is absent or not a JSON object."""
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: not there; expected a Hugging Face model folder") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a file that can be read") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); download or export the folder again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with transformers 5's spellings undone: rope_parameters, renamed keys."""
    flat = {SYNONYMS.get(key, key): value for key, value in config.items()}
    rope = flat.pop("rope_parameters", None)
    if isinstance(rope, dict):
        flat.setdefault("rope_theta", rope.get("rope_theta"))
        if rope.get("rope_type", "default") != "default":
            flat["rope_scaling"] = rope
    return flat


def model_of(config: Mapping[str, Any], where: Path) -> ModelSection:
    """The recipe's model of a config.json.

    Raises UserError, in one line, for keys that are missing or of a wrong type and for an architecture that is not this
    one. Another model_type is taken where `architectures` says that it is this one.
    """
    flat = _flattened(config)
    if flat.get("model_type") not in MODEL_TYPES and ARCHITECTURE not in (flat.get("architectures") or []):
        told = " or ".join(map(json.dumps, MODEL_TYPES))
        raise UserError(
            f"{where}: another architecture: model_type is {json.dumps(flat.get('model_type'))}, expected {told}"
        )
    fixed = FIXED_KEYS | {"num_key_value_heads": flat.get("num_attention_heads")}
    other = [
        f"{key} is {json.dumps(flat[key])}, expected {json.dumps(value)}"
        for key, value in fixed.items()
        if flat.get(key, value) != value
    ]
    if other:
        raise UserError(f"{where}: another architecture: {'; '.join(other)}")
    if missing := [key for key in SHARED_KEYS if flat.get(key) is None and key not in OPTIONAL_KEYS]:
        raise UserError(f"{where}: lacks {', '.join(missing)}; each says what the weights compute, get the file again")
    try:
        return ModelSection.model_validate({key: flat[key] for key in SHARED_KEYS if flat.get(key) is not None})
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
        raise UserError(f"{where}: {told}") from None


def differing_keys(expected: ModelSection, found: ModelSection) -> list[str]:
    """Keys of SHARED_KEYS in which two models differ, with both values; padding of the vocabulary is no difference."""
    return [
        f"{key} ({getattr(expected, key)} against {getattr(found, key)})"
        for key in SHARED_KEYS
        if getattr(expected, key) != getattr(found, key)
        and not (key == "vocab_size" and found.vocab_size < expected.vocab_size)
    ]
