"""What a run may change in mid-course: a table over every key of the schema, enforced on resume."""

from pathlib import Path
from typing import Any

from megatron_joy.errors import UserError

from .dump import format_value
from .load import load_recipe
from .schema import Recipe

RECIPE_FILE = "recipe.toml"  # in a run's folder: the resolved recipe it was started with last

LONGEST_CHANGE = 80  # characters

# Key or section -> may it change; the longest match decides. A test asks that every key of the schema is covered.
MAY_CHANGE: dict[str, bool] = {
    "name": True,
    "description": True,
    # Initial weights and sample order follow from it.
    "seed": False,
    "model": False,
    # None of these changes a weight's shape or meaning.
    "model.backend": True,
    "model.router_bias_update_rate": True,
    "model.mtp_loss_factor": True,
    "model.sequence_balance_factor": True,
    # No weight has a row for each position: a longer context is a stage with more of them.
    "model.max_position_embeddings": True,
    # Checkpoints are layout-free.
    "layout": True,
    # Optimizer state of another format would be read as if it were this one.
    "precision": False,
    # Rounds the operands of products; no weight is stored in it. Delayed scales that a checkpoint lacks begin anew.
    "precision.fp8": True,
    # What the next updates read may change, at a stage or by an edit. What is done may not: `ledger.check_history`
    # holds that against the checkpoint, and the ledger keeps the blends.
    "data.sequence_length": True,
    "data.train": True,
    "stages": True,
    # A path: what lies there is held against the shards, and theirs against the checkpoint.
    "data.tokenizer": True,
    # Another meaning of the same tokens.
    "data.document_mask": False,
    "data.validation": True,
    # The moments in the checkpoint are averages under these.
    "optimizer.name": False,
    "optimizer.betas": False,
    "optimizer.eps": False,
    "optimizer.moments_dtype": False,
    "optimizer.weight_decay": True,
    "optimizer.clip_grad": True,
    "optimizer.muon_momentum": False,
    # How an update is made of the momentum, not what the momentum is.
    "optimizer.muon_nesterov": True,
    "optimizer.muon_coefficients": True,
    "optimizer.muon_steps": True,
    "optimizer.muon_update_rms": True,
    "optimizer.muon_dtype": True,
    "schedule": True,
    "train": True,
    # As the sequence length, by `ledger.check_history`.
    "train.global_batch_size": True,
    "checkpoint": True,
    # Decisions that are made stay made: the ledger keeps them. What a run began with it can't begin with again.
    "guards": True,
    "guards.ledger": False,
    "run": True,
}


def may_change(key: str) -> bool:
    """Whether a run may go on with another value of this dotted key. Raises KeyError on a key the table lacks."""
    while key not in MAY_CHANGE:
        key, dot, _ = key.rpartition(".")
        if not dot:
            raise KeyError(key)
    return MAY_CHANGE[key]


def _flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _differing(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Each key with another value, lists as a whole, with both."""
    before, after = _flat(old.model_dump()), _flat(new.model_dump())
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def changes(old: Recipe, new: Recipe) -> str:
    """What a run goes on with that its checkpoint was not written under, for its record; empty where nothing is.

    The layout and the folder are told elsewhere; of long values only the key.
    """
    told = []
    for key, values in _differing(old, new).items():
        if key.startswith("layout.") or key == "run.folder":
            continue
        text = " -> ".join(map(format_value, values))
        told.append(f"{key} ({text})" if len(text) <= LONGEST_CHANGE else key)
    return ", ".join(told)


def check_resume(old: Recipe, new: Recipe) -> None:
    """Refuse to go on with `old`'s checkpoint under `new` when a key differs that must not.

    Both are resolved recipes. Raises UserError with one line that names every such key with both values.
    """
    changed = {key: values for key, values in _differing(old, new).items() if not may_change(key)}
    if changed:
        listed = ", ".join(f"{key} ({' -> '.join(map(format_value, values))})" for key, values in changed.items())
        raise UserError(
            f"cannot resume {new.run.folder}: the recipe changes {listed}, which a run must keep; "
            "put the old values back or set run.folder to start a new run"
        )


def check_run_folder(recipe: Recipe) -> None:
    """Refuse a run.folder that another recipe's run or anything else is in. Writes nothing.

    A resolved recipe. Raises UserError as `check_resume`, and for a folder that has things in it but no recipe.
    """
    folder = Path(recipe.run.folder or "")
    saved = folder / RECIPE_FILE
    if saved.exists():
        check_resume(load_recipe(str(saved)), recipe)
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.folder {folder}: is a file, expected a folder; name a new or empty one")
    # Logs, a launcher's files and hidden ones are what a first start that was killed may have left.
    left = ("logs", "launch")
    others = [entry.name for entry in folder.iterdir() if entry.name not in left] if folder.exists() else []
    if any(not name.startswith(".") for name in others):
        raise UserError(
            f"run.folder {folder}: the folder has other things in it and no {RECIPE_FILE}; name a new or empty folder"
        )
