"""What a task costs: seconds, memory, bytes. `joy plan --data` extrapolates from it; no output's bytes depend on it."""

import contextlib
import os
import time
from pathlib import Path

KILOBYTE = 1024  # of /proc
PAGE = os.sysconf("SC_PAGE_SIZE")


def _peak_bytes() -> int:
    """The most resident memory since the peak was last forgotten: own, and mapped files as far as they were read."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return KILOBYTE * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def _forget_peak() -> None:
    """Let the peak begin anew. Where the kernel forbids it, it is that of all tasks so far, which is never too low."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident_bytes() -> int:
    """This process's resident memory."""
    return PAGE * int(Path("/proc/self/statm").read_bytes().split()[1])


class Stopwatch:
    """Measures from its making on."""

    def __init__(self) -> None:
        _forget_peak()
        self._wall, self._cpu = time.monotonic(), self._cpu_seconds()

    @staticmethod
    def _cpu_seconds() -> float:
        """User and system time of this process and of those it has waited for."""
        return sum(os.times()[:4])

    def cost(self, bytes_written: int) -> dict[str, float]:
        """Seconds by the clock, seconds of CPU, peak of this process's resident memory in bytes, bytes written."""
        wall, cpu = time.monotonic() - self._wall, self._cpu_seconds() - self._cpu
        return {
            "wall_seconds": round(wall, 4),
            "cpu_seconds": round(cpu, 4),
            "peak_bytes": _peak_bytes(),
            "bytes_written": bytes_written,
        }
