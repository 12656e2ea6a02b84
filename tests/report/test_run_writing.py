"""Writing a run's log: what a kill, a full disk or a NaN leaves behind, and the TensorBoard mirror."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_joy.errors import WorkError
from megatron_joy.report import jsonl
from megatron_joy.report.metrics import read_metrics
from megatron_joy.report.runlog import read_events
from megatron_joy.report.writer import MetricsWriter


def lines(path: Path) -> list[dict[str, Any]]:
    """Strictly: every line is whole and is JSON as its standard says, without NaN."""
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.0 + 1 / step, "mtp_loss": None, "lr": 1e-3, "tokens_per_second": 100.0} | more


def test_rows_and_events_are_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    log = MetricsWriter(tmp_path, 3, tensorboard=False)
    log.event("resume", 10, "resumed", world_size=2, layout="EP2")
    log.metrics(row(11))
    (event,), (first,) = lines(tmp_path / "events.jsonl"), lines(tmp_path / "metrics.jsonl")
    assert (event["kind"], event["attempt"], event["world_size"], event["layout"]) == ("resume", 3, 2, "EP2")
    assert first["attempt"] == 3
    assert first["loss"] == 2.0 + 1 / 11
    assert first["time"] == pytest.approx(event["time"], abs=60)


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"\x00" * 100, b'{"step": 2}garbage', b"x" * 200_000])
def test_a_torn_last_line_is_removed_at_reopening_and_said_after_the_first_event(tmp_path: Path, torn: bytes) -> None:
    with MetricsWriter(tmp_path, 0, tensorboard=False) as log:
        log.metrics(row(1))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    with MetricsWriter(tmp_path, 1, tensorboard=False) as log:
        log.event("resume", 1, "resumed")
        log.metrics(row(2))
    assert [(r["step"], r["attempt"]) for r in lines(tmp_path / "metrics.jsonl")] == [(1, 0), (2, 1)]
    first, second = lines(tmp_path / "events.jsonl")
    assert (first["kind"], second["kind"]) == ("resume", "note")
    assert f"torn line of {len(torn)} bytes" in second["message"]


def test_a_whole_last_line_without_newline_is_kept_at_reopening(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1)))
    with MetricsWriter(tmp_path, 1, tensorboard=False) as log:
        log.metrics(row(2))
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_killed_writer_loses_at_most_the_row_it_was_writing(tmp_path: Path) -> None:
    program = (
        "import sys; from megatron_joy.report.writer import MetricsWriter\n"
        "log = MetricsWriter(sys.argv[1], 0, tensorboard=False)\n"
        "for step in range(1, 10**9):\n"
        "    log.metrics({'step': step, 'loss': 1.0, 'filler': 'x' * 2000}); print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(200):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        told = [200, *map(int, process.stdout.read().split(b"\n")[:-1])]
    MetricsWriter(tmp_path, 1, tensorboard=False).close()
    steps = [r["step"] for r in lines(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= told[-1]


def test_a_row_waits_for_a_disk_that_is_full_for_a_moment_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "PATIENCE_SECONDS", 0.4)
    log = MetricsWriter(tmp_path, 0, tensorboard=False)
    real, refusals = os.pwrite, [3]

    def full_at_first(descriptor: int, data: bytes, offset: int) -> int:
        if refusals[0] > 0:
            refusals[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(jsonl.os, "pwrite", full_at_first)
    log.metrics(row(1))
    refusals[0] = 5  # patience is whole again
    log.metrics(row(2))
    refusals[0] = 1000
    with pytest.raises(WorkError, match=r"metrics.jsonl: cannot append a row: No space left"):
        log.metrics(row(3))
    assert 900 < refusals[0] < 1000
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_full_disk_fails_in_one_line_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "PATIENCE_SECONDS", 0.1)
    log = MetricsWriter(tmp_path, 0, tensorboard=False)
    log.metrics(row(1))
    real = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if len(data) > 20:
            return real(descriptor, data[:20], offset)  # a short write, then no room for the rest
        raise OSError(errno.ENOSPC, "No space left on device")

    def nearly_full(descriptor: int, data: bytes, offset: int) -> int:
        monkeypatch.setattr(
            jsonl.os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
        )
        return full(descriptor, data, offset)

    monkeypatch.setattr(jsonl.os, "pwrite", nearly_full)
    with pytest.raises(WorkError, match=r"metrics.jsonl: cannot append a row: No space left"):
        log.metrics(row(2))
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1]
    monkeypatch.setattr(jsonl.os, "pwrite", real)
    log.metrics(row(2))
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_numbers_that_json_cannot_hold_are_null_and_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0, tensorboard=False) as log:
        log.metrics(row(1, loss=float("nan"), grad_norm=float("inf")))
    (only,) = lines(tmp_path / "metrics.jsonl")
    assert only["loss"] is None
    assert only["nonfinite"] == {"loss": "nan", "grad_norm": "inf"}
    assert read_metrics(tmp_path / "metrics.jsonl").nonfinite == {"loss": [1], "grad_norm": [1]}


def test_expert_load_keeps_six_decimals(tmp_path: Path) -> None:
    load = np.random.default_rng(0).dirichlet(np.ones(64), size=3)
    with MetricsWriter(tmp_path, 0, tensorboard=False) as log:
        log.metrics(row(1, expert_load=load))
        log.metrics(row(2, expert_load=load.tolist()))
    first, second = lines(tmp_path / "metrics.jsonl")
    assert first["expert_load"] == second["expert_load"]
    np.testing.assert_allclose(first["expert_load"], load, atol=5.1e-7)


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_each_step_once_after_a_kill_and_a_resume(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path, 0)
    first.event("start", 0, "started")
    for step in range(1, 9):
        first.metrics(row(step, time=1000.0 + step))
        if step == 6:
            first.event("checkpoint", 6, "saved")
    first.close()
    with MetricsWriter(tmp_path, 1) as second:
        second.event("resume", 6, "resumed")
        for step in range(7, 11):
            second.metrics(row(step, time=2000.0 + step, loss=9.0))
    losses = tensorboard_scalars(tmp_path / "events")["loss/train"]
    assert [step for step, _ in losses] == list(range(1, 11))
    assert [value for _, value in losses[6:]] == [9.0] * 4
    np.testing.assert_allclose([value for _, value in losses[:6]], [2 + 1 / s for s in range(1, 7)], rtol=1e-6)


def test_tensorboard_shows_each_step_once_where_a_guard_goes_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0) as log:
        for step, loss in [(1, 1.0), (2, 1.0), (3, 1.0), (4, 50.0), (3, 2.0), (4, 2.0), (5, 2.0)]:
            log.metrics(row(step, loss=loss))
    expected = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert tensorboard_scalars(tmp_path / "events")["loss/train"] == expected


def test_what_a_checkpoint_holds_is_in_tensorboard_although_the_writer_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from megatron_joy.report.writer import MetricsWriter\n"
        "log = MetricsWriter(sys.argv[1], 0)\n"
        "for step in range(1, 6): log.metrics({'step': step, 'loss': 1.0})\n"
        "log.event('checkpoint', 5, 'saved'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=180)
    assert [step for step, _ in tensorboard_scalars(tmp_path / "events")["loss/train"]] == [1, 2, 3, 4, 5]


def test_tensorboard_has_the_named_scalars_and_a_picture_of_the_load(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {"mtp_loss": 3.0, "grad_norm": 0.5, "validation_loss": float("nan"), "expert_load": [[0.5, 0.25, 0.25]]}
    with MetricsWriter(tmp_path, 0) as log:
        log.metrics(row(100, **values))
    scalars = tensorboard_scalars(tmp_path / "events")
    wanted = {"loss/train", "loss/mtp", "loss/validation", "lr", "grad_norm", "throughput"}
    assert wanted <= set(scalars)
    assert math.isnan(scalars["loss/validation"][0][1])
    assert scalars["expert_load/worst_max_over_mean"] == [(100, 1.5)]
    (image,) = EventAccumulator(str(tmp_path / "events")).Reload().Images("expert_load/layers_by_experts")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert (image.width, image.height) == (510, 170)


def test_a_mirror_that_cannot_write_is_turned_off_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_joy.report.tensorboard import TensorBoardMirror

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorBoardMirror, "step", fail)
    with MetricsWriter(tmp_path, 0) as log:
        log.event("start", 0, "started")
        log.metrics(row(1))
        log.metrics(row(2))
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    notes = [event.message for event in read_events(tmp_path / "events.jsonl", []) if event.kind == "note"]
    assert notes == ["TensorBoard's event file cannot be written (No space left on device): mirror off"]


def test_without_tensorboard_nothing_of_it_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from megatron_joy.report.writer import MetricsWriter\n"
        "MetricsWriter(sys.argv[1], 0, tensorboard=False).metrics({'step': 1, 'loss': 1.0})\n"
        "assert not {'tensorboard', 'torch'} & set(sys.modules)\n"
        "MetricsWriter(sys.argv[1], 0).metrics({'step': 2, 'loss': 1.0})\n"
        "assert 'tensorboard' in sys.modules and 'torch' not in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
