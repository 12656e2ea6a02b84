"""Where the ranks on this node hang: `python -m launch.stacks RUN FENCE` prints a JSON object for each of them.

Asks each rank for its stacks (SIGUSR1) and takes what it then writes to its log. One that somebody stopped is woken for
that and ends with it: the attempt has been given up, and must not go on behind the supervisor's back.
Standard library only. It signals only processes whose heartbeat belongs to the attempt and whose command is Python's.
"""

import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_joy.runstate import launch_folder
from megatron_joy.runstate.heartbeat import Beat, node_name, read_beats
from megatron_joy.runstate.stacks import HEAD, LAST_SIGNAL, SIGNAL

WAIT_SECONDS = 15.0
MEANING = {"T": "stopped (SIGSTOP)", "t": "stopped by a debugger", "D": "waiting for a disk", "Z": "dead"}
FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+)(?: in (?P<name>.+))?$', re.MULTILINE)
# The outermost frame of a main thread, or what stands for those that are left out.
WHOLE = re.compile(r"(in (<module>|_run_module_as_main|_bootstrap)|^  \.\.\.)\n", re.MULTILINE)


@dataclass(frozen=True)
class Stack:
    """What a rank was doing: its process's state in a word and its main thread's innermost frames, innermost first."""

    rank: int
    node: str
    done: int
    state: str
    frames: tuple[str, ...]
    log: str

    @property
    def stopped(self) -> bool:
        """Whether the process itself was not allowed to run."""
        return self.state != "running"

    def __str__(self) -> str:
        where = f" at {self.frames[0]}" if self.frames else ", and gives no stack"
        return f"rank {self.rank} on {self.node} is {self.state} after step {self.done}{where}"


def _state(pid: int) -> str | None:
    """The state letter of a Python process; None where it isn't one."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    return status.rpartition(")")[2].split()[0] if b"python" in command.partition(b"\0")[0] else None


def _frames(dump: str) -> tuple[str, ...]:
    """Of the thread that got the signal, which is the main one."""
    found = FRAME.finditer(dump.partition(HEAD)[2].partition("\n\n")[0])
    return tuple(f"{Path(one['file']).name}:{one['line']} {one['name'] or ''}".strip() for one in found)[:8]


def _ask(beat: Beat) -> str | None:
    """Asks a rank for its stacks; its state before."""
    letter = _state(beat.pid)
    if letter is None:
        return None
    _signal_main_thread(beat.pid, LAST_SIGNAL if letter == "T" else SIGNAL)
    with suppress(OSError):
        os.kill(beat.pid, signal.SIGCONT)
    return letter


def _signal_main_thread(pid: int, number: int) -> None:
    """To the thread whose stack is wanted: what is sent to a process may reach a thread of C++, whose dump then reads
    the main thread's frames while they change, which has crashed.
    """
    ctypes.CDLL(None).tgkill(pid, pid, int(number))  # Linux: a process's main thread has its number


def collect(run: Path, fence: int, node: str, stale: Sequence[Beat] = ()) -> list[Stack]:
    """The stacks of an attempt's ranks on a node; `stale` heartbeats are of none of them."""
    here = [beat for beat in read_beats(run, fence) if beat.node == node and beat not in stale]
    logs = {beat.rank: run / "logs" / f"rank_{beat.rank}.log" for beat in here}
    sizes = {rank: log.stat().st_size if log.exists() else 0 for rank, log in logs.items()}
    letters = {beat.rank: _ask(beat) for beat in here}
    dumps = dict.fromkeys(logs, "")
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end and not all(WHOLE.search(dump.partition(HEAD)[2]) for dump in dumps.values()):
        time.sleep(0.02)
        for beat in here:
            with suppress(OSError), open(logs[beat.rank], errors="replace") as stream:
                stream.seek(sizes[beat.rank])
                dumps[beat.rank] = stream.read()
    return [
        Stack(
            beat.rank,
            node,
            beat.done,
            "gone" if (letter := letters[beat.rank]) is None else MEANING.get(letter, "running"),
            _frames(dumps[beat.rank]),
            str(logs[beat.rank]),
        )
        for beat in here
    ]


def keep(run: Path, fence: int, hang: str, stacks: Sequence[Stack]) -> str:
    """Keeps the stacks in a file; the line about the hang, which names a rank that was stopped or far behind."""
    file = launch_folder(run) / f"hang_{fence:06d}.txt"
    lines = [f"{stack}\n{''.join(f'    {frame}{chr(10)}' for frame in stack.frames)}" for stack in stacks]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{hang}\n\n" + "\n".join(lines), encoding="utf-8")
    worst = sorted(stacks, key=lambda stack: (not stack.stopped, stack.done, stack.rank))[:1]
    line = f"{hang}; {'; '.join(map(str, worst)) or 'no rank gives its stack'}; all stacks are in {file}"
    for stack in worst:
        speak_for(stack.rank, Path(stack.log), line)
    return line


def speak_for(rank: int, log: Path, why: str) -> None:
    """Puts why a rank ended into its log as the rank would have, for `joy status` to find; not where it has none."""
    with suppress(OSError), open(log, "r+", encoding="utf-8") as stream:
        stream.seek(0, os.SEEK_END)
        stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank} failed\n{why}\n")


def main() -> int:
    """The helper on each node of a hanging attempt."""
    run, fence = Path(sys.argv[1]), int(sys.argv[2])
    for stack in collect(run, fence, node_name()):
        print(json.dumps(asdict(stack)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
