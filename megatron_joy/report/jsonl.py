"""Lines of JSON on disk: appended so that a kill costs at most the line being written, read so that one never hurts.

`JsonLines` is the writing half, `parse_line` and `tail_rows` the reading half. A SIGKILL in the middle of a write
leaves a torn last line; the next writer removes it, and every reader steps over it.
"""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import orjson

from megatron_joy.errors import WorkError

_CHUNK_BYTES = 1 << 16
_FULL = (errno.ENOSPC, errno.EDQUOT)
PATIENCE_SECONDS = 5.0  # with a full disk: a checkpoint that found it full beside training is just giving its room back
_RETRY_SECONDS = 0.05


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on one line, or None for anything else (torn, empty, not an object).

    Python's own parser is the second try because other writers put bare NaN and Infinity, which JSON hasn't.
    """
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line)
        except ValueError:
            return None
    return row if isinstance(row, dict) else None


def tail_rows(path: Path, count: int, max_bytes: int = 64 << 20) -> list[dict[str, Any]]:
    """The last `count` whole rows, oldest first, read from the end: as fast for a terabyte as for a kilobyte.

    Args:
        path: the file; a missing one has no rows.
        count: rows wanted; fewer come back when the file or `max_bytes` ends first.
        max_bytes: how far back to look at most.
    """
    if not path.is_file():
        return []
    want = _CHUNK_BYTES
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while True:
            want = min(want, size, max_bytes)
            file.seek(size - want)
            lines = file.read(want).split(b"\n")
            whole = lines if want == size else lines[1:]
            if len(whole) > count + 1 or want in (size, max_bytes):
                break
            want *= 4
    rows = [row for line in whole if line and (row := parse_line(line)) is not None]
    return rows[-count:]


class JsonLines:
    """An append-only file of JSON objects, one a line.

    Opening repairs what a kill left: a torn last line is cut off (`removed_bytes` says how long it was), a whole one
    that only lacks its newline gets it. A failed write is taken back, so that the next row starts on a clean line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end = os.lseek(self._descriptor, 0, os.SEEK_END)
        self._patience = PATIENCE_SECONDS
        self.removed_bytes = self._repair()

    def _repair(self) -> int:
        start, tail = self._last_line()
        if not tail:
            return 0
        if parse_line(tail) is not None:
            self._write(b"\n")
            return 0
        os.ftruncate(self._descriptor, start)
        self._end = start
        return len(tail)

    def _last_line(self) -> tuple[int, bytes]:
        """Offset and bytes of what follows the last newline."""
        start, tail = self._end, b""
        while start > 0:
            length = min(_CHUNK_BYTES, start)
            start -= length
            chunk = os.pread(self._descriptor, length, start)
            newline = chunk.rfind(b"\n")
            if newline >= 0:
                return start + newline + 1, chunk[newline + 1 :] + tail
            tail = chunk + tail
        return 0, tail

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row at once; it survives the death of this process as soon as this returns.

        Raises:
            WorkError: the disk refused (gone, full and still so after PATIENCE_SECONDS); the file still ends in a whole
                line.
        """
        self._write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))

    def _write(self, line: bytes) -> None:
        while (refused := self._try_to_write(line)) is not None:
            if refused.errno not in _FULL or self._patience <= 0:
                raise WorkError(f"{self.path}: cannot append a row: {refused.strerror}") from refused
            self._patience -= _RETRY_SECONDS
            time.sleep(_RETRY_SECONDS)
        self._patience = PATIENCE_SECONDS

    def _try_to_write(self, line: bytes) -> OSError | None:
        """Writes a whole line or, when the disk refuses, nothing: what it said."""
        done = 0
        try:
            while done < len(line):
                done += os.pwrite(self._descriptor, line[done:], self._end + done)
        except OSError as error:
            os.ftruncate(self._descriptor, self._end)
            return error
        self._end += done
        return None

    def sync(self) -> None:
        """Asks the disk to keep what was written, against a loss of power."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
