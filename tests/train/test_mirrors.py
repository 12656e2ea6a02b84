"""What a run writes when asked: a profile of a window of steps, and its scalars for Weights & Biases."""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.minuscule import EP2, ONE, joy, numbers, train

WANDB = ("run.wandb_project=joy", "run.wandb_mode=offline")
SHORT = ("train.steps=4", "schedule.decay_steps=0", "checkpoint.interval=0")


def test_a_profile_has_the_windows_updates_on_the_named_rank(home: Path, tmp_path: Path) -> None:
    ended = train(home, tmp_path / "run", EP2, *SHORT, "run.profile_steps=[2, 2]", "run.profile_ranks=[1]")
    assert ended.codes == [0, 0]
    (trace,) = (ended.run / "profile").iterdir()
    assert trace.name == "rank_1_steps_2_2.json.gz"
    names = [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    # torch itself marks every update of an optimizer; dense weights and experts have one each.
    assert sum(name.startswith("Optimizer.step") for name in names) == 2
    assert "aten::mm" in names and any("allreduce" in name for name in names)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("run.profile_steps=[3, 2]",), "set run.profile_steps = [2, 3]"),
        (("run.profile_steps=[3, 9]",), "inside train.steps = 8; set run.profile_steps = [3, 8]"),
        (("run.profile_steps=[1, 1]", "run.profile_ranks=[1]"), "must be ranks of the layout's 1, 0 to 0"),
        (("run.profile_ranks=[0]",), "has no effect with run.profile_steps"),
        (("run.wandb_mode=offline",), "has no effect with run.wandb_project"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    home: Path, overrides: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert joy(["recipe", "show", str(home / "minuscule.toml"), *overrides]) == 2
    assert said in capsys.readouterr().err


def _without_wandb() -> None:
    sys.modules["wandb"] = None  # type: ignore[assignment]


def _broken_wandb() -> None:
    import wandb

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no service")

    wandb.sdk.wandb_run.Run.log = fail


def log_entries(data: bytes) -> Iterator[bytes]:
    """What a .wandb file holds: 7 bytes of header, then LevelDB's log format (blocks of 32 kB, records in pieces)."""
    place, entry = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        entry += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield entry
            entry = b""


def records(run: Path) -> list[dict[str, float]]:
    """Scalars of each step in the files that Weights & Biases left."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for entry in log_entries(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(entry)
            if record.WhichOneof("record_type") == "history":
                items = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
                found.append({key: json.loads(value) for key, value in items})
    return found


def test_scalars_are_in_the_offline_files_of_weights_and_biases(home: Path, tmp_path: Path) -> None:
    ended = train(home, tmp_path / "run", ONE, *SHORT, *WANDB)
    assert ended.codes == [0]
    sent = records(ended.run)
    assert [row["step"] for row in sent] == [1, 2, 3, 4]
    for row, mine in zip(sent, ended.rows, strict=True):
        assert (row["loss/train"], row["loss/mtp"], row["lr"]) == (mine["loss"], mine["mtp_loss"], mine["lr"])
    (first,) = {path.name.rpartition("-")[2] for path in ended.run.glob("wandb/offline-run-*")}
    assert first == (ended.run / "wandb_id").read_text()


def test_a_service_that_fails_ends_no_run(home: Path, tmp_path: Path) -> None:
    ended = train(home, tmp_path / "run", ONE, *SHORT, *WANDB, before=_broken_wandb)
    assert ended.codes == [0]
    assert ended.told("note") == [
        "Weights & Biases failed (ConnectionError): the run goes on without it, logs/rank_0.log has more"
    ]
    assert len(numbers(ended.rows)) == 4


def test_a_missing_package_is_said_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    ended = train(home, tmp_path / "run", ONE, *SHORT, *WANDB, before=_without_wandb)
    assert ended.codes == [2]
    assert "run.wandb_project: needs the package wandb, which is not installed" in ended.printed[0]
    assert not ended.run.exists()
