"""Where the time of a step goes: a stopwatch of several hands, of which one runs at a time.

Megatron-core tells its own parts through `config.timers`, which `Timers` maps to phases. On a GPU the host only queues
work, so marks are CUDA events in the stream, read when the device has passed them: nothing waits for a clock.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DATA, FORWARD, BACKWARD, COMMUNICATION = "data", "forward", "backward", "communication"
OPTIMIZER, VALIDATION, CHECKPOINT = "optimizer", "validation", "checkpoint"
PHASES = (DATA, FORWARD, BACKWARD, COMMUNICATION, OPTIMIZER, VALIDATION, CHECKPOINT)
WHOLE = frozenset({VALIDATION, CHECKPOINT})  # what happens inside belongs to them, forward passes too

OF_TIMER = {"forward-compute": FORWARD, "backward-compute": BACKWARD}
COMMUNICATES = ("recv", "send", "grads-sync", "all-reduce", "all-gather")  # in the names of Megatron-core's timers


class Phases:
    """Seconds by phase of this process. A phase that begins inside another stops the other's hand until it ends.

    Communication is what Megatron-core does between layers and steps (pipeline sends, reduction of gradients, gathering
    of updated weights) and our counts; collectives inside a layer (TP, CP, EP) are part of its forward and backward.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_gpu = device is not None and device.type == "cuda"
        self._inside: list[str | None] = []
        self._passed: deque[tuple[str | None, Any]] = deque()  # a hand and the mark at which it stopped
        self._last = self._mark()
        self._seconds: dict[str, float] = {}

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _turn(self) -> None:
        """The hand that ran until now stops."""
        hand, mark = self._inside[-1] if self._inside else None, self._mark()
        if self._on_gpu:
            self._passed.append((hand, mark))
            return
        self._count(hand, mark - self._last)
        self._last = mark

    def _count(self, hand: str | None, seconds: float) -> None:
        if hand is not None:
            self._seconds[hand] = self._seconds.get(hand, 0.0) + seconds

    def begin(self, phase: str) -> None:
        """From now on, to the `end` that belongs to it."""
        self._turn()
        outer = self._inside[-1] if self._inside else None
        self._inside.append(outer if outer in WHOLE else phase)

    def end(self) -> None:
        """Ends the phase that began last."""
        self._turn()
        self._inside.pop()

    @contextmanager
    def __call__(self, phase: str | None) -> Iterator[None]:
        """The phase of a with-block; None: what surrounds it goes on."""
        if phase is None:
            yield
            return
        self.begin(phase)
        try:
            yield
        finally:
            self.end()

    def call(self, phase: str | None, function: Callable[..., object], /, *arguments: Any, **more: Any) -> None:
        """Calls a function in a phase."""
        with self(phase):
            function(*arguments, **more)

    def timed[T](self, items: Iterable[T], phase: str) -> Iterator[T]:
        """The same items; waiting for each is in the phase."""
        source = iter(items)
        while True:
            with self(phase):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, every one of PHASES. On a GPU: as far as the device has come."""
        while self._passed and self._passed[0][1].query():
            hand, event = self._passed.popleft()
            self._count(hand, self._last.elapsed_time(event) / 1000)
            self._last = event
        taken, self._seconds = self._seconds, {}
        return {phase: taken.get(phase, 0.0) for phase in PHASES}


class _Timer:
    """One of Megatron-core's timers; `phase` None: it spans others."""

    def __init__(self, phases: Phases, phase: str | None) -> None:
        self.phases, self.phase = phases, phase

    def start(self, barrier: bool = False) -> None:
        """Begins the phase; no barrier, which would make every rank wait for every other."""
        if self.phase is not None:
            self.phases.begin(self.phase)

    def stop(self, barrier: bool = False) -> None:
        """Ends it."""
        if self.phase is not None:
            self.phases.end()


class Timers:
    """What Megatron-core's configurations call `timers`: name -> something to start and stop."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        if name not in self._timers:
            self._timers[name] = _Timer(self.phases, phase_of(name))
        return self._timers[name]


def phase_of(timer: str) -> str | None:
    """The phase that a timer of Megatron-core's belongs to; None for one that spans several."""
    if timer in OF_TIMER:
        return OF_TIMER[timer]
    if any(part in timer for part in COMMUNICATES):
        return COMMUNICATION
    return OPTIMIZER if timer.startswith("optimizer-") else None
