"""`joy preflight`: two gloo ranks measure their nodes, and each planted fault is named with its node."""

import json
import os
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from launch.preflight import Limits, judge, summary
from megatron_joy.errors import WorkError
from megatron_joy.platform import nvidia
from megatron_joy.runstate import VERDICT_FILE
from tests.gloo import run_world
from tests.train.minuscule import EP2, joy, make_home

GB = 1e9


def name_nodes() -> None:
    """Each rank a node of its own."""
    os.environ["SLURMD_NODENAME"] = f"node{os.environ['RANK']}"


def plant_faults() -> None:
    """Rank 1 has another torch, a slow processor, a clock that is ahead, and a folder that is none."""
    name_nodes()
    if os.environ["RANK"] != "1":
        return
    from megatron_joy.platform import health

    software, timed, measure_files = health.software, health._timed, health.files

    def slow(action: Any, device: Any) -> Any:
        def later() -> Any:
            time.sleep(1.0)
            return action()

        return timed(later, device)

    health.REPEATS = 1
    health.software = lambda: software() | {"torch": "1.0.0"}  # type: ignore[assignment]
    health.files = lambda folder, info: measure_files(Path("/proc/none"), info)  # type: ignore[assignment]
    product = health.product

    def slow_product(device: Any) -> Any:
        health._timed = slow  # type: ignore[assignment]
        try:
            return product(device)
        finally:
            health._timed = timed  # type: ignore[assignment]
            health.REPEATS = 5

    health.product = slow_product  # type: ignore[assignment]
    now = time.time
    health.time.time = lambda: now() + 60  # type: ignore[assignment]


def plant_wrong_product() -> None:
    """Rank 0 computes wrongly."""
    name_nodes()
    from megatron_joy.platform import health

    timed = health._timed
    if os.environ["RANK"] == "0":
        health._timed = lambda action, device: (action := timed(action, device), (action[0] + 1, action[1]))[1]  # type: ignore[assignment]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and recipe."""
    return make_home(tmp_path_factory.mktemp("home"))


def preflight(home: Path, run: Path, before: Any, *options: str) -> tuple[list[int], str, dict[str, Any]]:
    """Exit codes, what rank 0 printed, and the verdict in the run's folder."""
    words = ["preflight", str(home / "minuscule.toml"), f"run.folder={run}", *EP2, *options]
    logs = run.parent / f"{run.name}.printed"
    codes = run_world(joy, 2, words, before, log_folder=logs)
    return codes, (logs / "rank_0.log").read_text(), json.loads((run / VERDICT_FILE).read_text())


def test_fit_nodes_are_fit_and_measured(home: Path, tmp_path: Path) -> None:
    codes, printed, verdict = preflight(home, tmp_path / "run", name_nodes, "--slow=1000")
    assert codes == [0, 0]
    assert verdict["ok"]
    assert verdict["nodes"] == {f"node{rank}": {"ok": True, "ranks": [rank], "reasons": []} for rank in (0, 1)}
    measured = verdict["measured"]
    assert measured["product_flops"]["least"] > 1e8
    for kind, share in (("all_reduce", 1.0), ("all_to_all", 0.5)):  # 2(n-1)/n and (n-1)/n of two ranks
        assert [row["bytes"] for row in measured["collectives"][kind]] == [1 << 16, 1 << 20, 1 << 23]
        for row in measured["collectives"][kind]:
            assert row["bus"] == pytest.approx(share * row["bytes"] / row["seconds"])
    assert 0 < measured["write_seconds"] < 60
    assert "node1" in printed and "fit" in printed
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["logs"]  # a run can begin here


def test_each_planted_fault_is_named_with_its_node(home: Path, tmp_path: Path) -> None:
    codes, printed, verdict = preflight(home, tmp_path / "run", plant_faults, "--json")
    assert codes == [1, 1]
    assert not verdict["ok"]
    assert verdict["nodes"]["node0"]["ok"], verdict["nodes"]["node0"]
    torch, product, files, clock = verdict["nodes"]["node1"]["reasons"]
    assert torch.startswith("rank 1: torch 1.0.0, 1 of 2 ranks have ")
    assert "its matrix product took" in product
    assert "run.folder: write /proc/none: No such file or directory" in files
    assert clock in ("rank 1: its clock is 60.0 s ahead", "rank 1: its clock is 59.9 s ahead")
    assert f"error: preflight: node node1: {torch}" in printed


def test_wrong_arithmetic_is_named(home: Path, tmp_path: Path) -> None:
    _, _, verdict = preflight(home, tmp_path / "run", plant_wrong_product, "--slow=1000")
    assert verdict["nodes"]["node1"]["ok"]
    assert verdict["nodes"]["node0"]["reasons"] == [
        "rank 0: a matrix product came out wrong: its processor can't be trusted"
    ]


def alone_in_a_world_of_two() -> str:
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    from megatron_joy.platform.health import measure

    with pytest.raises(WorkError) as failed:
        measure("unused", patience=1.0)
    return str(failed.value)


def test_a_rank_that_does_not_come_is_named() -> None:
    assert run_world(alone_in_a_world_of_two, 1) == ["1 of 2 ranks did not come within 1 s: 1"]


def report(rank: int, **changes: Any) -> dict[str, Any]:
    """A healthy rank of two GPUs a node."""
    gpu = {"name": "H100", "uuid": f"GPU-{rank}", "memory": 80 * GB, "visible": 2, "problems": []}
    rows = [{"bytes": 1 << 20, "seconds": 1e-4, "bus": 10 * GB}, {"bytes": 1 << 29, "seconds": 1e-3, "bus": 300 * GB}]
    healthy: dict[str, Any] = {
        "rank": rank,
        "node": f"n{rank // 2}",
        "local_ranks": 2,
        "software": {"torch": "2.15.0", "code": "abc"},
        "gpu": gpu,
        "product": {"seconds": 0.002, "flops": 5e14, "exact": True},
        "files": {"error": None, "write_seconds": 0.1, "read_seconds": 0.1},
        "clock": 0.0,
        "collectives": {"all_reduce": rows, "all_to_all": rows},
    }
    return deepcopy(healthy) | changes


def reasons(changes: dict[int, dict[str, Any]], limits: Limits | None = None) -> dict[str, list[str]]:
    """Node -> reasons, of four ranks of which some are changed."""
    verdict = judge([report(rank, **changes.get(rank, {})) for rank in range(4)], limits or Limits())
    found = {node: each["reasons"] for node, each in verdict["nodes"].items() if not each["ok"]}
    assert verdict["ok"] == (not found and not verdict["reasons"])
    return found | ({"all": verdict["reasons"]} if verdict["reasons"] else {})


def test_gpus_are_judged_against_each_other() -> None:
    gpu = report(3)["gpu"]
    assert reasons({}) == {}
    assert reasons({3: {"product": {"seconds": 0.0025, "flops": 4e14, "exact": True}}}) == {
        "n1": ["rank 3: its matrix product took 1.2 times the median (0.0025 s, 0.0020 s)"]
    }
    assert reasons({3: {"product": {"seconds": 0.0023, "flops": 4e14, "exact": True}}}) == {}
    assert reasons({3: {"gpu": gpu | {"name": "H200"}}}) == {"n1": ["a GPU with name H200, other ranks have H100"]}
    assert reasons({3: {"gpu": gpu | {"uuid": "GPU-2"}}}) == {"n1": ["2 ranks share 1 GPUs; each needs its own"]}
    assert reasons({3: {"gpu": None}}) == {"n1": ["a rank without a GPU, other ranks have one"]}
    assert reasons({0: {"gpu": report(0)["gpu"] | {"problems": ["Xid 79"]}}}) == {"n0": ["Xid 79"]}
    assert reasons({1: {"software": {"torch": "2.15.0", "code": "abd"}}}) == {
        "n0": ["rank 1: code abd, 3 of 4 ranks have abc"]
    }


def test_a_network_below_expectation_is_nobodys_in_particular() -> None:
    assert reasons({}, Limits(bandwidth=299 * GB)) == {}
    found = reasons({}, Limits(bandwidth=400 * GB))
    assert list(found) == ["all"]
    assert found["all"][0].startswith("all-reduce of 536,870,912 bytes: 300.00 GB/s on the bus, expected 400.00")


def test_the_summary_names_the_first_node_and_counts_the_others() -> None:
    reports = [report(rank, clock=2.0 if rank in (1, 3) else 0.0) for rank in range(4)]
    line = summary(judge(reports, Limits()))
    assert line == "preflight: node n0: rank 1: its clock is 2.0 s ahead (and 1 more: n1)"
    assert summary(judge(reports, Limits(clock=3))) == "preflight: all nodes are fit"


SMI = """\
0, GPU-aaaa, NVIDIA H100 80GB HBM3, 570.86.10, 81559, 0, No, No
1, GPU-bbbb, NVIDIA H100 80GB HBM3, 570.86.10, 81559, 4, Yes, No
2, GPU-cccc, NVIDIA GeForce RTX 4090, 570.86.10, 24564, [N/A], [N/A], [N/A]
"""
KERNEL = """\
[ 12.3] NVRM: loading NVIDIA UNIX Open Kernel Module
[ 99.1] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 99.2] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[100.0] NVRM: Xid (PCI:0000:5e:00): 13, pid=4711, name=python, Graphics SM Warp Exception
"""


def test_what_the_driver_says_becomes_reasons() -> None:
    states, xids = nvidia.parse_states(SMI), nvidia.parse_xids(KERNEL)
    assert [state["memory.total"] for state in states] == [81559, 81559, 24564]
    assert xids == [("PCI:0000:3b:00", 79), ("PCI:0000:5e:00", 13)]
    assert nvidia.problems(states, xids) == [
        "GPU 1 (GPU-bbbb): 4 uncorrected memory errors",
        "GPU 1 (GPU-bbbb): rows of its memory wait to be remapped; reset it",
        "Xid 79 of the GPU at PCI:0000:3b:00",
    ]


def test_a_driver_that_does_not_answer_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate'\nexit 9\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert nvidia.problems(nvidia.gpu_states(), []) == [
        "nvidia-smi: NVIDIA-SMI has failed because it could not communicate"
    ]
