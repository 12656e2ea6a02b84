"""One cuDNN in the process: torch's own, also for Transformer Engine.

Transformer Engine looks for cuDNN on the system first. Where another version is installed there than torch brought,
parts of both end in one process: torch then refuses its own, and every fused attention kernel is refused in silence, so
that attention falls back to one that keeps all scores (seen: 9.14 beside 9.19).
"""

import ctypes
import os
from pathlib import Path

import torch

NAMED_BY_USER = ("CUDNN_HOME", "CUDNN_PATH")


def prefer_torchs() -> bool:
    """Loads the cuDNN of torch's packages and points Transformer Engine to it; call before anything imports that.

    True when it did. Nothing happens where the user named another cuDNN, or torch has none of its own.
    """
    home = Path(torch.__file__).resolve().parents[1] / "nvidia" / "cudnn"
    libraries = sorted((home / "lib").glob("libcudnn*.so.*"))
    if not libraries or any(os.environ.get(name) for name in NAMED_BY_USER):
        return False
    # What needs one of them later gets the one that is loaded, by its name.
    for library in libraries:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["CUDNN_HOME"] = str(home)
    return True


def mixed(engines: tuple[int, int, int]) -> str | None:
    """What is wrong if Transformer Engine's cuDNN (`engines`: its version) isn't torch's; None where it is."""
    advice = f"set {NAMED_BY_USER[0]} and LD_LIBRARY_PATH so that both find the same"
    try:
        number = torch.backends.cudnn.version()
    except RuntimeError as error:  # torch found another version than it was built with
        return f"torch refuses its cuDNN ({str(error).splitlines()[0][:160]}); {advice}"
    if number is None or (number // 10000, number // 100 % 100, number % 100) == engines:
        return None
    return f"Transformer Engine has cuDNN {'.'.join(map(str, engines))} and torch {number}; {advice}"
