"""A recipe in small keeps its layers, cuts, experts and degrees; what it can't keep it says."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_joy.model.pattern import layer_symbols, pipeline_cuts
from megatron_joy.prove.shrink import FLOORS, fit_world, one_process, shrink
from megatron_joy.recipe import list_recipes, load_recipe
from megatron_joy.recipe.schema import LayoutSection

SHIPPED = [recipe.name for recipe in list_recipes()]


@pytest.mark.parametrize("name", SHIPPED)
def test_with_enough_processes_only_widths_shrink(name: str) -> None:
    recipe = load_recipe(name)
    small = shrink(recipe, 16, 12)
    assert small.reduced == ()
    assert small.recipe.layout == recipe.layout
    assert layer_symbols(small.recipe) == layer_symbols(recipe)
    assert pipeline_cuts(small.recipe) == pipeline_cuts(recipe)
    assert small.recipe.model.n_routed_experts == recipe.model.n_routed_experts
    assert small.recipe.model.num_experts_per_tok == recipe.model.num_experts_per_tok
    assert all(getattr(small.recipe.model, key) <= getattr(recipe.model, key) for key in FLOORS)
    assert small.recipe.data.sequence_length <= recipe.data.sequence_length


def test_the_48b_is_a_few_million_weights_in_small() -> None:
    model = shrink(load_recipe("joyai_48b_a3b"), 16, 12).recipe.model
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    assert model.n_routed_experts == 256
    assert 39 * 257 * expert < 20_000_000
    # The residual stream is as loud as at full width: std of a sum of hidden_size products.
    assert model.initializer_range * math.sqrt(model.hidden_size) == pytest.approx(0.02 * math.sqrt(2048))


@pytest.mark.parametrize(
    ("processes", "pp", "ep", "dp"), [(16, 2, 8, 8), (8, 2, 4, 4), (4, 2, 2, 2), (2, 2, 1, 1), (1, 1, 1, 1)]
)
def test_the_48bs_degrees_are_halved_until_they_fit(processes: int, pp: int, ep: int, dp: int) -> None:
    small = shrink(load_recipe("joyai_48b_a3b"), processes, 12)
    layout = small.recipe.layout
    degrees = (layout.pipeline_model_parallel_size, layout.expert_model_parallel_size, layout.data_parallel_size)
    assert degrees == (pp, ep, dp)
    named = {change.key: (change.was, change.now) for change in small.reduced}
    assert ("layout.expert_model_parallel_size" in named) == (ep != 8)
    if ep != 8:
        assert named["layout.expert_model_parallel_size"] == (8, ep)


def test_replicas_go_first() -> None:
    layout = LayoutSection(tensor_model_parallel_size=2, context_parallel_size=2, data_parallel_size=8)
    made = fit_world(layout, 4, 4)
    assert (made.tensor_model_parallel_size, made.context_parallel_size, made.data_parallel_size) == (2, 2, 1)
    assert fit_world(layout, 8, 4).data_parallel_size == 2


def test_merged_stages_keep_the_layers_of_both() -> None:
    layout = LayoutSection(
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=2,
        pipeline_layer_counts=[1, 2, 3, 4, 5, 6, 7, 8],
    )
    assert fit_world(layout, 2, 36).pipeline_layer_counts == [3, 7, 11, 15]
    alone = fit_world(layout, 1, 36)
    assert (alone.pipeline_layer_counts, alone.virtual_pipeline_model_parallel_size) == ([36], 1)


def test_too_many_experts_for_a_machine_are_halved_and_it_is_said() -> None:
    recipe = load_recipe("joyai_48b_a3b", ["model.n_routed_experts=4096"])
    small = shrink(recipe, 16, 12)
    (change,) = small.reduced
    assert (change.key, change.was) == ("model.n_routed_experts", 4096)
    assert change.now == small.recipe.model.n_routed_experts == 512
    assert "too many" in change.why


degrees = st.sampled_from([1, 1, 2, 3, 4, 8])


@settings(max_examples=300, deadline=None)
@given(
    degrees, degrees, st.sampled_from([1, 2]), degrees, degrees, st.sampled_from([1, 2]), degrees, st.integers(1, 40)
)
@example(1, 1, 1, 1, 1, 2, 1, 1)  # nothing but replicas and parts of experts
def test_any_layout_fits_any_number_of_processes(
    tp: int, pp: int, vpp: int, cp: int, ep: int, etp: int, dp: int, processes: int
) -> None:
    layout = LayoutSection(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if pp > 1 else 1,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        data_parallel_size=dp * ep * etp,  # so that experts fit
        pipeline_layer_counts=[1 + i % 3 for i in range(pp * (vpp if pp > 1 else 1))],
    )
    layers = sum(layout.pipeline_layer_counts or [])
    made = fit_world(layout, processes, layers)
    assert made.world_size <= processes
    assert made.world_size % made.expert_model_parallel_world == 0
    assert sum(made.pipeline_layer_counts or []) == layers
    assert len(made.pipeline_layer_counts or []) == made.pipeline_chunks
    for key in LayoutSection.model_fields:
        before, after = getattr(layout, key), getattr(made, key)
        assert not isinstance(before, int) or isinstance(before, bool) or before % after == 0, key


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("cp", [1, 2, 5])
def test_widths_divide_whatever_the_degrees(tp: int, cp: int) -> None:
    recipe = load_recipe("joyai_tiny").model_copy(
        update={
            "layout": LayoutSection(tensor_model_parallel_size=tp, context_parallel_size=cp, pipeline_layer_counts=[4])
        }
    )
    wide = {
        "num_attention_heads": 12,
        "hidden_size": 384,
        "intermediate_size": 768,
        "moe_intermediate_size": 192,
        "vocab_size": 6144,
        "max_position_embeddings": 4096,
    }
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=wide)})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sequence_length": 960})})
    small = shrink(recipe, 16, 12).recipe  # raises when a rule of recipes is broken
    assert small.model.hidden_size % tp == 0 and small.data.sequence_length % (2 * cp * tp) == 0


def test_the_reference_has_the_same_model_and_samples() -> None:
    small = shrink(load_recipe("joyai_48b_a3b"), 4, 12).recipe
    alone = one_process(small)
    assert alone.layout.world_size == 1
    assert alone.layout.pipeline_layer_counts == [40]
    assert (alone.model, alone.data, alone.seed, alone.schedule) == (
        small.model,
        small.data,
        small.seed,
        small.schedule,
    )
    assert alone.train.global_batch_size == alone.train.micro_batch_size == small.train.global_batch_size
    assert (small.train.recompute, alone.train.recompute) == ("selective", "none")
