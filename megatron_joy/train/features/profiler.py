"""A window of steps under torch's profiler, on the ranks that the recipe names."""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.step import StepResult

FOLDER = "profile"


class Profiler(Feature):
    """Writes `profile/rank_R_steps_A_B.json.gz` in the run's folder, for chrome://tracing or ui.perfetto.dev.

    Comes early, so that other features' work after the window's last step is not in it; a run that goes on in the
    midst of the window has the rest of it.
    """

    def __init__(self, folder: Path, rank: int, window: tuple[int, int]) -> None:
        self.folder, self.rank, self.window = folder / FOLDER, rank, window
        self.running: Any = None
        self.began = 0

    def before_step(self, loop: Loop) -> None:
        """Begins where the window does."""
        number = loop.run.progress.step + 1
        if self.running is None and self.window[0] <= number <= self.window[1]:
            devices = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.running, self.began = profile(activities=[ProfilerActivity.CPU, *devices]), number
            self.running.start()

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Ends where the window or the run does, and writes."""
        step = loop.run.progress.step
        if self.running is None or (step < self.window[1] and not loop.done and not loop.wants_stop):
            return
        self._stop()
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"rank_{self.rank}_steps_{self.began}_{step}.json.gz"
        try:
            self.taken.export_chrome_trace(str(path))
            loop.tell("on_note", f"profile of steps {self.began} to {step} in {FOLDER}/{path.name}")
        except (OSError, RuntimeError) as error:
            loop.tell("on_note", f"the profile of steps {self.began} to {step} cannot be written: {error}")

    def _stop(self) -> None:
        if self.running is not None:
            self.running.stop()
            self.taken, self.running = self.running, None

    def close(self) -> None:
        """What an error cut short is not written."""
        self._stop()
