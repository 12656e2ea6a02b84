"""The verdict, how it is told, and that a layout that is wrong in one place doesn't pass."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.cli import prove_command
from megatron_joy.cli.main import main
from megatron_joy.errors import UserError, WorkError
from megatron_joy.prove import proof as proving
from megatron_joy.prove.numbers import ParameterDifference, Routing, Step, Validation
from megatron_joy.prove.proof import TIE, TOLERANCES, Proof, hold_against, prove
from megatron_joy.prove.shrink import Shrunk, shrink
from megatron_joy.recipe import load_recipe
from tests.prove.conftest import AloneOf

TINY = load_recipe("joyai_tiny")


def made(**other: Any) -> Proof:
    """A proof that holds with nothing to spare, but for `other` in the layout's last step or in the proof itself."""
    reference = [Step(n, 4.0, 5.0, 0.5, [[3, 5], [4, 4]]) for n in (3, 4)]
    numbers = {"loss": 4.0 * (1 + 0.9e-5), "mtp_loss": 5.0 * (1 - 0.9e-5), "grad_norm": 0.5 * (1 + 0.9e-4)}
    step = {key: value for key, value in other.items() if key in Step.__dataclass_fields__}
    last = dataclasses.replace(reference[1], **numbers | step)
    whole: dict[str, Any] = {
        "shrunk": shrink(TINY, 2, 4),
        "reference": reference,
        "layout": [reference[0], last],
        "validation": (Validation(4.0, 5.0), Validation(4.0 * (1 + 0.9e-5), 5.0)),
        "worst": ParameterDifference("decoder.x", 1e-6, 0.9e-5),
        "routing": Routing(100, 1, 0.9 * TIE),
        "seconds": (1.0, 2.0),
        "format_cost": None,
    }
    return Proof(**whole | {key: value for key, value in other.items() if key in whole})


def test_differences_within_every_tolerance_hold() -> None:
    proof = made()
    assert proof.holds
    assert set(proof.differences) == set(TOLERANCES)
    assert TOLERANCES == {"loss": 1e-5, "mtp_loss": 1e-5, "grad_norm": 1e-4, "validation": 1e-5, "parameters": 1e-5}


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": 4.0 * (1 + 1.1e-5)},
        {"mtp_loss": 5.0 * (1 - 1.1e-5)},
        {"grad_norm": 0.5 * (1 + 1.1e-4)},
        {"validation": (Validation(4.0, 5.0), Validation(4.0, 5.0 * (1 + 1.1e-5)))},
        {"worst": ParameterDifference("decoder.x", 1.0, 1.1e-5)},
        {"routing": Routing(100, 1, 1.1 * TIE)},
        {"expert_tokens": [[4, 4], [4, 4]]},
        {"loss": float("nan")},
        {"grad_norm": float("inf")},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_one_difference_too_large_does_not_hold(wrong: dict[str, Any]) -> None:
    assert not made(**wrong).holds


def test_a_model_without_mtp_has_no_mtp_loss_to_compare() -> None:
    steps = [Step(1, 4.0, None, 0.5, [[1]])]
    proof = made(reference=steps, layout=steps, validation=(Validation(4.0, None), Validation(4.0, None)))
    assert "mtp_loss" not in proof.differences and proof.holds


@pytest.mark.parametrize(("loss", "code"), [(4.0, 0), (4.1, 1)])
def test_the_command_tells_the_verdict_by_its_exit_code(
    loss: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prove_command, "prove", lambda *args, **kwargs: made(loss=loss))
    assert main(["prove", "joyai_tiny"]) == code
    out = capsys.readouterr().out
    assert ("does not follow" in out) == bool(code)
    assert "joyai_tiny: EP 2 x DP 2, 2 processes" in out
    assert main(["prove", "joyai_tiny", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["holds"] is (code == 0)
    assert [step["step"] for step in told["layout_steps"]] == [3, 4]
    assert told["tolerances"] == TOLERANCES


def test_reduced_degrees_are_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = shrink(load_recipe("joyai_48b_a3b"), 4, 4)
    monkeypatch.setattr(prove_command, "prove", lambda *args, **kwargs: made(shrunk=small))
    assert main(["prove", "joyai_48b_a3b"]) == 0
    out = capsys.readouterr().out
    assert "reduced (fewer processes): layout.expert_model_parallel_size 8 -> 2" in out
    assert "model.hidden_size 2048 -> 32" in out


def test_a_world_that_memory_has_no_room_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"100000 processes don't fit .* give --world \d+"):
        prove(TINY, processes=100_000)
    assert main(["prove", "joyai_tiny", "--world", "0"]) == 2
    assert main(["prove", "joyai_tiny", "model.hidden=3"]) == 2
    assert capsys.readouterr().out == ""


def small(*overrides: str) -> Shrunk:
    return shrink(load_recipe("joyai_tiny", overrides), 2, proving.STEPS_BEFORE + 2)


def sabotaged(how: str, monkeypatch: pytest.MonkeyPatch, alone_of: AloneOf, *overrides: str) -> Proof:
    monkeypatch.setattr(proving, "FOLLOW", f"tests.prove.sabotage:{how}")
    layout = small(*overrides)
    return hold_against(alone_of(layout), layout)


def test_expert_gradients_reduced_over_the_wrong_ranks_are_noticed(
    monkeypatch: pytest.MonkeyPatch, alone_of: AloneOf
) -> None:
    proof = sabotaged("experts_reduced_like_dense_weights", monkeypatch, alone_of)
    assert not proof.holds
    assert proof.differences["grad_norm"] > 1e-3
    assert "experts" in proof.worst.key


def test_router_biases_that_resharding_lost_are_noticed(monkeypatch: pytest.MonkeyPatch, alone_of: AloneOf) -> None:
    proof = sabotaged("biases_forgotten", monkeypatch, alone_of)
    assert not proof.holds
    assert proof.worst.key.endswith("expert_bias")


@pytest.mark.slow
def test_norm_gradients_of_a_part_of_the_tokens_are_noticed(monkeypatch: pytest.MonkeyPatch, alone_of: AloneOf) -> None:
    one_replica = ["layout.expert_model_parallel_size=1", "layout.data_parallel_size=1"]
    proof = sabotaged("norms_not_reduced", monkeypatch, alone_of, "layout.tensor_model_parallel_size=2", *one_replica)
    assert not proof.holds
    assert "norm" in proof.worst.key


def test_a_failing_rank_ends_the_proof_with_its_reason(monkeypatch: pytest.MonkeyPatch, alone_of: AloneOf) -> None:
    with pytest.raises(WorkError, match=r"^joy prove, layout of 2: rank 1: MemoryError: no room for experts$"):
        sabotaged("second_rank_fails", monkeypatch, alone_of)
    assert (alone_of(small()).place / "logs" / "layout" / "rank_1.log").exists()


def test_the_command_itself_needs_no_torch() -> None:
    program = "import sys, megatron_joy.cli.prove_command; assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=Path(__file__).parents[2])
