"""Updates from gradients that every layout is given alike, against an independent reference on whole tensors."""

import re
import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megatron_joy.checkpoint.contents import active_parts, owned_ranges, pieces_of
from megatron_joy.optim.build import set_learning_rate
from megatron_joy.recipe.schema import OptimizerSection, Recipe
from megatron_joy.recipe.timetable import Timetable
from tests.checkpoint import worlds
from tests.gloo import run_world

UPDATES, CLIP, DECAY = 3, 1.0, 0.1
LAYOUTS = {
    **worlds.LAYOUTS,
    "dp2tp2": {"data_parallel_size": 2, "tensor_model_parallel_size": 2},
    "dp4ep4": {"data_parallel_size": 4, "expert_model_parallel_size": 4},
}


def made(layout: str, dtype: str = "fp32", model: dict[str, Any] | None = None, **optimizer: Any) -> Recipe:
    section = OptimizerSection(**{"name": "muon", "clip_grad": CLIP, "weight_decay": DECAY, **optimizer})
    recipe = worlds.recipe("one", dtype, **(model or {})).model_copy(update={"optimizer": section})
    return recipe.model_copy(update={"layout": recipe.layout.model_copy(update=LAYOUTS[layout])})


def gradient(key: str, shape: tuple[int, ...], update: int) -> torch.Tensor:
    """The gradient of a whole tensor: a few strong directions, as real ones have, and noise."""
    random = torch.Generator().manual_seed(zlib.crc32(f"{key}/{update}".encode()))
    noise = torch.randn(shape, generator=random) * 1e-3
    if len(shape) == 1:
        return noise
    left = torch.randn(*shape[:-1], 3, generator=random)
    return noise + 1e-2 * left @ torch.randn(*shape[:-2], 3, shape[-1], generator=random)


def _give_gradients(run: worlds.Run, update: int) -> None:
    """Fills this rank's reduced gradients as if all ranks had computed `gradient`."""
    for tensor, pieces in pieces_of(run.trainer.chunks, run.process).values():
        for piece in pieces if hasattr(tensor, "main_grad") else ():
            whole = gradient(piece.key, piece.global_shape, update)
            place = tuple(slice(o, o + n) for o, n in zip(piece.offset, _long(piece), strict=True))
            own = tuple(slice(o, o + n) for o, n in zip(piece.low, piece.shape, strict=True))
            tensor.main_grad[own].copy_(whole[place].reshape(piece.shape))  # type: ignore[attr-defined]


def _long(piece: Any) -> tuple[int, ...]:
    return (1,) * (len(piece.offset) - len(piece.shape)) + piece.shape


def _updated(recipe: Recipe) -> Any:
    """(initial boxes, gradient norms, boxes after the updates)."""
    return _update(worlds.Run.start(recipe))


def _update(run: worlds.Run) -> Any:
    recipe = run.recipe
    before, norms = run.boxes(), []
    for update in range(1, UPDATES + 1):
        for chunk in run.trainer.chunks:
            chunk.zero_grad_buffer()
        _give_gradients(run, update)
        set_learning_rate(run.trainer.optimizer, Timetable(recipe).at(update).learning_rate)
        norms.append(float(run.trainer.optimizer.step()[1]))
    return before, norms, run.boxes()


def orthogonal(m: np.ndarray) -> np.ndarray:
    """Newton-Schulz as Jordan and Moonlight write it, on one matrix, in fp64."""
    x = m / (np.linalg.norm(m) + 1e-7)
    x = x.T if m.shape[0] > m.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if m.shape[0] > m.shape[1] else x


def muon(whole: np.ndarray, key: str) -> np.ndarray:
    """The update of a whole tensor before the learning rate: experts, gate and up each by themselves."""
    halves = np.split(whole, 2, axis=-2) if "linear_fc1" in key else [whole]
    stacks = [half.reshape(-1, *half.shape[-2:]) for half in halves]
    updates = [np.stack([0.2 * max(m.shape) ** 0.5 * orthogonal(m) for m in stack]) for stack in stacks]
    return np.concatenate(updates, axis=-2).reshape(whole.shape)


def adamw(key: str, recipe: Recipe) -> bool:
    """Whether AdamW updates a tensor."""
    return recipe.optimizer.name == "adamw" or bool(re.search(r"embedding|output_layer|norm|router", key))


def expected(weights: dict[str, np.ndarray], recipe: Recipe) -> tuple[list[float], dict[str, np.ndarray]]:
    """Gradient norms, and weights and momentum after the updates, in fp64."""
    keys = [key for key in weights if not key.startswith("optimizer.") and "expert_bias" not in key]
    w = {key: weights[key].astype(np.float64) for key in keys}
    first, second, norms = (
        {key: np.zeros_like(w[key]) for key in keys},
        {key: np.zeros_like(w[key]) for key in keys},
        [],
    )
    for t in range(1, UPDATES + 1):
        rate = Timetable(recipe).at(t).learning_rate
        g = {key: gradient(key, w[key].shape, t).double().numpy() for key in keys}
        norms.append(float(sum((g[key] ** 2).sum() for key in keys) ** 0.5))
        for key in keys:
            clipped = g[key] * min(1.0, CLIP / (norms[-1] + 1e-6))
            if adamw(key, recipe):
                first[key] = 0.9 * first[key] + 0.1 * clipped
                second[key] = 0.95 * second[key] + 0.05 * clipped**2
                step = first[key] / (1 - 0.9**t) / (np.sqrt(second[key] / (1 - 0.95**t)) + 1e-8)
            else:
                first[key] = 0.95 * first[key] + clipped
                step = muon(clipped + 0.95 * first[key], key)
            w[key] = w[key] * (1 - rate * (DECAY if w[key].ndim > 1 else 0.0)) - rate * step
    momenta = {f"optimizer.state.momentum_buffer.{key}": first[key] for key in keys if not adamw(key, recipe)}
    return norms, w | momenta


@cache
def reference(name: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """From the weights of one process."""
    recipe = made("one", name=name)
    ((before, _, _),) = run_world(_updated, 1, recipe)
    return expected(worlds.joined([before]), recipe)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("muon", x) for x in ("one", "dp2", "tp2", "pp2vpp2", "ep2", "cp2", "tp2etp2", "dp2tp2", "pp2ep2")),
        ("adamw", "ep2"),
    ],
)
def test_updates_from_the_same_gradients_are_the_references_in_every_layout(name: str, layout: str) -> None:
    recipe = made(layout, name=name)
    ranks = run_world(_updated, recipe.layout.world_size, recipe)
    norms, whole = reference(name)
    for _, found, _ in ranks:
        assert found == pytest.approx(norms, rel=1e-6)
    after = worlds.joined([boxes for _, _, boxes in ranks])
    for key, value in whole.items():
        assert after[key] == pytest.approx(value, rel=0, abs=2e-6 * float(np.abs(value).max())), key
    momenta = {key for key in after if "momentum_buffer" in key}
    assert momenta == {key for key in whole if "momentum_buffer" in key}


def test_bf16_weights_have_fp32_masters_that_get_the_update() -> None:
    recipe = made("dp2", "bf16", muon_dtype="fp32")
    ranks = run_world(_updated, 2, recipe)
    before, after = worlds.joined([b for b, _, _ in ranks]), worlds.joined([a for _, _, a in ranks])
    _, whole = expected(before, recipe)
    for key in (key for key in whole if not key.startswith("optimizer.")):
        master = after[f"optimizer.state.param.{key}"]
        assert master == pytest.approx(whole[key], rel=0, abs=2e-6 * float(np.abs(whole[key]).max())), key
        assert np.array_equal(torch.tensor(master).bfloat16().float().numpy(), after[key])


WIDE = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "intermediate_size": 1024}


def _updated_and_owned(recipe: Recipe) -> Any:
    """`_updated`, and of the dense layer's gate and up the range that this rank updates."""
    run = worlds.Run.start(recipe)
    ranges = [each for part in active_parts(run.trainer.optimizer) for each in owned_ranges(part)]
    return _update(run), [(start, end) for p, start, end in ranges if p.shape[0] == 2 * WIDE["intermediate_size"]]


def test_a_gate_and_an_up_on_two_ranks_are_updated_as_on_one() -> None:
    recipe = made("dp4ep4", model=WIDE)
    ranks = run_world(_updated_and_owned, 4, recipe)
    border = WIDE["intermediate_size"] * recipe.model.hidden_size
    assert [owned for _, owned in ranks] == [[(0, border)], [(border, 2 * border)], [], []]
    norms, whole = expected(worlds.joined([before for (before, _, _), _ in ranks]), recipe)
    after = worlds.joined([boxes for (_, _, boxes), _ in ranks])
    assert ranks[0][0][1] == pytest.approx(norms, rel=1e-6)
    for key, value in whole.items():
        assert after[key] == pytest.approx(value, rel=0, abs=2e-6 * float(np.abs(value).max())), key


def _shares(recipe: Recipe) -> list[int]:
    run = worlds.Run.start(recipe)
    return [
        sum(p.numel() for g in part.param_groups for p in g["params"])
        for part in run.trainer.optimizer.chained_optimizers
    ]


def test_state_is_sharded_over_data_parallel_ranks() -> None:
    ((adamw, whole),) = run_world(_shares, 1, made("one"))
    ranks = run_world(_shares, 2, made("dp2"))
    assert sum(rank[1] for rank in ranks) == whole and sum(rank[0] for rank in ranks) == adamw
    assert max(rank[1] for rank in ranks) < 0.6 * whole
