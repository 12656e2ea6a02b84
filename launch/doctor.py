"""The room behind `joy doctor`: what this machine has, what is missing, whether that matters here, how to get it.

Nothing heavy is imported in this process: see `probes.py`. A finding never raises; what can't be found out is said.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from .probes import APEX, GIGATOKEN, TORCH, TRANSFORMER_ENGINE, first_line, run_probe

State = Literal["ok", "missing", "wrong"]
PACKAGE = "megatron-joy"
GIB = 2**30
LEAST_MEMORY_GIB = 4
LEAST_DISK_GIB = 10
INSTALL_GPU = "pip install --no-build-isolation -e '.[gpu]' (after torch, with the CUDA toolkit)"


@dataclass(frozen=True)
class Finding:
    """One row: what was looked for, what was found, whether its state matters on this machine, how to mend it."""

    group: str
    name: str
    state: State
    found: str
    matters: bool = False
    advice: str = ""


@dataclass(frozen=True)
class Machine:
    """What other findings depend on: whether there is a GPU to use, and what torch said about itself."""

    torch: dict[str, Any]
    nvidia_driver: str | None

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU, be torch able to use it or not."""
        return bool(self.torch.get("devices")) or self.nvidia_driver is not None


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def look_at_machine() -> Machine:
    """Ask torch and the driver."""
    driver = first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return Machine(run_probe(TORCH), driver)


def machine_findings(machine: Machine) -> Iterator[Finding]:
    """Python, cores, memory, disk, compiler."""
    del machine
    python = platform.python_version()
    fits = (3, 12) <= sys.version_info[:2] < (3, 14)
    yield Finding("machine", "Python", "ok" if fits else "wrong", python, not fits, "" if fits else "make setup")
    yield Finding("machine", "system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", "cores", "ok", f"{cores} usable")
    memory = psutil.virtual_memory()
    short = memory.available < LEAST_MEMORY_GIB * GIB
    yield Finding(
        "machine",
        "memory",
        "wrong" if short else "ok",
        f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
        short,
        f"the demo wants {LEAST_MEMORY_GIB} GiB" if short else "",
    )
    disk = shutil.disk_usage(Path.cwd())
    full = disk.free < LEAST_DISK_GIB * GIB
    yield Finding(
        "machine",
        "disk here",
        "wrong" if full else "ok",
        f"{disk.free / GIB:.1f} of {disk.total / GIB:.1f} GiB free",
        full,
        f"set-up and demo want {LEAST_DISK_GIB} GiB" if full else "",
    )
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    advice = "" if compiler else "apt install build-essential"
    yield Finding("machine", "C compiler", "ok" if compiler else "missing", compiler or "none", not compiler, advice)


def gpu_findings(machine: Machine) -> Iterator[Finding]:
    """The GPUs as torch sees them, and whether driver and torch agree."""
    devices = machine.torch.get("devices", [])
    if devices:
        kinds = sorted({f"{card['name']}, {card['memory_gib']} GiB, sm {card['capability']}" for card in devices})
        yield Finding("GPU", "GPU", "ok", f"{len(devices)} x {'; '.join(kinds)}")
    elif machine.nvidia_driver:
        built = machine.torch.get("built_for_cuda")
        yield Finding(
            "GPU",
            "GPU",
            "wrong",
            f"driver {machine.nvidia_driver}, but torch (built for CUDA {built}) cannot use it",
            True,
            "install a torch that is built for this driver's CUDA, or a newer driver",
        )
    else:
        yield Finding("GPU", "GPU", "missing", "none: everything runs on the CPU, in small")
    for backend in ("gloo", "nccl"):
        there = bool(machine.torch.get(backend))
        needed = not there and (backend == "gloo" or machine.has_gpu)
        advice = "install torch from the package index" if needed else ""
        yield Finding("GPU", backend, "ok" if there else "missing", "in torch" if there else "none", needed, advice)


def transformer_engine_finding(machine: Machine) -> Iterator[Finding]:
    """Transformer Engine: whole, absent, or half-installed, which breaks Megatron-core's import."""
    parts = ("transformer-engine", "transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13")
    installed = {part: version for part in parts if (version := version_of(part))}
    name = "Transformer Engine"
    if not installed and importlib.util.find_spec("transformer_engine") is None:
        matters = machine.has_gpu
        why = "none: no FP8 and no fast blocks, backend = portable" if matters else "none, of no use without a GPU"
        yield Finding("GPU", name, "missing", why, matters, INSTALL_GPU if matters else "")
        return
    probe = run_probe(TRANSFORMER_ENGINE)
    listed = ", ".join(f"{part} {version}" for part, version in installed.items()) or "outside the package index"
    if "error" not in probe:
        yield Finding("GPU", name, "ok", probe["version"])
        return
    remove = f"pip uninstall {' '.join(installed) or 'transformer-engine'}"
    yield Finding(
        "GPU",
        name,
        "wrong",
        f"half-installed ({listed}): {probe['error']}",
        True,
        f"Megatron-core fails on it: {f'{INSTALL_GPU}, or ' if machine.has_gpu else ''}{remove}",
    )


def apex_finding(machine: Machine) -> Iterator[Finding]:
    """NVIDIA's apex (optional) or the unrelated project of that name on the package index."""
    if importlib.util.find_spec("apex") is None:
        advice = "optional, from source: https://github.com/NVIDIA/apex" if machine.has_gpu else ""
        yield Finding("GPU", "apex", "missing", "none, Transformer Engine or torch stand in", False, advice)
        return
    probe = run_probe(APEX)
    parts = probe.get("parts", [])
    if "amp_C" in parts:
        yield Finding("GPU", "apex", "ok", f"NVIDIA's, with {', '.join(parts)}")
        return
    version = version_of("apex")
    whose = "NVIDIA's, built without its extensions" if "apex.optimizers" in parts else "an unrelated project"
    yield Finding(
        "GPU",
        "apex",
        "wrong",
        f"{whose} (apex {version or 'without a version'}, no amp_C)",
        True,
        "pip uninstall apex; Megatron-core takes it for NVIDIA's",
    )


def declared() -> dict[str, list[Requirement]]:
    """What setup.cfg declares, by extra ("" for the base); empty where the package is not installed."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    groups: dict[str, list[Requirement]] = {}
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        marker = str(requirement.marker or "")
        extra = marker.partition("extra ==")[2].strip().strip("\"'")
        groups.setdefault(extra, []).append(requirement)
    return groups


def package_findings(machine: Machine) -> Iterator[Finding]:
    """Every declared dependency against what is installed; of the extras, what has no row of its own."""
    requirements = declared()
    if not requirements:
        yield Finding("packages", PACKAGE, "missing", "not installed here", True, "make setup")
    for requirement in requirements.get("", []):
        yield package_finding(requirement, "packages", needed=True)
    probe = run_probe(GIGATOKEN)
    if version_of("gigatoken") and "error" in probe:
        yield Finding("packages", "gigatoken", "wrong", f"does not import: {probe['error']}", True, "make setup")
    if "error" in machine.torch:
        yield Finding("packages", "torch", "wrong", f"does not import: {machine.torch['error']}", True, "make setup")
    for extra in ("ray", "dev"):
        for requirement in requirements.get(extra, []):
            yield package_finding(requirement, f"extra {extra}", needed=False)
    for name, use in (("flash-attn", "attention on GPUs without Transformer Engine"), ("deep-ep", "EP across nodes")):
        version = version_of(name)
        yield Finding("optional", name, "ok" if version else "missing", version or f"none ({use})")


def package_finding(requirement: Requirement, group: str, *, needed: bool) -> Finding:
    """One declared dependency."""
    name = canonicalize_name(requirement.name)
    version = version_of(name)
    if version is None:
        advice = "make setup" if needed else f"pip install -e '.[{group.removeprefix('extra ')}]'"
        return Finding(group, name, "missing", "none", needed, advice)
    if not requirement.specifier.contains(version, prereleases=True):
        found = f"{version}, tested with {requirement.specifier}"
        return Finding(group, name, "wrong", found, True, f"pip install '{name}{requirement.specifier}'")
    return Finding(group, name, "ok", version)


def cluster_findings(machine: Machine) -> Iterator[Finding]:
    """Slurm and MPI: needed only where they start the ranks."""
    del machine
    slurm = first_line(["sbatch", "--version"])
    advice = "only on a cluster, for `joy launch slurm` and `joy data run --executor slurm`"
    yield Finding(
        "cluster", "Slurm", "ok" if slurm else "missing", slurm or "no sbatch", False, "" if slurm else advice
    )
    binding = version_of("mpi4py")
    command = shutil.which("mpiexec") or shutil.which("mpirun")
    whole = binding is not None and command is not None
    found = f"mpi4py {binding or 'none'}, {command or 'no mpiexec in PATH'}"
    advice = "" if whole else "only for launching by MPI: pip install -e '.[mpi]', with its bin folder in PATH"
    yield Finding("cluster", "MPI", "ok" if whole else "missing", found, False, advice)


CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    machine_findings,
    gpu_findings,
    transformer_engine_finding,
    apex_finding,
    package_findings,
    cluster_findings,
)


def examine() -> list[Finding]:
    """All findings, in the order of CHECKS."""
    machine = look_at_machine()
    return [finding for check in CHECKS for finding in check(machine)]


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """The findings and a verdict as plain values."""
    problems = [finding for finding in findings if finding.matters]
    return {"healthy": not problems, "findings": [asdict(finding) for finding in findings]}
