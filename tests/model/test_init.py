"""Initial weights depend on the seed alone: every layout starts from the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_joy.model.build import build_model
from megatron_joy.model.init import initialize_parameters, seed_of
from megatron_joy.platform import process as platform
from megatron_joy.prove.weights import largest_difference, write_whole
from tests.gloo import run_world
from tests.model.small import small_recipe

# isort: split
from megatron.core.dist_checkpointing.mapping import ShardedTensor

LAYOUTS = {
    "TP2 x EP2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "TP2 x ETP2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "PP2 x VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "DP2": {"data_parallel_size": 2},
}


def write(path: Path, seed: int = 11) -> None:
    recipe = small_recipe().model_copy(update={"seed": seed})
    with platform.alone() as process:
        write_whole(path, build_model(recipe, process), process)


def compare(layout: dict[str, int], path: Path) -> float:
    """This rank's largest difference from the whole tensors."""
    recipe = small_recipe(layout=layout)
    process = platform.start(recipe.layout, seed=99)  # the random state of the process must not matter
    torch.manual_seed(process.info.rank)
    difference = largest_difference(path, build_model(recipe, process), process).absolute
    platform.stop()
    return difference


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_starts_from_the_same_bits(name: str, tmp_path: Path) -> None:
    write(tmp_path / "whole.safetensors")
    assert run_world(compare, 2, LAYOUTS[name], tmp_path / "whole.safetensors") == [0.0, 0.0]


def test_matrices_are_normal_norms_are_ones_and_biases_zero(tmp_path: Path) -> None:
    write(tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    std = small_recipe().model.initializer_range
    for name, tensor in tensors.items():
        if name.endswith("expert_bias"):
            assert not tensor.any(), name
        elif tensor.dim() == 1:
            assert bool((tensor == 1).all()), name
        else:
            assert float(tensor.std()) == pytest.approx(std, rel=0.2), name
            assert abs(float(tensor.mean())) < 6 * std / tensor.numel() ** 0.5, name
    experts = tensors["decoder.layers.3.mlp.experts.experts.linear_fc1.weight"]
    assert not torch.equal(experts[0], experts[1])


def test_another_seed_gives_another_model_and_the_same_seed_the_same(tmp_path: Path) -> None:
    for name, seed in (("one", 11), ("again", 11), ("other", 12)):
        write(tmp_path / name, seed)
    one, again, other = (load_file(tmp_path / name) for name in ("one", "again", "other"))
    assert all(torch.equal(one[key], again[key]) for key in one)
    matrices = [key for key in one if one[key].dim() > 1]
    assert not [key for key in matrices if torch.equal(one[key], other[key])]


def test_no_two_tensors_share_a_seed() -> None:
    seeds = [seed_of(seed, key, index) for seed in range(5) for key in ("a", "b", "a/1") for index in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


class _Experts:
    """Experts as Transformer Engine keeps them: a matrix each, whose axis of experts is in the sharded state alone."""

    def __init__(self, first: int, count: int, whole: int) -> None:
        self.matrices = [torch.zeros(6, 4) for _ in range(count)]
        self.first, self.whole = first, whole

    def buffers(self) -> list[torch.Tensor]:
        return []

    def sharded_state_dict(self, metadata: Any) -> dict[str, ShardedTensor]:
        return {
            f"weight{i}": ShardedTensor.from_rank_offsets(
                "experts.weight", matrix, (0, self.first + i, self.whole), prepend_axis_num=1
            )
            for i, matrix in enumerate(self.matrices)
        }


def test_experts_in_tensors_of_their_own_start_from_the_bits_of_stacked_ones() -> None:
    experts = _Experts(first=1, count=2, whole=3)
    with platform.alone() as process:
        initialize_parameters([experts], 7, 0.5, process.groups)
    for i, found in enumerate(experts.matrices):
        generator = torch.Generator().manual_seed(seed_of(7, "experts.weight", 1 + i))
        assert torch.equal(found, torch.empty(6, 4).normal_(0.0, 0.5, generator=generator))
