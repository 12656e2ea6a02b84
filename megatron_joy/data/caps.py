"""A recipe's caps on epochs, held against what its shards have."""

from megatron_joy.data.manifest import load_manifest
from megatron_joy.recipe.schema import Recipe
from megatron_joy.recipe.usage import check_caps


def check_epochs(recipe: Recipe) -> None:
    """Raises UserError for each source that the run reads more often than its `max_epochs`, and as load_manifest."""
    capped = [source for source in recipe.data.train if source.max_epochs is not None]
    check_caps(recipe, {source.label: load_manifest(source.manifest).totals.tokens for source in capped})
