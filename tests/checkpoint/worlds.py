"""What ranks do in checkpoint tests: build a minuscule model under a layout, train, save, load, tell its bits."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megatron_joy.checkpoint.contents import Pieces, optimizer_boxes, pieces_of, updates_done, weight_boxes
from megatron_joy.checkpoint.find import open_checkpoint
from megatron_joy.checkpoint.load import load_checkpoint
from megatron_joy.checkpoint.save import save_checkpoint
from megatron_joy.data.batch import Batch, make_batch
from megatron_joy.data.stream import Sample
from megatron_joy.model.build import build_model
from megatron_joy.platform import process as platform
from megatron_joy.recipe.schema import (
    DataSection,
    LayoutSection,
    ModelSection,
    OptimizerSection,
    PrecisionSection,
    Recipe,
    ScheduleSection,
    TrainSection,
)
from megatron_joy.train.step import Trainer

VOCABULARY, LENGTH, GLOBAL_BATCH = 64, 32, 4

LAYOUTS: dict[str, dict[str, int]] = {
    "one": {},
    "dp2": {"data_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "ep2": {"data_parallel_size": 2, "expert_model_parallel_size": 2},
    "tp2ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "tp2etp2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "pp2ep2": {"pipeline_model_parallel_size": 2, "data_parallel_size": 2, "expert_model_parallel_size": 2},
}


def recipe(layout: str = "one", dtype: str = "fp32", moments: Literal["fp32", "bf16"] = "fp32", **model: Any) -> Recipe:
    """Four layers (one dense, three with four experts) and the MTP layer, about 60,000 weights."""
    return Recipe(
        name="minuscule",
        seed=7,
        model=ModelSection(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
                "intermediate_size": 48,
                "moe_intermediate_size": 24,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "backend": "portable",
            }
            | model
        ),
        layout=LayoutSection(**LAYOUTS[layout]),
        data=DataSection(sequence_length=LENGTH),
        train=TrainSection(steps=100, global_batch_size=GLOBAL_BATCH),
        schedule=ScheduleSection(peak_lr=1e-2, final_lr=1e-3, warmup_steps=2),
        precision=PrecisionSection(params_dtype=dtype),
        optimizer=OptimizerSection(moments_dtype=moments),
    )


def world_size(layout: str) -> int:
    """Processes of a layout."""
    return recipe(layout).layout.world_size


@dataclass
class Run:
    """A model in training on this rank."""

    recipe: Recipe
    process: platform.Process
    trainer: Trainer

    @classmethod
    def start(cls, made: Recipe) -> "Run":
        process = platform.start(made.layout, made.seed)
        return cls(made, process, Trainer(made, process, build_model(made, process)))

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step: text drawn from a generator seeded by the step."""
        text = np.random.default_rng(step).integers(0, VOCABULARY, (GLOBAL_BATCH, LENGTH + 1))
        size, rank = self.process.groups.dp.size(), self.process.groups.dp.rank()
        rows = [Sample(text[i], "text", 0, i, 0, 0) for i in range(rank, GLOBAL_BATCH, size)]
        return [make_batch([row], document_mask=True, eod_id=0) for row in rows]

    def train(self, first: int, last: int) -> list[tuple[float, ...]]:
        """Steps first..last, counted from 1; main loss, MTP loss and gradient norm of each."""
        results = [self.trainer.step(step, self.batches(step)) for step in range(first, last + 1)]
        return [(r.loss, r.mtp_loss or 0.0, r.grad_norm) for r in results]

    def save(self, folder: Path, step: int, **options: Any) -> Path:
        """Saves with a state that names the step."""
        state = {"step": step, "samples": step * GLOBAL_BATCH}
        trainer = self.trainer
        return save_checkpoint(
            folder,
            step,
            recipe=self.recipe,
            chunks=trainer.chunks,
            optimizer=trainer.optimizer,
            process=self.process,
            state=state,
            **options,
        )

    def load(self, path: Path) -> dict[str, Any]:
        """Loads exactly this checkpoint."""
        trainer = self.trainer
        checkpoint = open_checkpoint(path, full=True)
        return load_checkpoint(checkpoint, chunks=trainer.chunks, optimizer=trainer.optimizer, process=self.process)

    def disturb(self) -> None:
        """Makes weights, router biases and optimizer state differ from anything a checkpoint has."""
        pieces = pieces_of(self.trainer.chunks, self.process)
        with torch.no_grad():
            for tensor, _ in pieces.values():
                tensor.fill_(-3.0)

    def disturb_randomly(self) -> None:
        """Fills every tensor, also one that nothing has initialised, with small numbers."""
        with torch.no_grad():
            for tensor, _ in pieces_of(self.trainer.chunks, self.process).values():
                tensor.normal_(0.0, 0.02)

    def boxes(self) -> list[tuple[str, tuple[int, ...], np.ndarray]]:
        """(global key, offset, elements) of everything this rank holds."""
        pieces: Pieces = pieces_of(self.trainer.chunks, self.process)
        held = weight_boxes(pieces, to_write=False) | optimizer_boxes(pieces, self.trainer.optimizer, to_write=False)
        return [
            (key, box.offset, box.data.detach().float().numpy().copy())
            for key, boxes in held.items()
            for box in boxes.boxes
        ]


def joined(ranks: Sequence[list[tuple[str, tuple[int, ...], np.ndarray]]]) -> dict[str, np.ndarray]:
    """Whole tensors by key from all ranks' boxes; copies of an element on several ranks must have the same bits."""
    found: dict[str, list[tuple[tuple[int, ...], np.ndarray]]] = {}
    for rank in ranks:
        for key, offset, data in rank:
            found.setdefault(key, []).append((offset, data))
    whole = {}
    for key, boxes in found.items():
        shape = tuple(max(o[i] + d.shape[i] for o, d in boxes) for i in range(len(boxes[0][0])))
        tensor, seen = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for offset, data in boxes:
            place = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
            assert np.array_equal(tensor[place][seen[place]], data[seen[place]]), f"copies of {key} differ"
            tensor[place], seen[place] = data, True
        assert seen.all(), f"{key}: some elements are on no rank"
        whole[key] = tensor
    return whole


def train_and_save(layout: str, folder: Path, steps: int, dtype: str = "fp32") -> Any:
    """Trains and saves; returns losses, boxes and the count of updates."""
    run = Run.start(recipe(layout, dtype))
    losses = run.train(1, steps)
    run.save(folder, steps)
    return losses, run.boxes(), updates_done(run.trainer.optimizer)


def load_and_tell(layout: str, path: Path, more: int = 0, dtype: str = "fp32") -> Any:
    """Loads; returns state, boxes, the count of updates and the losses of some more steps."""
    run = Run.start(recipe(layout, dtype))
    run.disturb()
    state = run.load(path)
    boxes, updates = run.boxes(), updates_done(run.trainer.optimizer)
    return state, boxes, updates, run.train(state["step"] + 1, state["step"] + more)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
