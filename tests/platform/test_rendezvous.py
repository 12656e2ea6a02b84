"""Ranks meet where their launcher's environment says, and a place that can't be known is an error, not a guess."""

import random
import socket
import subprocess
from typing import Any

import pytest

from megatron_joy.errors import UserError
from megatron_joy.platform import rendezvous as meeting
from megatron_joy.platform.rank import rank_info
from megatron_joy.platform.rendezvous import FIRST_PORT, PORTS, first_host, free_port, rendezvous
from tests.platform.test_rank import RECORDED


def meet(case: str, **changes: str) -> tuple[str, int]:
    environment = RECORDED[case][0] | changes
    return rendezvous(rank_info(environment), environment)


def test_what_is_given_wins() -> None:
    assert meet("slurm", MASTER_ADDR="10.0.0.7", MASTER_PORT="29501") == ("10.0.0.7", 29501)


def test_a_world_on_one_node_meets_on_loopback() -> None:
    assert meet("mpich", MASTER_PORT="4711") == ("127.0.0.1", 4711)


def test_open_mpis_ranks_agree_on_a_port_that_another_job_has_not() -> None:
    first, again, other = (meet("openmpi", PMIX_NAMESPACE=name) for name in ("prterun-a-1@1",) * 2 + ("prterun-a-2@1",))
    assert first == again != other
    assert 12_000 <= first[1] < 28_000


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n[1-2]", "n1"),
        ("gpu[007-009,012],login1", "gpu007"),
        ("alone", "alone"),
        ("a1,a2", "a1"),
        ("rack1-[3,5]-ib", "rack1-3-ib"),
        ("node.example.org", "node.example.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", "[1-2]", "--help", "a b"])
def test_a_node_list_that_names_no_host_is_refused(nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting.socket, "getaddrinfo", raising)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        meeting.look_up(first_host(nodes))


def raising(*arguments: Any, **more: Any) -> Any:
    raise OSError("Name or service not known")


def answering(known: dict[str, str]) -> Any:
    def getaddrinfo(name: str, *arguments: Any, **more: Any) -> list[Any]:
        if name not in known:
            raise OSError("Name or service not known")
        return [(10, 1, 6, "", ("fe80::1", 0)), (2, 1, 6, "", (known[name], 0))]

    return getaddrinfo


def test_slurms_ranks_meet_at_the_first_hosts_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting.socket, "getaddrinfo", answering({"n1": "10.1.0.1"}))
    address, port = meet("slurm")
    assert address == "10.1.0.1"
    assert 12_000 <= port < 28_000
    assert meet("mpiexec of MPICH in a Slurm job")[0] == "10.1.0.1"
    assert meet("slurm", SLURM_STEP_ID="1")[1] != port  # a restarted step doesn't meet the old one's sockets


def test_a_name_that_only_slurm_knows_is_asked_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    def scontrol(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        assert command == ["scontrol", "show", "node", "-o", "n1"]
        return subprocess.CompletedProcess(command, 0, "NodeName=n1 Gres=(null) NodeAddr=127.0.0.11 Port=27511\n", "")

    monkeypatch.setattr(meeting.socket, "getaddrinfo", answering({"127.0.0.11": "127.0.0.11"}))
    monkeypatch.setattr(meeting.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(meeting.subprocess, "run", scontrol)
    assert meet("slurm")[0] == "127.0.0.11"


def test_a_host_that_nobody_knows_is_an_error_and_never_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting.socket, "getaddrinfo", raising)
    monkeypatch.setattr(meeting.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"host n1: no address is known for it on .*; set MASTER_ADDR"):
        meet("slurm")


def test_mpi_over_nodes_without_an_address_and_without_a_port_is_refused() -> None:
    with pytest.raises(UserError, match="on several nodes and MASTER_ADDR is not set"):
        meet("openmpi", OMPI_COMM_WORLD_SIZE="4")
    with pytest.raises(UserError, match="MASTER_PORT is not set"):
        meet("mpich")
    with pytest.raises(UserError, match="MASTER_PORT = '70000' is no port"):
        meet("mpich", MASTER_PORT="70000")


def test_a_free_port_is_none_that_linux_gives_away_or_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(1)
    first = free_port()
    random.seed(1)
    assert free_port() != first  # two launchers that were seeded alike don't choose alike
    assert FIRST_PORT <= first < FIRST_PORT + PORTS < 32_768
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        monkeypatch.setattr(meeting, "FIRST_PORT", first)
        monkeypatch.setattr(meeting, "PORTS", 100)
        assert first not in {free_port() for _ in range(500)}
