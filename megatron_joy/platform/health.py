"""What a rank measures of its node before a run: software, GPU, a matrix product, the run's folder, clock, network.

Nothing here judges: `launch.preflight` compares the reports of all ranks.
"""

import datetime
import hashlib
import os
import platform as host
import socket
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_joy import __version__
from megatron_joy.errors import WorkError
from megatron_joy.platform import nvidia
from megatron_joy.platform.rank import RankInfo, rank_info
from megatron_joy.platform.rendezvous import rendezvous

PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy")
MATRIX = {"cpu": 512, "cuda": 8192}  # rows and columns of the product
SIZES = {"cpu": (1 << 16, 1 << 20, 1 << 23), "cuda": (1 << 20, 1 << 26, 1 << 29)}  # bytes a rank gives to a collective
REPEATS = 5
FILE_BYTES, PATTERN = 4 << 20, 1 << 10  # random bytes, repeated
CLOCK_ROUNDS = 5
POLL_SECONDS = 0.1

Report = dict[str, Any]


def node_name() -> str:
    """The node as its scheduler calls it, else the host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def code_version() -> str:
    """12 hexadecimal digits over the source of all of our packages: two nodes with the same run the same code."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for package in ("data_pipeline", "launch", "megatron_joy"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def software() -> dict[str, str | None]:
    """What must be the same on all ranks."""
    found: dict[str, str | None] = {"python": host.python_version(), "megatron-joy": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["code"] = code_version()
    found["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return found


def product(device: torch.device) -> Report:
    """Seconds and FLOP/s of a matrix product (the best of REPEATS), and whether it is right.

    The matrices hold few -1 and 1 among zeros, so that every result is a small whole number that any format holds.
    """
    size, generator = MATRIX[device.type], torch.Generator().manual_seed(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    one, other = (_sparse(size, generator) for _ in range(2))
    left, right = one.to(device, dtype), other.to(device, dtype)
    taken = []
    result = left
    for _ in range(REPEATS + 1):  # the first one warms up
        result, seconds = _timed(lambda: left @ right, device)
        taken.append(seconds)
    seconds = min(taken[1:])
    expected = one.double() @ (other.double() @ torch.ones(size, dtype=torch.float64))
    exact = torch.equal(result.double().sum(dim=1).cpu(), expected)
    return {"seconds": seconds, "flops": 2.0 * size**3 / seconds, "exact": exact}


def _sparse(size: int, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 20, (size, size), generator=generator, dtype=torch.int8)
    return (signs == 0).to(torch.int8) - (signs == 1).to(torch.int8)


def _timed(action: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - began


def gpu_report(info: RankInfo, device: torch.device) -> Report | None:
    """This rank's GPU and, from the first rank of a node, what its driver says; None on a CPU."""
    if device.type == "cpu":
        return None
    has = torch.cuda.get_device_properties(device)
    states = nvidia.gpu_states() if info.local_rank == 0 else []
    xids = nvidia.xid_messages() if info.local_rank == 0 else []
    return {
        "name": has.name,
        "uuid": str(has.uuid),
        "memory": has.total_memory,
        "visible": torch.cuda.device_count(),
        "problems": nvidia.problems(states, xids),
    }


def collectives(device: torch.device, world: int) -> Report:
    """Seconds (median) and bus bandwidth in bytes/s of all-reduce and all-to-all by size.

    Bus bandwidth is what each rank must send: 2(n-1)/n of an all-reduce's size, (n-1)/n of an all-to-all's (the
    definition of NVIDIA's nccl-tests, PERFORMANCE.md).
    """
    kinds: dict[str, tuple[float, Callable[[Tensor, Tensor], Any]]] = {
        "all_reduce": (2 * (world - 1) / world, lambda out, given: dist.all_reduce(out)),
        "all_to_all": ((world - 1) / world, dist.all_to_all_single),
    }
    found: Report = {}
    for kind, (share, run) in kinds.items():
        found[kind] = []
        for size in SIZES[device.type]:
            rows = max(1, size // 4 // world)
            out, given = (torch.ones(rows * world, device=device) for _ in range(2))

            def once(run: Any = run, out: Tensor = out, given: Tensor = given) -> Tensor:
                run(out, given)
                return out

            taken = [_timed(once, device)[1] for _ in range(REPEATS + 1)][1:]
            seconds = statistics.median(taken)
            moved = rows * world * 4
            found[kind].append({"bytes": moved, "seconds": seconds, "bus": share * moved / seconds})
    return found


def files(folder: Path, info: RankInfo) -> Report:
    """Writes and renames a file and, when all ranks have, reads that of the next rank which could write one.

    All ranks must call it. `error` says what this rank could not do; seconds are for FILE_BYTES, written to disk.
    """
    found: Report = {"error": None}
    own, data = folder / f".preflight_{info.rank}", os.urandom(PATTERN) * (FILE_BYTES // PATTERN)
    found |= _tried(lambda: _write(own, data), "write_seconds")
    wrote: list[Any] = [None] * info.world_size
    dist.all_gather_object(wrote, found["error"] is None)
    following = ((info.rank + step) % info.world_size for step in range(1, info.world_size + 1))
    other = next((rank for rank in following if wrote[rank]), None)
    if found["error"] is None and other is not None:
        found |= _tried(lambda: _read(folder / f".preflight_{other}"), "read_seconds")
    dist.barrier()
    if wrote[info.rank]:
        own.unlink(missing_ok=True)
    return found


def _tried(action: Callable[[], None], what: str) -> Report:
    began = time.perf_counter()
    try:
        action()
    except OSError as error:
        return {"error": f"{what.partition('_')[0]} {error.filename}: {error.strerror}"}
    return {what: time.perf_counter() - began}


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def _read(path: Path) -> None:
    # Network file systems may show another node's file a moment later.
    for _ in range(50):
        if path.exists():
            break
        time.sleep(POLL_SECONDS)
    found = path.read_bytes()
    if len(found) != FILE_BYTES or found[:PATTERN] * (FILE_BYTES // PATTERN) != found:
        raise OSError(5, "has other bytes than were written", str(path))


def clock() -> float:
    """Seconds by which this rank's clock is before the median of all: the least of some rounds after a barrier."""
    offsets = []
    for _ in range(CLOCK_ROUNDS):
        dist.barrier()
        now = torch.tensor([time.time()], dtype=torch.float64)
        times = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(times, now)
        offsets.append(now.item() - statistics.median_low([each.item() for each in times]))
    return min(offsets, key=abs)


def join(info: RankInfo, patience: float, device: torch.device) -> None:
    """Joins the world. Raises WorkError that names the ranks which didn't come within `patience` seconds."""
    limit = datetime.timedelta(seconds=patience)
    address, port = rendezvous(info)
    # torchrun's agent serves the store itself.
    serves = info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(address, port, info.world_size, serves, timeout=limit, wait_for_workers=False)  # type: ignore[attr-defined]
    except dist.DistError as error:
        raise WorkError(
            f"rank {info.rank} on {node_name()}: rank 0 at {address}:{port} can't be reached: {error}"
        ) from None
    store.set(f"preflight/{info.rank}", node_name())
    missing, deadline = list(range(info.world_size)), time.monotonic() + patience
    while True:
        missing = [rank for rank in missing if not store.check([f"preflight/{rank}"])]
        if not missing:
            break
        if time.monotonic() > deadline:
            names = ", ".join(map(str, missing))
            raise WorkError(f"{len(missing)} of {info.world_size} ranks did not come within {patience:.0f} s: {names}")
        time.sleep(POLL_SECONDS)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    prefix = dist.PrefixStore("world", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=prefix, rank=info.rank, world_size=info.world_size, timeout=limit)


def measure(folder: str, patience: float) -> list[Report]:
    """This rank's part; every rank gets the reports of all, in the order of ranks. Raises WorkError as `join`."""
    info = rank_info()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", info.local_rank if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(device)
    join(info, patience, device)
    own: Report = {
        "rank": info.rank,
        "node": node_name(),
        "local_ranks": info.local_world_size,
        "software": software(),
        "gpu": gpu_report(info, device),
        "product": product(device),
        "files": files(Path(folder), info),
        "clock": clock(),
    }
    if info.world_size > 1:
        own["collectives"] = collectives(device, info.world_size)
    reports: list[Any] = [None] * info.world_size
    dist.all_gather_object(reports, own)
    dist.barrier()
    dist.destroy_process_group()
    return reports
