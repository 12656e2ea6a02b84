"""How a rank that leaves tells its launcher why: a line of JSON in a pipe, whose order is that of the failures.

Where the launcher shares no pipe with its ranks (MPI forwards what they print, nothing else), the line goes to stderr
with a mark before it. Under Slurm each rank leaves a file in a folder; their order is that of the files' times, which
one file server gives.
"""

import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_joy.runstate.files import read_json, write_json

VARIABLE = "JOY_REASONS_FD"  # a rank's environment: number of the pipe's open descriptor, or MARKED
MARKED = "stderr"
MARK = b"\x1ejoy reason: "  # no line that a rank prints begins with ASCII's record separator
FOLDER_VARIABLE = "JOY_REASONS_FOLDER"  # a rank's environment: where it leaves its reason, without a pipe
LONGEST = 3000  # characters of a message; a line below PIPE_BUF (4096 bytes) is never mixed with another rank's


@dataclass(frozen=True)
class Reason:
    """Why a rank leaves and with which exit code."""

    rank: int
    exit_code: int
    message: str


def keep_stderr() -> None:
    """Called before a rank's stderr becomes its log: marked lines go to where it led before."""
    if os.environ.get(VARIABLE) == MARKED:
        os.environ[VARIABLE] = f"{MARKED}:{os.dup(2)}"


def launcher_reads_marks() -> bool:
    """Whether marked lines are how the launcher hears of this rank."""
    return os.environ.get(VARIABLE, "").startswith(MARKED)


def marked_reason(line: str) -> Reason | None:
    """The reason in a line of stderr; None for any other line."""
    _, mark, told = line.partition(MARK.decode())
    try:
        return Reason(**json.loads(told)) if mark else None
    except (ValueError, TypeError):
        return None


def tell_launcher(reason: Reason) -> bool:
    """Hands the reason to the launcher; False where none listens and the rank has to say it itself."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        value = asdict(reason) | {"message": reason.message[:LONGEST]}
        try:
            write_json(Path(folder) / f"rank_{reason.rank}.json", value)
        except OSError:
            return False
        return True
    descriptor = os.environ.get(VARIABLE, "")
    line = json.dumps(asdict(reason) | {"message": reason.message[:LONGEST]}, ensure_ascii=False).encode() + b"\n"
    if len(line) > 4096:  # many bytes a character
        line = json.dumps(asdict(reason) | {"message": reason.message[: LONGEST // 6]}).encode() + b"\n"
    try:
        if descriptor.startswith(MARKED):
            _, _, number = descriptor.partition(":")
            os.write(int(number or 2), MARK + line)
            return True
        if not stat.S_ISFIFO(os.fstat(int(descriptor)).st_mode):
            return False
        os.write(int(descriptor), line)
    except (ValueError, OSError):
        return False
    return True


def reasons_in(folder: Path) -> list[Reason]:
    """What ranks have left in a folder, in the order in which they failed."""
    files = [path for path in folder.glob("rank_*.json") if path.is_file()]
    found = (read_json(path) for path in sorted(files, key=lambda path: path.stat().st_mtime_ns))
    return [Reason(**value) for value in found if value is not None]


class Reasons:
    """The launcher's end of the pipe. `descriptor` is for the ranks."""

    def __init__(self) -> None:
        self._read, self.descriptor = os.pipe()
        os.set_blocking(self._read, False)
        self._rest = b""

    def received(self) -> list[Reason]:
        """What came since the last call, in the order in which ranks failed; never waits."""
        try:
            while chunk := os.read(self._read, 1 << 16):
                self._rest += chunk
        except BlockingIOError:
            pass
        *lines, self._rest = self._rest.split(b"\n")
        return [Reason(**json.loads(line)) for line in lines]

    def close(self) -> None:
        """Closes both ends."""
        os.close(self._read)
        os.close(self.descriptor)
