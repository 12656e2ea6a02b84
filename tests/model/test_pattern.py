"""The layer pattern is the architecture: one dense layer, MoE layers, a dense MTP layer, cut where the pipeline is."""

from megatron_joy.model.pattern import layer_pattern, pipeline_cuts
from megatron_joy.recipe import load_recipe


def test_pattern_of_the_48b_is_one_dense_and_39_sparse_layers_and_a_dense_mtp_layer() -> None:
    recipe = load_recipe("joyai_48b_a3b", ["layout.pipeline_model_parallel_size=1"])
    assert layer_pattern(recipe) == "+-" + "+E" * 39 + "/+-"


def test_pipeline_cuts_stand_between_layers() -> None:
    recipe = load_recipe("joyai_48b_a3b")
    assert layer_pattern(recipe) == "+-" + "+E" * 19 + "|" + "+E" * 20 + "/+-"
    uneven = load_recipe(
        "joyai_48b_a3b",
        ["layout.virtual_pipeline_model_parallel_size=2", "layout.pipeline_layer_counts=[11, 10, 10, 9]"],
    )
    assert pipeline_cuts(uneven) == [11, 10, 10, 9]
    assert layer_pattern(uneven) == "|".join(["+-" + "+E" * 10, "+E" * 10, "+E" * 10, "+E" * 9]) + "/+-"


def test_pattern_without_mtp_has_no_mtp_part() -> None:
    assert layer_pattern(load_recipe("joyai_tiny", ["model.num_nextn_predict_layers=0"])) == "+-+E+E+E"
