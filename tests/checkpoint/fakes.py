"""Checkpoint folders without tensors, for what must hold of any files."""

from pathlib import Path

from blake3 import blake3

from megatron_joy.checkpoint.marker import FileEntry, Marker, folder_name, write_marker

FILES = {"__0_0.distcp": b"weights" * 100, "__1_0.distcp": b"moments" * 200, ".metadata": b"index" * 10}


def make_checkpoint(
    folder: Path, step: int, attempt: int = 0, name: str | None = None, validation_loss: float | None = None
) -> Path:
    """A folder that is whole as far as marker, sizes and hashes go."""
    path = folder / (name or folder_name(step))
    path.mkdir(parents=True)
    for file, content in FILES.items():
        (path / file).write_bytes(content)
    entries = tuple(FileEntry(file, len(text), blake3(text).hexdigest()) for file, text in FILES.items())
    marker = Marker(
        step=step,
        attempt=attempt,
        time=1_700_000_000.0,
        world_size=2,
        layout={"tensor_model_parallel_size": 1, "expert_model_parallel_size": 2, "data_parallel_size": 2},
        versions={"megatron_joy": "0", "megatron_core": "0", "torch": "0"},
        recipe_sha256="0" * 64,
        optimizer_step=step,
        state={"step": step, "samples": 4 * step, "best": 0.1 + 0.2, "validation_loss": validation_loss},
        files=entries,
    )
    write_marker(path, marker)
    return path
