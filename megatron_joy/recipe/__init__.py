"""Recipes: one TOML file that says everything about a run. Imports no torch."""

from .dump import dump_recipe
from .load import ShippedRecipe, list_recipes, load_recipe
from .resume import check_resume, check_run_folder
from .schema import Recipe

__all__ = [
    "Recipe",
    "ShippedRecipe",
    "check_resume",
    "check_run_folder",
    "dump_recipe",
    "list_recipes",
    "load_recipe",
]
