"""docs/glossary.md: Megatron-core names are real fields, Hugging Face keys are known, recipe keys are in our schema."""

import ast
import re
from importlib.metadata import distribution
from pathlib import Path

from megatron_joy.recipe.fields import schema_rows

GLOSSARY = Path(__file__).parents[2] / "docs" / "glossary.md"
NAME = re.compile(r"`([A-Za-z][A-Za-z0-9_.]*)`")
# Keys of DeepSeek's own config.json that transformers' class reads under another name or not at all.
DEEPSEEK_KEYS = {"num_nextn_predict_layers", "scoring_func", "topk_method", "noaux_tc", "rope_theta", "torch_dtype"}


def rows() -> list[list[str]]:
    lines = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("quantity", "---")]


def class_in(package: str, path: str, name: str) -> ast.ClassDef:
    """A class's source in an installed package (read, not imported: that takes seconds)."""
    text = Path(str(distribution(package).locate_file(path))).read_text(encoding="utf-8")
    (found,) = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == name]
    return found


def fields_of(package: str, *classes: tuple[str, str]) -> set[str]:
    """Fields of a class and its bases, each given as (path, name)."""
    return {
        node.target.id
        for path, name in classes
        for node in class_in(package, path, name).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def arguments_of(package: str, path: str, name: str) -> set[str]:
    """The constructor's arguments."""
    body = class_in(package, path, name).body
    (made,) = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    return {argument.arg for argument in (*made.args.args, *made.args.kwonlyargs)}


def test_every_row_has_five_cells() -> None:
    assert len(rows()) > 40
    assert {len(row) for row in rows()} == {5}


def test_each_megatron_name_is_a_field_of_the_installed_megatron() -> None:
    core = "megatron-core"
    plain = fields_of(
        core,
        ("megatron/core/transformer/transformer_config.py", "MLATransformerConfig"),
        ("megatron/core/transformer/transformer_config.py", "TransformerConfig"),
        ("megatron/core/model_parallel_config.py", "ModelParallelConfig"),
    )
    known = {
        "OptimizerConfig": fields_of(core, ("megatron/core/optimizer/optimizer_config.py", "OptimizerConfig")),
        "HybridModel": arguments_of(core, "megatron/core/models/hybrid/hybrid_model.py", "HybridModel"),
    }
    names = [name for row in rows() for name in NAME.findall(row[3])]
    assert len(names) > 40
    for name in names:
        owner, dot, field = name.rpartition(".")
        assert (field in known[owner]) if dot else (name in plain), name


def test_each_hugging_face_key_is_known_to_transformers_or_deepseek() -> None:
    path = "transformers/models/deepseek_v3/configuration_deepseek_v3.py"
    known = fields_of("transformers", (path, "DeepseekV3Config")) | DEEPSEEK_KEYS
    for row in rows():
        for name in NAME.findall(row[2]):
            assert name in known, name


def test_each_recipe_key_is_in_the_schema_and_each_model_and_layout_key_has_a_row() -> None:
    named = {name for row in rows() for name in NAME.findall(row[4])}
    assert named <= set(schema_rows())
    wanted = {key for key in schema_rows() if key.startswith(("model.", "layout.", "optimizer.", "precision."))}
    assert wanted - named == set()
