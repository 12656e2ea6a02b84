"""The architecture as Megatron-core's layer pattern: '+' MLA, '-' dense MLP, 'E' MoE, '|' pipeline cut, '/' MTP."""

from megatron_joy.recipe.schema import Recipe


def layer_symbols(recipe: Recipe) -> list[str]:
    """One entry per decoder layer, attention and feed-forward: '+-' for the dense first ones, '+E' for the others."""
    model = recipe.model
    return ["+-" if i < model.first_k_dense_replace else "+E" for i in range(model.num_hidden_layers)]


def pipeline_cuts(recipe: Recipe) -> list[int]:
    """Decoder layers of each pipeline chunk in model order; sums to num_hidden_layers."""
    layout = recipe.layout
    if layout.pipeline_layer_counts is not None:
        return layout.pipeline_layer_counts
    chunks = layout.pipeline_model_parallel_size * layout.virtual_pipeline_model_parallel_size
    return [recipe.model.num_hidden_layers // chunks] * chunks


def layer_pattern(recipe: Recipe) -> str:
    """For example '+-+E|+E+E/+-': four layers in two pipeline chunks and one dense MTP layer."""
    symbols = iter(layer_symbols(recipe))
    chunks = ["".join(next(symbols) for _ in range(count)) for count in pipeline_cuts(recipe)]
    return "|".join(chunks) + "/+-" * recipe.model.num_nextn_predict_layers
