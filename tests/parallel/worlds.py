"""What ranks really allocate: run on each rank of a gloo world."""

from typing import Any

from megatron_joy.recipe.schema import Recipe
from tests.model.small import small_recipe

WIDTHS = {"hidden_size": 40, "intermediate_size": 88, "vocab_size": 104, "q_lora_rank": 28, "qk_rope_head_dim": 6}


def uneven_recipe(layout: dict[str, Any], dtype: str = "fp32", optimizer: str = "adamw", **train: Any) -> Recipe:
    """The minuscule model with widths that pad: few are multiples of 64 values."""
    counts = {1: None, 2: [2, 2], 4: [1, 1, 1, 1]}
    chunks = layout.get("pipeline_model_parallel_size", 1) * layout.get("virtual_pipeline_model_parallel_size", 1)
    recipe = small_recipe({"pipeline_layer_counts": counts[chunks]} | layout, WIDTHS, train)
    precision = recipe.precision.model_copy(update={"params_dtype": dtype})
    chosen = recipe.optimizer.model_copy(update={"name": optimizer, "muon_dtype": dtype})
    return recipe.model_copy(update={"precision": precision, "optimizer": chosen})


def allocated(recipe: Recipe) -> dict[str, Any]:
    """Bytes by kind, and the names and sizes of parameters, on this rank once the trainer is built."""
    import torch

    from megatron_joy.model.build import build_model
    from megatron_joy.optim.build import parts
    from megatron_joy.platform import process as processes
    from megatron_joy.train.step import Trainer

    process = processes.start(recipe.layout, recipe.seed)
    chunks = build_model(recipe, process)
    trainer = Trainer(recipe, process, chunks)
    storages: dict[str, dict[int, int]] = {"parameters": {}, "gradients": {}, "masters": {}, "moments": {}}

    def add(kind: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[kind][storage.data_ptr()] = storage.nbytes()

    for chunk in trainer.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            add("parameters", buffer.param_data)
            add("gradients", buffer.grad_data)
    for part in parts(trainer.optimizer):
        part._init_optimizer_states_with_dummy_values()
        for group in part.shard_fp32_from_float16_groups:
            for master in group:
                add("masters", master)
        for state in part.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                add("moments", state.get(name))
    named = [
        [(name, tuple(p.shape), not getattr(p, "allreduce", True)) for name, p in c.named_parameters()] for c in chunks
    ]
    router = sum(b.numel() * b.element_size() for c in chunks for n, b in c.named_buffers() if ".router." in n)
    return {kind: sum(found.values()) for kind, found in storages.items()} | {"router": router, "named": named}


def saved_by_one_pass(recipe: Recipe) -> list[int]:
    """Bytes that autograd keeps after the forward pass of one micro-batch through each of this rank's chunks."""
    import torch
    from megatron.core.utils import unwrap_model

    from megatron_joy.model.build import build_model
    from megatron_joy.platform import process as processes
    from tests.model.small import LENGTH

    process = processes.start(recipe.layout, recipe.seed)
    layout, rows, found = recipe.layout, recipe.train.micro_batch_size, []
    split = layout.context_parallel_size * layout.tensor_model_parallel_size
    packed = layout.context_parallel_size == 1
    stream = (rows * LENGTH // split, 1) if packed else (LENGTH // split, rows)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.precision.params_dtype]
    for chunk in build_model(recipe, process):
        inside = unwrap_model(chunk)
        if not inside.pre_process:  # what the stage before would send
            inside.set_input_tensor(torch.randn(*stream, recipe.model.hidden_size, dtype=dtype, requires_grad=True))
        found.append(_saved_by(chunk, process, recipe))
    return found


def _saved_by(chunk: Any, process: Any, recipe: Recipe) -> int:
    """Each storage once, parameters left out."""
    import torch
    from megatron.core.utils import unwrap_model

    from megatron_joy.train.forward import MicroBatch, forward_step
    from tests.model.small import batch, row

    rows = batch([row([], seed) for seed in range(recipe.train.micro_batch_size)])
    own = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, torch.Tensor] = {}  # tensors, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, loss = forward_step(process, True, iter([MicroBatch(rows, 1.0)]), chunk)
        if unwrap_model(chunk).post_process:
            loss(output)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def counted_flops(recipe: Recipe) -> int:
    """FLOPs of forward and backward pass of one row without borders, by torch's own counter."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_joy.model.build import build_model
    from megatron_joy.platform import process as processes
    from megatron_joy.train.forward import MicroBatch, forward_step
    from tests.model.small import batch, row

    process = processes.start(recipe.layout, recipe.seed)
    (model,) = build_model(recipe, process)
    # As plain products: which fused attention kernels the counter knows, and how, differs between versions of torch.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output, loss = forward_step(process, True, iter([MicroBatch(batch([row([], 1)]), 1.0)]), model)
        loss(output)[0].backward()
    return int(counter.get_total_flops())
