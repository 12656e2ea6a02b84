"""Run as a program: what Megatron-core has where we replace something, seen in a process in which nothing is replaced.

Prints one JSON object. The stand-ins are asked to install themselves while a GPU seems to be there, and must not.
"""

import importlib
import inspect
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

from megatron_joy.platform import cpu, replacements


def describe(module: str, name: str) -> dict[str, Any]:
    """What stands there: whether it is there at all, its kind, and its parameters if it is a function."""
    try:
        value = cpu.resolve(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return {"missing": str(error)}
    described = {"kind": type(value).__name__, "home": getattr(value, "__module__", "")}
    if isinstance(value, types.FunctionType):
        described["parameters"] = list(inspect.signature(value).parameters)
        described["names"] = list(value.__code__.co_names)
        described["texts"] = list(texts(value.__code__.co_consts))
    return described


def texts(constant: Any) -> Iterator[str]:
    if isinstance(constant, tuple):
        for item in constant:
            yield from texts(item)
    elif isinstance(constant, str):
        yield constant


def main() -> None:
    real = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    installed = cpu.install()
    torch.cuda.is_available = real
    found = {
        f"{entry.module}:{entry.name}": describe(entry.module, entry.name)
        for entry in (*cpu.REPLACEMENTS, *replacements.ALWAYS, *replacements.BUILDING)
    } | {
        f"{entry.module}:{entry.qualname}": describe(entry.module, entry.qualname)
        for entry in (*cpu.REWRITES, *replacements.OVERRIDDEN)
    }
    modules = [m for name, m in sys.modules.items() if name.startswith("megatron.core") and m is not None]
    found["installed"] = {
        "returned": installed,
        "finders": [type(f).__name__ for f in sys.meta_path if "megatron_joy" in type(f).__module__],
        "rebound": [m.__name__ for m in modules if isinstance(getattr(m, "torch", None), cpu._View)],
        "modules": len(modules),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
