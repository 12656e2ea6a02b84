"""docs/glossary.md: Megatron-core names are real fields, Hugging Face keys are known, recipe keys are in our schema."""

import dataclasses
import inspect
import re
from pathlib import Path

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig
from transformers import DeepseekV3Config

from megatron_joy.recipe.fields import schema_rows

GLOSSARY = Path(__file__).parents[2] / "docs" / "glossary.md"
NAME = re.compile(r"`([A-Za-z][A-Za-z0-9_.]*)`")
# Keys of DeepSeek's own config.json that transformers' class reads under another name or not at all.
DEEPSEEK_KEYS = {"num_nextn_predict_layers", "scoring_func", "topk_method", "noaux_tc", "rope_theta", "torch_dtype"}


def rows() -> list[list[str]]:
    lines = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("quantity", "---")]


def fields_of(configuration: type) -> set[str]:
    return {field.name for field in dataclasses.fields(configuration)}


def test_every_row_has_five_cells() -> None:
    assert len(rows()) > 40
    assert {len(row) for row in rows()} == {5}


def test_each_megatron_name_is_a_field_of_the_installed_megatron() -> None:
    plain = fields_of(MLATransformerConfig)
    known = {
        "OptimizerConfig": fields_of(OptimizerConfig),
        "HybridModel": set(inspect.signature(HybridModel.__init__).parameters),
    }
    names = [name for row in rows() for name in NAME.findall(row[3])]
    assert len(names) > 40
    for name in names:
        owner, dot, field = name.rpartition(".")
        assert (field in known[owner]) if dot else (name in plain), name


def test_each_hugging_face_key_is_known_to_transformers_or_deepseek() -> None:
    known = set(DeepseekV3Config().to_dict()) | DEEPSEEK_KEYS
    for row in rows():
        for name in NAME.findall(row[2]):
            assert name in known, name


def test_each_recipe_key_is_in_the_schema_and_each_model_and_layout_key_has_a_row() -> None:
    named = {name for row in rows() for name in NAME.findall(row[4])}
    assert named <= set(schema_rows())
    wanted = {key for key in schema_rows() if key.startswith(("model.", "layout.", "optimizer.", "precision."))}
    assert wanted - named == set()
