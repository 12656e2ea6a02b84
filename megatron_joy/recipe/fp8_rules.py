"""What must hold between the keys of [precision.fp8] and others; the rules of `validate`."""

from .dump import format_value
from .schema import FP8_PARTS, Fp8Part, Recipe

FP8_WIDTHS = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


def fp8_widths(recipe: Recipe) -> str | None:
    """FP8 products want every matrix, as a rank has it, of whole groups of 16 (MXFP8: of its 32)."""
    fp8, model, layout = recipe.precision.fp8, recipe.model, recipe.layout
    tensor, expert = layout.tensor_model_parallel_size, layout.expert_tensor_parallel_size
    heads, shared = model.num_attention_heads // tensor, model.n_shared_experts * model.moe_intermediate_size
    widths: dict[Fp8Part, dict[str, int]] = {
        "attention": {
            "model.q_lora_rank": model.q_lora_rank,
            "model.kv_lora_rank": model.kv_lora_rank,
            "model.kv_lora_rank + model.qk_rope_head_dim": model.kv_lora_rank + model.qk_rope_head_dim,
            "heads / TP x query width": heads * (model.qk_nope_head_dim + model.qk_rope_head_dim),
            "heads / TP x (model.qk_nope_head_dim + model.v_head_dim)": heads
            * (model.qk_nope_head_dim + model.v_head_dim),
            "heads / TP x model.v_head_dim": heads * model.v_head_dim,
        },
        "dense_mlp": {"model.intermediate_size / TP": model.intermediate_size // tensor},
        "shared_experts": {"model.n_shared_experts x model.moe_intermediate_size / TP": shared // tensor},
        "routed_experts": {"model.moe_intermediate_size / ETP": model.moe_intermediate_size // expert},
        "mtp_projection": {"model.hidden_size / TP": model.hidden_size // tensor},
    }
    if fp8.recipe == "off":
        return None
    step = FP8_WIDTHS[fp8.recipe]
    used = {"model.hidden_size": model.hidden_size}
    for part in FP8_PARTS:
        used |= {} if part in fp8.high_precision else widths[part]
    wrong = [f"{name} = {width}" for name, width in used.items() if width % step]
    if not wrong:
        return None
    return (
        f"precision.fp8.recipe = {format_value(fp8.recipe)}: matrices must be multiples of {step} wide, and "
        f"{', '.join(wrong)}; change these or name their part in precision.fp8.high_precision"
    )


def fp8_parts(recipe: Recipe) -> str | None:
    """Something must be left that is in FP8."""
    fp8 = recipe.precision.fp8
    if fp8.recipe == "off" or set(fp8.high_precision) != set(FP8_PARTS):
        return None
    return (
        f"precision.fp8.high_precision = {format_value(fp8.high_precision)}: leaves nothing for "
        f'precision.fp8.recipe = {format_value(fp8.recipe)}; set precision.fp8.recipe = "off"'
    )


def fp8_backend(recipe: Recipe) -> str | None:
    """Emulation is the portable blocks'."""
    if not (recipe.precision.fp8.emulate and recipe.model.backend == "te"):
        return None
    return (
        'model.backend = "te": has its own FP8, and precision.fp8.emulate = true asks for emulation in plain torch; '
        "set precision.fp8.emulate = false"
    )


def fp8_recompute(recipe: Recipe) -> str | None:
    """A recomputed forward pass would find other scales than the first one; Transformer Engine keeps them for it."""
    fp8 = recipe.precision.fp8
    if fp8.recipe != "delayed" or not fp8.emulate or recipe.train.recompute == "none":
        return None
    return (
        f"train.recompute = {format_value(recipe.train.recompute)}: emulated delayed scaling can't compute a forward "
        'pass again, its scales have moved on; set train.recompute = "none" or precision.fp8.recipe = "tensorwise"'
    )
