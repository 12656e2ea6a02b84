"""Saving beside training: a step waits for a copy of the tensors in memory, a thread of each rank does the rest.

The threads don't communicate. What ranks must know of each other (are all files written, did one fail) they ask after
each step, in the main thread, where no other collective can be on its way; so a rank that is gone is missed there, as
by any other collective, and no marker file has to be looked for. Rank 0 commits when all files are written.

A thread and not a process: it ends with its rank, however that ends, so nothing goes on to write into a folder that the
next attempt clears away; and pinned memory can't be handed to a process that was forked off.
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_joy.checkpoint.image import Image
from megatron_joy.checkpoint.save import Save, commit, give_up, make_partial, most, tensors_of
from megatron_joy.checkpoint.storage import HashingFileSystem
from megatron_joy.checkpoint.together import RanksFailed, each, to_first, together
from megatron_joy.checkpoint.writing import Plan, Tensors, Written, agree, outline
from megatron_joy.errors import WorkError
from megatron_joy.platform.process import Process

NICENESS = 10  # of the thread, beside the threads that compute


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on all ranks. `failure`: why there is no checkpoint, None where there is one.

    waited: seconds for which the step stood still. seconds: from there to the commit. notes: what `afterwards` said.
    """

    save: Save
    failure: str | None
    waited: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass
class _Flight:
    """A save on its way. `work` is what this rank's thread does now; `written` is set from the commit on."""

    save: Save
    plan: Plan
    updates: int | None
    afterwards: Callable[[], Sequence[str]]
    work: Future[Any]
    began: float
    waited: float
    committing: bool = False


@dataclass(frozen=True)
class _Agreed:
    """What holds for later saves of the same tensors."""

    plan: Plan
    outline: dict[str, Any]
    image: Image


class BackgroundSaver:
    """At most one checkpoint on its way. All ranks call `begin`, `poll` and `settle` together, from the main thread."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._agreed: _Agreed | None = None
        self._flight: _Flight | None = None
        self._given_up = threading.Event()
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_stand_back)

    def begin(
        self, save: Save, chunks: Sequence[Any], optimizer: Any | None, afterwards: Callable[[], Sequence[str]]
    ) -> None:
        """Copies this rank's share and starts to write it; `settle` comes before a second `begin`.

        `afterwards` is called by rank 0's thread after the commit. Raises WorkError on all ranks, nothing left behind,
        if the folder can't be made or the copy has no room.
        """
        if self._flight is not None:
            raise RuntimeError("a checkpoint is on its way already")
        began, agreed = time.perf_counter(), self._agreed
        taken: list[Tensors] = []

        def prepare() -> tuple[int | None, bool]:
            make_partial(save)
            tensors, updates = tensors_of(save, chunks, optimizer)
            taken.append(tensors)
            fits = agreed is not None and outline(tensors) == agreed.outline
            if agreed is not None and fits:
                agreed.image.fill(tensors)
            return updates, fits

        try:
            answers = together(prepare)
            if agreed is None or not all(fits for _, fits in answers):
                agreed = self._agree(save, taken[0])
        except RanksFailed as failure:
            raise WorkError(give_up(save, failure)) from None
        updates = most([updates for updates, _ in answers])
        work = self._thread.submit(write_image, save.partial, agreed.image, self._given_up)
        self._flight = _Flight(save, agreed.plan, updates, afterwards, work, began, time.perf_counter() - began)

    def _agree(self, save: Save, tensors: Tensors) -> "_Agreed":
        """All ranks together: who writes what, and an image that has this save's elements."""
        self._agreed = None  # its image makes room for the new one
        first = self._process.is_first_rank
        plan = agree(save.partial, tensors, first)

        def lay_out() -> Image:
            image = Image(plan, tensors, first)
            image.fill(tensors)
            return image

        self._agreed = _Agreed(plan, outline(tensors), each(lay_out))
        return self._agreed

    def poll(self) -> Outcome | None:
        """Takes the save a step further if all ranks are ready for it; its outcome once there is one. Never waits."""
        if self._flight is None:
            return None
        ready = torch.tensor([int(self._flight.work.done())], device=self._process.device)
        dist.all_reduce(ready, op=dist.ReduceOp.MIN)
        return self._advance(self._flight) if ready.item() else None

    def settle(self) -> Outcome | None:
        """Waits until nothing is on its way; the outcome of what was."""
        outcome = None
        while self._flight is not None:
            outcome = self._advance(self._flight)
        return outcome

    def close(self) -> None:
        """Gives up what is on its way; no communication. What was written stays hidden until the next attempt."""
        self._given_up.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _advance(self, flight: _Flight) -> Outcome | None:
        """From all files written to the commit, or from the commit to the outcome; waits for the threads."""
        try:
            if not flight.committing:
                written = to_first(flight.work.result)
                flight.work, flight.committing = self._thread.submit(_commit, flight, written), True
                return None
            notes = tuple(together(flight.work.result)[0])
            failure = None
        except RanksFailed as failed:
            notes, failure = (), give_up(flight.save, failed)
        self._flight = None
        return Outcome(flight.save, failure, flight.waited, time.perf_counter() - flight.began, notes)


def write_image(folder: Path, image: Image, given_up: threading.Event) -> Written:
    """Writes, hashes and syncs this rank's file; no communication, in any thread.

    Raises OSError as the disk does, the room that the file took free again at once: the step beside writes its metrics
    to the same disk. Raises GivenUp soon after `given_up` is set.
    """
    files = HashingFileSystem(given_up)
    if image.name is not None:
        try:
            with files.create_stream(folder / image.name, "wb") as stream:
                for block in image.blocks:
                    stream.write(block.numpy())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            (folder / image.name).unlink(missing_ok=True)
            raise
    return Written(tuple(files.files.values()), image.places)


def _commit(flight: _Flight, written: Sequence[Written] | None) -> Sequence[str]:
    if written is None:  # not rank 0
        return ()
    try:
        commit(flight.save, flight.plan, written, flight.updates)
    except OSError:
        shutil.rmtree(flight.save.partial, ignore_errors=True)  # room, as in `write_image`: all files are written
        raise
    return flight.afterwards()


def _stand_back() -> None:
    """Lets the thread compute when nobody else does: where cores are few it would slow the step down."""
    if sys.platform == "linux":  # elsewhere threads have no priority of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
