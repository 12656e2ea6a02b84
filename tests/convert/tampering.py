"""Ways to spoil checkpoints and folders that look whole from outside."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_joy.checkpoint.find import entry_of
from megatron_joy.checkpoint.marker import read_marker, write_marker


def recommit(checkpoint: Path, name: str, edit: Callable[[str], str]) -> None:
    """Edits a text file of a checkpoint and commits it as if it had been written so."""
    path, marker = checkpoint / name, read_marker(checkpoint)
    path.write_text(edit(path.read_text()))
    files = tuple(entry_of(path) if entry.name == name else entry for entry in marker.files)
    write_marker(checkpoint, type(marker)(**vars(marker) | {"files": files}))


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(folder: Path, file: str, changes: Mapping[str, Tensor | None]) -> None:
    """Sets or (None) removes tensors of a safetensors file, and keeps the index true to it."""
    tensors = load_file(folder / file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name], index["weight_map"][name]
        else:
            tensors[name], index["weight_map"][name] = tensor.contiguous(), file
    save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
