"""Every parameter of the real model has its optimizer by name, and its matrices are the model's."""

import math
from collections import Counter

import pytest
import torch

from megatron_joy.model.size import meta_model
from megatron_joy.optim.split import matrices_of, split_text
from megatron_joy.parallel.kinds import kind_of
from megatron_joy.recipe import load_recipe

# The whole matrices of JoyAI (arXiv 2604.03044, Table 1): 40 layers and the MTP layer, one dense layer, 39 MoE layers.
EXPECTED = Counter(
    {
        (1536, 2048): 41,  # q down
        (6144, 1536): 41,  # q up: 32 heads x (128 + 64)
        (576, 2048): 41,  # kv down: 512 + 64
        (8192, 512): 41,  # kv up: 32 heads x (128 + 128)
        (2048, 4096): 41,  # output: 32 heads x 128
        (7168, 2048): 2 * 2,  # gate and up of the dense layer and of the MTP layer
        (2048, 7168): 2,
        (768, 2048): 2 * 39 * 257,  # gate and up of 256 routed experts and the shared one
        (2048, 768): 39 * 257,
        (2048, 4096, "eh"): 1,
    }
)


def test_the_48bs_matrices_are_muons_and_the_rest_is_adamws() -> None:
    found: Counter[tuple[object, ...]] = Counter()
    adamw: Counter[str] = Counter()
    for name, param in meta_model(load_recipe("joyai_48b_a3b")).named_parameters():
        matrices = matrices_of(name, param)
        if matrices is None:
            adamw[kind_of(name).what] += 1
        else:
            found[(*matrices.whole, "eh") if "eh_proj" in name else matrices.whole] += matrices.count
    assert found == EXPECTED
    # Norms: two a layer and two of MLA's latents for 41 layers, MTP's enorm, hnorm and end, the stack's end.
    assert adamw == {"embedding": 1, "head": 1, "router": 39, "norm": 41 * 4 + 3 + 1}


def test_the_split_is_told_in_a_line_for_each_name() -> None:
    told = split_text(meta_model(load_recipe("joyai_tiny")).named_parameters())
    assert "decoder.layers.N.mlp.experts.linear_fc1" in told and "16 x [96, 128]" in told
    assert any(line.startswith("adamw") and "router" in line for line in told.splitlines())


def test_transformer_engines_names_of_experts_are_known() -> None:
    fc1 = matrices_of("decoder.layers.3.mlp.experts.linear_fc1.weight17", torch.empty(8, 4))
    fc2 = matrices_of("module.decoder.layers.3.mlp.experts.linear_fc2.weight0", torch.empty(4, 4))
    assert fc1 is not None and (fc1.count, fc1.rows, fc1.columns) == (2, 4, 4)
    assert fc2 is not None and fc2.count == 1


def test_a_parameter_without_a_row_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"no optimizer is named for parameter decoder\.new_thing\.weight"):
        kind_of("module.decoder.new_thing.weight")
    with pytest.raises(RuntimeError, match="2-D"):
        matrices_of("decoder.layers.0.mlp.linear_fc2.weight", torch.empty(3))


def test_scale_times_orthogonal_has_the_rms_that_is_asked_for() -> None:
    for rows, columns in ((1536, 2048), (8192, 512)):
        rms_of_orthogonal = math.sqrt(min(rows, columns) / (rows * columns))
        assert 0.2 * math.sqrt(max(rows, columns)) * rms_of_orthogonal == pytest.approx(0.2)
