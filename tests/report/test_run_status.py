"""`joy status` and `joy report`: what they print, and what they refuse."""

import json
from pathlib import Path

import pytest

from megatron_joy.cli.main import main
from megatron_joy.report.parameters import count_parameters
from megatron_joy.report.runlog import read_run
from megatron_joy.report.status import read_status
from tests.report.synthetic import START_TIME, Plan, write_run


def test_a_running_runs_status_has_its_newest_numbers_and_the_time_left(tmp_path: Path) -> None:
    truth = write_run(tmp_path, Plan(steps=230, planned=300, kills=((137, 100),), last_word="none"))
    last = truth.rows[230]
    status = read_status(tmp_path, now=last["time"] + 5)
    assert (status.state, status.step, status.steps_planned) == ("running", 230, 300)
    assert (status.loss, status.mtp_loss, status.tokens) == (last["loss"], last["mtp_loss"], last["tokens"])
    assert status.validation_loss == truth.rows[200]["validation_loss"]
    assert status.mtp_acceptance_length == truth.rows[200]["mtp_acceptance_length"]
    recent = sorted(truth.rows[step]["step_seconds"] for step in range(131, 231))
    assert status.step_seconds == pytest.approx((recent[49] + recent[50]) / 2)
    shares = {"data": 0.01, "forward": 0.3, "backward": 0.5, "communication": 0.1, "optimizer": 0.05}
    assert status.phases == pytest.approx(shares)
    assert status.peak_bytes == last["peak_bytes"]
    assert status.mfu == pytest.approx(1024 * 1.5e6 / 2e10 / status.step_seconds, rel=0.05)
    assert status.seconds_left == pytest.approx(70 * (recent[49] + recent[50]) / 2)
    assert status.checkpoint_step == 200
    assert status.silent_seconds == pytest.approx(5)


def test_a_killed_runs_status_promises_no_time(tmp_path: Path) -> None:
    write_run(tmp_path, Plan(steps=50, last_word="none"))
    status = read_status(tmp_path, now=START_TIME + 1e6)
    assert (status.state, status.seconds_left) == ("killed", None)


def test_a_resumed_run_stands_where_it_resumed(tmp_path: Path) -> None:
    write_run(tmp_path, Plan(steps=60, last_word="none"))
    event = {"time": START_TIME + 500, "step": 50, "attempt": 1, "kind": "resume", "message": "resumed"}
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    status = read_status(tmp_path, now=START_TIME + 510)
    assert (status.state, status.step, status.loss) == ("running", 50, None)


@pytest.mark.parametrize(("again", "stands_at"), [(0, 40), (7, 47), (30, 70)])
def test_a_run_that_went_back_stands_where_it_is_now(tmp_path: Path, again: int, stands_at: int) -> None:
    """Steps 1 to 60, back to 40, and so many of them again; the report's rows are those of the second time."""
    write_run(tmp_path, Plan(steps=60, last_word="none"))
    seconds = START_TIME + 500
    event = {"time": seconds, "step": 60, "attempt": 0, "kind": "rollback", "message": "back", "back_to": 40}
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for step in range(41, 41 + again):
            file.write(json.dumps({"step": step, "attempt": 0, "time": seconds + step, "loss": 9.0}) + "\n")
    assert read_status(tmp_path, now=seconds + 60).step == stands_at
    run = read_run(tmp_path, now=seconds + 60)
    assert run.attempts[-1].end_step == stands_at
    if again:
        assert run.metrics.step.tolist() == list(range(1, stands_at + 1))
        assert run.metrics["loss"][40:].tolist() == [9.0] * again


def test_status_is_printed_for_people_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = write_run(tmp_path / "run", Plan(steps=100, planned=100, name="a[b]", kills=((60, 50),)))
    assert main(["status", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for part in (
        "finished",
        "100 of 100",
        f"{truth.rows[100]['loss']:.4f}",
        "killed",
        "step 100 (1 kB)",
        "PP2 EP2",
        "backward 50%",
    ):
        assert part in text
    assert main(["status", str(tmp_path / "run"), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["loss"] == truth.rows[100]["loss"]
    assert [attempt["outcome"] for attempt in value["attempts"]] == ["killed", "finished"]


def test_watching_a_run_that_is_over_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, Plan(steps=20))
    assert main(["status", str(tmp_path), "--watch"]) == 0
    assert "finished" in capsys.readouterr().out


def test_report_prints_the_pages_path_or_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = write_run(tmp_path, Plan(steps=100))
    assert main(["report", str(tmp_path)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == tmp_path / "report.html"
    assert page.is_file()
    assert main(["report", str(tmp_path), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["report"] == str(page)
    assert value["train_loss"] == truth.rows[100]["loss"]
    assert value["best_validation_loss"] == min(
        r["validation_loss"] for r in truth.rows.values() if "validation_loss" in r
    )


@pytest.mark.parametrize("command", ["report", "status"])
def test_a_folder_that_is_no_run_gets_one_line_and_exit_code_two(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "metrics.jsonl and events.jsonl are missing" in error
    assert list(tmp_path.iterdir()) == []


def test_watching_and_json_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, Plan(steps=5))
    assert main(["status", str(tmp_path), "--json", "--watch"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_the_released_models_parameters_are_counted_as_published() -> None:
    """Numbers of the released weights: 48.9B in all, 3.3B for a token (arXiv 2604.03044, Table 1), by its shapes."""
    released = {
        "vocab_size": 129_280,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "first_k_dense_replace": 1,
        "num_attention_heads": 32,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 7168,
        "moe_intermediate_size": 768,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 1,
    }
    counts = count_parameters(released)
    assert counts is not None
    assert (counts.total, counts.active, counts.mtp) == (48_942_542_592, 3_304_320_768, 78_786_560)
    assert count_parameters({"hidden_size": 8}) is None
