"""How well a step used the machine: FLOPs of the model against the devices' peak, time by phase, memory by kind."""

import torch

from megatron_joy.parallel import flops
from megatron_joy.parallel.gpus import peak_of_device
from megatron_joy.recipe.schema import Recipe
from megatron_joy.train.loop import Loop
from megatron_joy.train.memory import largest_memory
from megatron_joy.train.moments import Feature
from megatron_joy.train.step import StepResult


def peak_flops(recipe: Recipe, device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of one device: the recipe's, else the table's; None where neither knows it."""
    if recipe.run.peak_tflops is not None:
        return recipe.run.peak_tflops * 1e12
    return peak_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class Usage(Feature):
    """Comes after the stopwatch and the features whose time is counted, before the metrics. On all ranks.

    MFU is against the peak in bf16 whatever the recipe's format is, so that runs compare; recomputed products are not
    the model's and don't count.
    """

    def __init__(self, recipe: Recipe, peak: float | None) -> None:
        self.recipe, self.peak = recipe, peak

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Adds to the row; the memory, which ranks must agree on, every `train.log_interval` steps only."""
        stage, devices = loop.plan.stage, self.recipe.layout.world_size
        each = loop.row["tokens_per_second"] / devices
        cost = flops.per_token(self.recipe, result.keys_per_token, stage.mtp_loss_factor > 0)
        loop.row |= {
            "tokens_per_second_per_device": each,
            "model_flops_per_token": cost,
            "mfu": None if self.peak is None else each * cost / self.peak,
        }
        loop.row |= {f"{phase}_seconds": seconds for phase, seconds in loop.trainer.phases.take().items()}
        if loop.run.progress.step % self.recipe.train.log_interval == 0 or loop.done:
            loop.row |= {f"{kind}_bytes": number for kind, number in largest_memory(loop.trainer).items()}
