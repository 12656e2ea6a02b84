"""What `joy doctor` asks of child processes, because an import there may be slow, crash or print.

Each probe is the source of a small program that prints one JSON object as its last line.
"""

import json
import subprocess
import sys
from typing import Any

PROBE_SECONDS = 180

TORCH = """
import json, torch
found = {"version": torch.__version__, "built_for_cuda": torch.version.cuda, "devices": []}
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found["devices"].append({"name": card.name, "memory_gib": round(card.total_memory / 2**30, 1),
                                 "capability": f"{card.major}.{card.minor}"})
import torch.distributed as distributed
found["gloo"] = distributed.is_available() and distributed.is_gloo_available()
found["nccl"] = distributed.is_available() and distributed.is_nccl_available()
print(json.dumps(found))
"""

# Torch comes first: Transformer Engine looks for libraries that torch loads.
TRANSFORMER_ENGINE = """
import json, torch
import transformer_engine.pytorch
import transformer_engine
print(json.dumps({"version": transformer_engine.__version__}))
"""

# An impostor has neither amp_C nor optimizers; NVIDIA's has amp_C when it was built with its C++ and CUDA extensions.
APEX = """
import json, importlib
found = {"parts": []}
import torch
for name in ("amp_C", "apex.optimizers", "fused_weight_gradient_mlp_cuda"):
    try:
        importlib.import_module(name)
        found["parts"].append(name)
    except BaseException:
        pass
print(json.dumps(found))
"""

GIGATOKEN = """
import json, gigatoken
print(json.dumps({}))
"""


def run_probe(source: str) -> dict[str, Any]:
    """What a probe found; {"error": one line} when it failed in whatever way."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"{type(error).__name__}: no answer in {PROBE_SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    said = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return {"error": said[-1][:200] if said else f"ended with {done.returncode}"}


def first_line(command: list[str]) -> str | None:
    """The first line that a tool prints; None when it isn't there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
