"""Runs that are killed at random, again and again, and must end as if nothing had happened.

A case is a layout and an optimizer. Its run goes through three stages in ten steps (ramp, blend, MTP, length and
rotary base change), writes a checkpoint after every step beside training, and each of its attempts is ended at a random
moment of one of its first steps: SIGKILL to all ranks, SIGKILL to one, or SIGTERM to one. It is started again until it
is done. Then its rows of metrics and the tensors of its last checkpoint are held against those of the case's
undisturbed run.
"""

import hashlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from megatron_joy.checkpoint.find import latest
from tests.gloo import WorldFailed
from tests.train.minuscule import Outcome, last_rows, numbers, read_lines, train

KINDS = ("SIGKILL all", "SIGKILL one", "SIGTERM one")
ASYNCHRONOUS = ("checkpoint.asynchronous=true", "checkpoint.interval=1", "checkpoint.keep_last=3")
LAST_STEP_OF_AN_ATTEMPT = 4
HELD_UP = 50  # of a file's thousands of writes each so many-th is held up, by at most so many seconds:
LONGEST_HOLD = 0.05
PATIENCE = 900.0  # seconds for an attempt on a machine that is busy with other work


@dataclass(frozen=True)
class Blow:
    """What ends an attempt: a signal after a part of its nth step, while writes of files are held up by `delay`."""

    kind: str
    nth: int
    share: float
    rank: int
    delay: float


@dataclass
class Case:
    """What one layout with one optimizer came through."""

    name: str
    hits: list[dict[str, Any]] = field(default_factory=list)  # where each blow fell, as the rank saw it
    runs: int = 0
    attempts: int = 0
    compared: int = 0
    differences: list[str] = field(default_factory=list)


def blows(generator: random.Random, world_size: int) -> Iterator[Blow]:
    """Endless random ones."""
    while True:
        yield Blow(
            generator.choice(KINDS),
            generator.randint(1, LAST_STEP_OF_AN_ATTEMPT),
            generator.random(),
            generator.randrange(world_size),
            generator.choice((0.0, generator.uniform(0, LONGEST_HOLD))),
        )


def strike(blow: Blow, notes: str) -> None:
    """Arranges for a blow in this rank, which notes in a file what was under way when it fell."""
    from megatron_joy.checkpoint import storage
    from megatron_joy.checkpoint.background import BackgroundSaver
    from megatron_joy.train.step import Trainer

    savers: list[BackgroundSaver] = []
    make, compute, write = BackgroundSaver.__init__, Trainer.step, storage._HashedStream.write
    began: list[float] = []
    writes = count()

    def made(saver: BackgroundSaver, process: Any) -> None:
        make(saver, process)
        savers.append(saver)

    def slowly(stream: Any, data: Any) -> int:
        if next(writes) % HELD_UP == 0:
            time.sleep(blow.delay)
        return write(stream, data)

    def fall(trainer: Trainer, number: int) -> None:
        plan = trainer.timetable.at(number)
        note = {
            "kind": blow.kind,
            "step": number,
            "in_flight": any(saver._flight is not None for saver in savers),
            "in_ramp": plan.global_batch_size < plan.stage.ramp.last,
            "at_stage_change": number in (plan.stage.first_step + 1, plan.stage.last_step),
        }
        if rank == blow.rank:
            with open(notes, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(note) + "\n")
        if blow.kind == "SIGKILL all" or rank == blow.rank:
            os.kill(os.getpid(), signal.SIGTERM if blow.kind == "SIGTERM one" else signal.SIGKILL)

    def step(trainer: Trainer, number: int, batches: Any) -> Any:
        began.append(time.perf_counter())
        if len(began) == blow.nth:
            usual = began[-1] - began[-2] if blow.nth > 1 else 0.05
            threading.Timer(blow.share * usual, fall, (trainer, number)).start()
        return compute(trainer, number, batches)

    rank = int(os.environ["RANK"])
    BackgroundSaver.__init__ = made  # type: ignore[method-assign]
    storage._HashedStream.write = slowly  # type: ignore[method-assign]
    Trainer.step = step  # type: ignore[method-assign]


def tensors_of(run: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a run's last checkpoint, by key."""
    from megatron_joy.checkpoint.storage import Reader

    found = latest(run / "checkpoints", full=True).checkpoint
    assert found is not None
    reader = Reader(found)
    return {key: hashlib.sha256(reader.tensor(key).numpy().tobytes()).hexdigest() for key in reader.tensors}


def differences(ended: Outcome, reference: Outcome) -> list[str]:
    """What of a run isn't as in the undisturbed one, to the bit."""
    found = []
    expected = {row[0]: row for row in numbers(reference.rows)}
    found += [f"step {row[0]}: {row} for {expected[row[0]]}" for row in numbers(ended.rows) if row != expected[row[0]]]
    if [row["step"] for row in last_rows(ended.rows)] != [row["step"] for row in reference.rows]:
        found.append("steps are missing")
    mine, theirs = tensors_of(ended.run), tensors_of(reference.run)
    found += [f"tensor {key}" for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
    if ended.checkpoints != reference.checkpoints:
        found.append(f"checkpoints {ended.checkpoints}")
    return found


def endure(
    home: Path, folder: Path, layout: tuple[str, ...], case: Case, kills: int, generator: random.Random
) -> Iterator[int]:
    """Runs of a case until `kills` blows have fallen; yields how many have after each attempt."""
    from tests.train.minuscule import PROCESSES

    reference = train(home, folder / "undisturbed", layout, *ASYNCHRONOUS, patience=PATIENCE)
    assert set(reference.codes) == {0}
    aimed = blows(generator, PROCESSES[layout])
    while len(case.hits) < kills:
        case.runs += 1
        run, notes = folder / f"run_{case.runs}", folder / f"notes_{case.runs}.jsonl"
        done: Outcome | None = None
        known = len(case.hits)
        while done is None:
            case.attempts += 1
            enough = len(case.hits) >= kills
            try:
                before, inputs = (None, ()) if enough else (strike, (next(aimed), str(notes)))
                ended = train(home, run, layout, *ASYNCHRONOUS, before=before, inputs=inputs, patience=PATIENCE)
                assert set(ended.codes) in ({0}, {75}), ended.printed
                done = ended if set(ended.codes) == {0} else None
            except WorldFailed as failed:
                if failed.exit_code != -signal.SIGKILL:
                    raise
            case.hits[known:] = read_lines(notes)
            yield len(case.hits)
        case.differences += [f"run {case.runs}: {told}" for told in differences(done, reference)]
        case.compared += 1
