"""The unigram entropy of a run's validation text: the loss of a model that knows only how frequent each token is."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from megatron_joy.data.manifest import manifest_path


def unigram_entropy(recipe: Mapping[str, Any], run_folder: Path) -> float | None:
    """Nats per token, from the manifests of the validation blend; None where any of them is missing or lacks it.

    A manifest's path is relative to where the run was started, which may be elsewhere by now: the present folder and
    the folders above the run are tried. Several sources give their mean by weight.
    """
    data = recipe.get("data")
    entries = data.get("validation") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        return None
    weights, values = [], []
    for entry in entries:
        value = _of_manifest(str(entry.get("manifest", "")), run_folder) if isinstance(entry, dict) else None
        if value is None:
            return None
        weights.append(float(entry.get("weight", 1.0)))
        values.append(value)
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def _of_manifest(place: str, run_folder: Path) -> float | None:
    for root in _roots(run_folder):
        try:
            manifest = orjson.loads(manifest_path(root / place).read_bytes())
        except (OSError, orjson.JSONDecodeError):
            continue
        value = manifest.get("unigram_entropy") if isinstance(manifest, dict) else None
        return float(value) if isinstance(value, (int, float)) and value > 0 else None
    return None


def _roots(run_folder: Path) -> Iterable[Path]:
    yield Path()
    yield from run_folder.resolve().parents
