"""Reading and writing the files of a checkpoint: hashed while they are written, never unpickled freely."""

import io
import os
import pickle
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from blake3 import blake3
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.utils.serialization import config

from megatron_joy.checkpoint.boxes import Box, Boxes, Index
from megatron_joy.checkpoint.find import Problem, file_problem
from megatron_joy.checkpoint.marker import Checkpoint, FileEntry
from megatron_joy.data.atomic import EarlyWriteback
from megatron_joy.errors import WorkError

INDEX = ".metadata"  # torch.distributed.checkpoint's index of tensors, a pickle
_CHUNK = 1 << 20  # bytes that are hashed while they are in the core's cache from being written


class GivenUp(Exception):
    """The save was given up while a file was written."""


class _HashedStream(io.RawIOBase):
    """Passes bytes on to a file and hashes them; remembers why the disk refused.

    In chunks, each of which is read from memory once for both, and during which other threads may use the interpreter.
    """

    def __init__(self, raw: IO[bytes], files: "HashingFileSystem") -> None:
        self.raw, self.files = raw, files
        self.digest, self.size = blake3(), 0
        self._begin_writeback = EarlyWriteback(raw.fileno())

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for first in range(0, view.nbytes, _CHUNK):
            self._write_chunk(view[first : first + _CHUNK])
        return view.nbytes

    def _write_chunk(self, chunk: memoryview) -> None:
        if self.files.given_up.is_set():
            raise GivenUp("the save was given up")
        try:
            self.raw.write(chunk)
        except OSError as error:
            self.files.error = self.files.error or error
            raise
        self.digest.update(chunk)
        self.size += chunk.nbytes
        self._begin_writeback(chunk.nbytes)

    def flush(self) -> None:
        try:
            self.raw.flush()
        except OSError as error:
            self.files.error = self.files.error or error
            raise

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return self.raw.fileno()

    def close(self) -> None:
        # The file is closed by who opened it; torch closes the stream before.
        pass


class HashingFileSystem(FileSystem):
    """Files that this rank wrote, by name, and the first error of the disk.

    torch.save hides a full disk behind an error about its archive; `error` is what the disk said. Setting `given_up`,
    from any thread, ends the writing at its next write.
    """

    def __init__(self, given_up: threading.Event | None = None) -> None:
        self.files: dict[str, FileEntry] = {}
        self.error: OSError | None = None
        self.given_up = given_up or threading.Event()

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """A stream that is written from start to end.

        Archives in it carry no CRC-32, which would be a second pass over each byte: the file's checksum covers them.
        """
        name = Path(path).name
        try:
            with open(path, mode) as raw, config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
                stream = _HashedStream(cast(IO[bytes], raw), self)
                yield stream
                stream.flush()
        except OSError as error:
            self.error = self.error or error
            raise
        self.files[name] = FileEntry(name, stream.size, stream.digest.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Renames and remembers the file under its new name."""
        super().rename(path, new_path)
        entry = self.files.pop(Path(path).name)
        self.files[Path(new_path).name] = FileEntry(Path(new_path).name, entry.bytes, entry.blake3)


class Writer(FileSystemWriter):
    """One file per rank, in this process, synced and hashed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
        self.fs: HashingFileSystem = HashingFileSystem()

    def storage_meta(self) -> StorageMeta | None:
        """Nothing: it would be the path of the folder that is about to be renamed."""
        return None


class SavePlanner(DefaultSavePlanner):
    """Boxes as they are, and objects that are bytes already."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Nothing to do."""
        return object


class LoadPlanner(DefaultLoadPlanner):
    """Boxes as they are."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)


_INDEX_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Builds what an index consists of and nothing else: a pickle could name any function to be called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _INDEX_CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index consists of")
        return super().find_class(module, name)


def read_index(checkpoint: Checkpoint) -> Metadata:
    """The index of a checkpoint's tensors, its hash checked before it is unpickled.

    Raises WorkError if the file isn't the one that was committed or names anything but index classes.
    """
    path = checkpoint.path / INDEX
    problem: Problem | None
    try:
        problem = file_problem(checkpoint.path, checkpoint.marker.entry(INDEX), full=True)
    except KeyError:
        problem = Problem(INDEX, "a file of the checkpoint", "not in the marker")
    if problem is not None:
        raise WorkError(f"{checkpoint.path} is not whole: {problem}; take another checkpoint")
    with open(path, "rb") as stream:
        try:
            index = _IndexUnpickler(stream).load()
        except (pickle.UnpicklingError, AttributeError, EOFError) as error:
            raise WorkError(f"{path} can't be read as an index of tensors: {error}") from None
    names = {entry.name for entry in checkpoint.marker.files}
    foreign = [info.relative_path for info in index.storage_data.values() if info.relative_path not in names]
    if foreign:
        raise WorkError(f"{path} points to {foreign[0]}, which is not a file of the checkpoint")
    return cast(Metadata, index)


class Reader(FileSystemReader):
    """Reads tensors of a whole checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.path)
        self.index = read_index(checkpoint)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, read once and safely."""
        return self.index

    def tensor(self, key: str) -> Tensor:
        """A whole tensor on the CPU, in this process alone; it needs no process group. KeyError if there is none."""
        size = tuple(self.tensors[key].size)
        return self.box(key, tuple(0 for _ in size), size)

    def box(self, key: str, offset: Index, size: Index) -> Tensor:
        """As `tensor`, the elements from `offset` on, of `size`. The chunks in files that it meets are read whole."""
        entry = self.tensors[key]
        elements = torch.empty(size, dtype=entry.properties.dtype)
        wanted = {key: Boxes(entry.size, [Box(offset, elements)])}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant
            load(wanted, storage_reader=self, planner=LoadPlanner(), no_dist=True)
        return elements

    def parts(self, key: str) -> list[tuple[Index, Index]]:
        """(offset, size) of each chunk of a tensor in the files: what `box` reads without waste."""
        return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in self.tensors[key].chunks]

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Global shape, dtype and chunks of every tensor, by key."""
        entries = self.index.state_dict_metadata.items()
        return {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
