"""What ranks do in conversion tests: make a minuscule model, tell what it computes, save it, reshard it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_joy.recipe.schema import (
    DataSection,
    LayoutSection,
    ModelSection,
    PrecisionSection,
    Recipe,
    TrainSection,
)

LENGTH = 48
# No two widths of a matrix agree, so that nothing transposed or cut at the wrong place can fit by chance.
MODEL: dict[str, Any] = {
    "vocab_size": 98,
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "intermediate_size": 56,
    "moe_intermediate_size": 32,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 3,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 64,
    "backend": "portable",
}
LAYOUTS: dict[str, dict[str, int]] = {
    "dp2": {"data_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "ep2": {"data_parallel_size": 2, "expert_model_parallel_size": 2},
    "tp2etp2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "tp2pp2vpp2ep2": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
    },
    "pp2vpp2ep2": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "data_parallel_size": 2,
        "expert_model_parallel_size": 2,
    },
}


def make_recipe(dtype: str = "fp32", layout: str | None = None, **model: Any) -> Recipe:
    """A recipe of the minuscule model without data."""
    return Recipe(
        name="minuscule",
        seed=11,
        model=ModelSection(**MODEL | model),
        layout=LayoutSection(**LAYOUTS[layout] if layout else {}),
        precision=PrecisionSection(params_dtype=dtype),
        data=DataSection(sequence_length=LENGTH),
        train=TrainSection(steps=100, global_batch_size=4),
    )


def text_ids(vocabulary: int = MODEL["vocab_size"]) -> Tensor:
    """[2, LENGTH] int64: bytes of this file, wrapped into the vocabulary."""
    content = Path(__file__).read_bytes()[: 2 * LENGTH]
    return torch.tensor(list(content)).view(2, LENGTH) % vocabulary


@dataclass
class Reference:
    """What the training model is and computes: `folder`/weights.safetensors and outputs.safetensors."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The checkpoint, inside a run folder."""
        return self.folder / "run" / "checkpoints" / "step_00000007"

    @property
    def weights(self) -> dict[str, Tensor]:
        """Global tensors by sharded key, without any reader of ours."""
        return load_file(self.folder / "weights.safetensors")

    @property
    def outputs(self) -> dict[str, Tensor]:
        """ids [2, s]; logits [2, s, v]; mtp_logits [2, s, v]; mtp_loss_sum []."""
        return load_file(self.folder / "outputs.safetensors")


def make_reference(folder: Path, dtype: str, model: dict[str, Any]) -> None:
    """On one rank: random weights (norms and router biases too), a checkpoint of step 7, the model's outputs."""
    from megatron_joy.platform import process as platform  # isort: skip - before anything of Megatron-core

    from megatron_joy.checkpoint.save import save_checkpoint
    from megatron_joy.model.build import build_model

    recipe = make_recipe(dtype, **model)
    process = platform.start(recipe.layout, recipe.seed)
    (chunk,) = build_model(recipe, process)
    randomize(chunk)
    state = {"progress": {"step": 7, "samples": 28, "tokens": 28 * LENGTH}, "samples": 28}
    reference = Reference(folder)
    save_checkpoint(
        reference.checkpoint.parent, 7, recipe=recipe, chunks=[chunk], optimizer=None, process=process, state=state
    )
    save_file(_by_sharded_key(chunk, process), folder / "weights.safetensors")
    save_file(_outputs(chunk, recipe), folder / "outputs.safetensors")


def randomize(chunk: Any) -> None:
    """Weights large enough that logits spread, norms around 1, router biases that change the choice of experts."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in chunk.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.1 * noise)
        for name, buffer in chunk.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def _by_sharded_key(chunk: Any, process: Any) -> dict[str, Tensor]:
    """The whole tensors under the keys that a checkpoint has (one process holds all of each)."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    entries = nested_values(chunk.sharded_state_dict(metadata={"dp_cp_group": process.groups.dp_cp}))
    found = [entry for entry in entries if isinstance(entry, ShardedTensor | ShardedTensorFactory)]
    return {entry.key: entry.data.detach().clone() for entry in found}


def _outputs(chunk: Any, recipe: Recipe) -> dict[str, Tensor]:
    from megatron_joy.model.mtp_loss import MTPTargets

    chunk.float().eval()
    ids = text_ids(recipe.model.vocab_size)
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    predicted = ids.roll(-2, dims=1)  # token t+2
    mask = torch.ones(ids.shape)
    mask[:, -2:] = 0
    targets = MTPTargets(predicted, mask, weight=1.0)
    states: list[Tensor] = []
    outputs = {"ids": ids}
    with torch.no_grad():
        outputs["logits"] = chunk(ids, positions, None).float()
        if recipe.model.num_nextn_predict_layers:
            hook = chunk.mtp.register_forward_hook(lambda module, inputs, output: states.append(output))
            chunk(ids, positions, None, labels=ids.roll(-1, dims=1), loss_mask=targets)
            hook.remove()
            hidden = states[0].chunk(2, dim=0)[1]  # [s, b, h]: main, then MTP
            outputs["mtp_logits"] = chunk.output_layer(hidden)[0].transpose(0, 1).contiguous()
            assert targets.loss_sum is not None
            outputs["mtp_loss_sum"] = targets.loss_sum
    return outputs


def reshard(checkpoint: Path, folder: Path, layout: str, dtype: str) -> None:
    """On every rank of a layout: loads weights from a checkpoint and saves them again as `folder`/step_00000000."""
    from megatron_joy.platform import process as platform  # isort: skip - before anything of Megatron-core

    from megatron_joy.checkpoint.find import open_checkpoint
    from megatron_joy.checkpoint.load import load_checkpoint
    from megatron_joy.checkpoint.save import save_checkpoint
    from megatron_joy.model.build import build_model

    recipe = make_recipe(dtype, layout)
    process = platform.start(recipe.layout, recipe.seed)
    chunks = build_model(recipe, process)
    state = load_checkpoint(open_checkpoint(checkpoint), chunks=chunks, optimizer=None, process=process)
    save_checkpoint(folder, 0, recipe=recipe, chunks=chunks, optimizer=None, process=process, state=state)


def keys_that_megatron_core_loads_differently(checkpoint: Path, reference: Reference) -> list[str]:
    """On one rank: Megatron-core's own loader fills a model; which tensors aren't the reference's then, bit for bit."""
    from megatron_joy.platform import process as platform  # isort: skip - before anything of Megatron-core

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_joy.model.build import build_model

    recipe = make_recipe()
    process = platform.start(recipe.layout, recipe.seed)
    (chunk,) = build_model(recipe, process)
    entries = chunk.sharded_state_dict(metadata={"dp_cp_group": process.groups.dp_cp})
    wanted = {name: entry for name, entry in entries.items() if not isinstance(entry, ShardedObject)}
    keys = {name: entry.key for name, entry in wanted.items()}
    loaded = dist_checkpointing.load(wanted, str(checkpoint))
    expected = reference.weights
    return [key for name, key in keys.items() if not torch.equal(loaded[name], expected[key])]
