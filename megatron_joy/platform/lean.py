"""What Megatron-core prepares on import and no CPU makes use of: left out, every start of a rank is shorter by it.

Ranks are separate processes, so what one imports is paid for as often as there are ranks, at every restart.
"""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Functions decorated with `@torch.compile`: that alone imports torch's whole compiler, before anything is called.
COMPILED = {"megatron.core.transformer.moe.router": ("InferenceTopKRouter._compiled_topk_routing",)}
# Optional packages that a module imports only to compare a writer with, which is never ours.
OPTIONAL = {"megatron.core.timers": "wandb"}


def _decorated(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef, ast.expr]]:
    """(qualified name, function, decorator) for each `@torch.compile` in a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            name = f"{prefix}{node.name}"
            if isinstance(node, ast.FunctionDef):
                yield from ((name, node, each) for each in node.decorator_list if ast.unparse(each) == "torch.compile")
            yield from _decorated(node, f"{name}.")


def compiled_functions(source: bytes) -> list[str]:
    """Qualified names of the functions of a module that are decorated with `@torch.compile`."""
    return [name for name, _, _ in _decorated(ast.parse(source))]


def undecorated(source: bytes) -> ast.Module:
    """A module without its `@torch.compile`: the functions under them are called as they are written."""
    tree = ast.parse(source)
    for _, function, decorator in list(_decorated(tree)):
        function.decorator_list.remove(decorator)
    return tree


@contextmanager
def without(package: str | None) -> Iterator[None]:
    """Lets `import package` fail as where it is not installed; what comes after sees it again."""
    if package is None or package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
