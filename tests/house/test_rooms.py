"""Imports follow the arrows of docs/architecture.md and never turn back; torch-free rooms stay torch-free."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"megatron_joy", "data_pipeline", "launch"}

# What of megatron_joy.data says nothing about tensors.
SHARD_FORMAT = {f"data.{name}" for name in ("shards", "manifest", "order", "verify", "blend", "atomic", "checksum")}
TORCH_FREE_DATA = (*SHARD_FORMAT, "data.provenance", "data.zstd", "data.ledger", "data.caps")
TORCH_FREE_PLATFORM = ("platform.mpi", "platform.rank", "platform.rendezvous", "platform.stop_request")
FOUNDATION = {"errors", "recipe", "platform"}
TRAINING = FOUNDATION | {"model", "parallel", "precision", "optim", "data", "checkpoint"}

# Room -> the rooms (or single modules of one) that it may import. The command line may import all of them.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "runstate": {"errors"},
    "recipe": {"errors"},
    "platform": {"errors", "recipe"},
    "precision": FOUNDATION,
    "data": {"errors", "recipe"},
    "model": FOUNDATION | {"precision"},
    "optim": FOUNDATION | {"model", "parallel.kinds", "parallel.placement"},
    "checkpoint": FOUNDATION | {"model", "optim", "data.atomic", "data.checksum"},
    "parallel": {"errors", "recipe"},
    "report": {"errors", "recipe", "data"},
    "train": TRAINING | {"report", "runstate"},
    "prove": TRAINING | {"train"},
    "convert": FOUNDATION | {"model", "parallel", "precision", "optim", "checkpoint", "data"},
    "infer": FOUNDATION | {"model", "parallel", "precision", "checkpoint", "convert", "data"},
    "posttrain": TRAINING | {"train"},
    "data_pipeline": {"errors", "recipe", "platform.mpi", *TORCH_FREE_DATA},
    "launch": {"errors", "recipe", "parallel", "runstate", *TORCH_FREE_DATA, *TORCH_FREE_PLATFORM},
}


def room_of(module: str) -> str:
    """`megatron_joy.data.shards` -> `data`, `launch.doctor` -> `launch`."""
    parts = module.split(".")
    if parts[0] != "megatron_joy":
        return parts[0]
    return parts[1] if len(parts) > 1 else ""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    return sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of each module of ours that a file imports, at whatever depth."""
    base = module_of(path).split(".")
    package = base if path.name == "__init__.py" else base[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] in OURS:
                yield node.lineno, name


def allowed(room: str, name: str) -> bool:
    """Whether a file of `room` may import `name` (a module or something in it)."""
    target = room_of(name)
    if target in (room, "__version__", "") or room == "cli":
        return True
    inside = name.removeprefix("megatron_joy.")
    return any(inside == arrow or inside.startswith(f"{arrow}.") for arrow in ARROWS[room])


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    room = room_of(module_of(path))
    if room == "":
        return
    wrong = [f"line {line}: {room} imports {name}" for line, name in imported(path) if not allowed(room, name)]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_command_line() -> None:
    for path in sources():
        room = room_of(module_of(path))
        names = [name for _, name in imported(path) if room_of(name) == "cli"]
        assert room == "cli" or not names, f"{module_of(path)} imports {names}"


def test_the_arrows_have_no_cycle() -> None:
    graph = {room: {arrow.partition(".")[0] for arrow in arrows} for room, arrows in ARROWS.items()}
    graphlib.TopologicalSorter(graph).prepare()


def modules_under(*packages: str) -> list[str]:
    wanted = [path for path in sources() if any(f"{module_of(path)}.".startswith(f"{name}.") for name in packages)]
    return [module_of(path) for path in wanted if path.name != "__main__.py"]


@pytest.mark.parametrize(
    "names",
    [
        modules_under("data_pipeline"),
        modules_under("launch"),
        modules_under("megatron_joy.recipe", "megatron_joy.errors"),
        [f"megatron_joy.{name}" for name in (*TORCH_FREE_DATA, *TORCH_FREE_PLATFORM)],
        ["megatron_joy", "megatron_joy.data", "megatron_joy.cli", "megatron_joy.report"],
        ["megatron_joy.cli.main", "megatron_joy.cli.recipe_command", "megatron_joy.cli.doctor_command"],
    ],
    ids=["data_pipeline", "launch", "recipe", "data", "packages", "cli"],
)
def test_importing_a_torch_free_room_imports_no_torch(names: list[str]) -> None:
    assert names
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'megatron', 'transformers', 'transformer_engine'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *names], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
