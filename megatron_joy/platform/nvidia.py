"""What NVIDIA's driver says of a node's GPUs, without torch: memory errors, rows to be remapped, Xid messages."""

import re
import shutil
import subprocess
from typing import Any

FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "memory.total",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
PATIENCE = 30.0  # seconds; a hanging driver is itself a finding
# Xids that are a program's own doing (NVIDIA's Xid catalogue): 13 graphics exception, 31 page fault, 43 and 45 stopped.
PROGRAMS_OWN = {13, 31, 43, 45}
_XID = re.compile(r"NVRM: Xid \(([^)]*)\): (\d+)")


def gpu_states() -> list[dict[str, Any]]:
    """One dictionary a GPU with the keys of FIELDS; values that the GPU doesn't have are None. None here: []."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return [{"error": f"nvidia-smi did not answer within {PATIENCE:.0f} s"}]
    if done.returncode:
        return [{"error": f"nvidia-smi: {(done.stdout + done.stderr).strip().partition(chr(10))[0]}"}]
    return parse_states(done.stdout)


def parse_states(text: str) -> list[dict[str, Any]]:
    """Rows of nvidia-smi's CSV without header."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [{name: _value(cell) for name, cell in zip(FIELDS, row, strict=True)} for row in rows]


def _value(cell: str) -> str | int | None:
    if cell.startswith("[") or cell == "N/A":
        return None
    return int(cell) if cell.isdecimal() else cell


def xid_messages() -> list[tuple[str, int]]:
    """(PCI address, number) of each kind of Xid in the kernel's log; [] where this user may not read it."""
    if shutil.which("dmesg") is None:
        return []
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return []
    return parse_xids(done.stdout)


def parse_xids(text: str) -> list[tuple[str, int]]:
    """Each (PCI address, number) once, in order."""
    return list(dict.fromkeys((found[1], int(found[2])) for found in _XID.finditer(text)))


def problems(states: list[dict[str, Any]], xids: list[tuple[str, int]]) -> list[str]:
    """What is wrong with a node's GPUs, a line each."""
    found = []
    for state in states:
        if "error" in state:
            found.append(str(state["error"]))
            continue
        name = f"GPU {state['index']} ({state['uuid']})"
        if state["ecc.errors.uncorrected.volatile.total"]:
            found.append(f"{name}: {state['ecc.errors.uncorrected.volatile.total']} uncorrected memory errors")
        if state["remapped_rows.failure"] not in (None, 0, "No"):
            found.append(f"{name}: a row of its memory can't be remapped")
        if state["remapped_rows.pending"] not in (None, 0, "No"):
            found.append(f"{name}: rows of its memory wait to be remapped; reset it")
    found += [f"Xid {number} of the GPU at {address}" for address, number in xids if number not in PROGRAMS_OWN]
    return found
