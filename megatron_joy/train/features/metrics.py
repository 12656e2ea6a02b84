"""metrics.jsonl, events.jsonl, TensorBoard and the terminal, all on rank 0."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_joy.data.stream import SampleStream
from megatron_joy.recipe.schema import LayoutSection
from megatron_joy.report.writer import MetricsWriter
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.run import Run
from megatron_joy.train.step import StepResult

DEGREES = {
    "TP": "tensor_model_parallel_size",
    "CP": "context_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
    "DP": "data_parallel_size",
}


def layout_text(layout: LayoutSection) -> str:
    """The degrees that are more than one: 'EP2 DP2'; 'one process' when none is."""
    degrees = [f"{short}{getattr(layout, key)}" for short, key in DEGREES.items() if getattr(layout, key) > 1]
    return " ".join(degrees) or "one process"


def headline(step: int, steps: int, row: dict[str, Any]) -> str:
    """One step in a line."""
    parts = [f"step {step}/{steps}", f"loss {row['loss']:.4f}"]
    for key, label in (("mtp_loss", "mtp"), ("validation_loss", "validation")):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:.4f}")
    parts += [f"lr {row['lr']:.2e}", f"grad norm {row['grad_norm']:.3f}", f"{row['tokens_per_second']:,.0f} tokens/s"]
    return "  ".join(parts)


class Metrics(Feature):
    """Comes after the features that add to a step's row."""

    def __init__(self, run: Run, stream: SampleStream, resumed_from: str | None) -> None:
        self.writer = MetricsWriter(run.folder, run.attempt, tensorboard=run.recipe.run.tensorboard)
        self.stream, self.resumed_from = stream, resumed_from
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def on_start(self, loop: Loop) -> None:
        """Writes the attempt's first event."""
        run, layout = loop.run, loop.run.recipe.layout
        kind, message = ("resume", f"resumed from {self.resumed_from}") if self.resumed_from else ("start", "started")
        self.writer.event(
            kind,
            run.progress.step,
            f"{message} on {layout.world_size} processes ({layout_text(layout)})",
            world_size=layout.world_size,
            layout=layout_text(layout),
        )
        self.console.print(
            f"[bold]{run.folder}[/bold]: {message}, {layout_text(layout)}", highlight=False, soft_wrap=True
        )
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=run.recipe.train.steps, completed=run.progress.step)
            self.bar.start()

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Writes the step's row."""
        progress = loop.run.progress
        first = progress.samples - loop.trainer.samples_per_step
        row = {
            "step": progress.step,
            "loss": result.loss,
            "mtp_loss": result.mtp_loss,
            "lr": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": progress.tokens,
            "samples": progress.samples,
            "loss_tokens": result.loss_tokens,
            "expert_load": self._expert_load(loop, result),
            "sources": self.stream.sources_in(range(first, progress.samples)),
        } | loop.row
        self.writer.metrics(row)
        self._show(loop, row)

    def _expert_load(self, loop: Loop, result: StepResult) -> list[list[float]] | None:
        """Large for many experts, so it is kept every so often only."""
        if result.expert_load is None or loop.run.progress.step % loop.run.recipe.run.expert_load_interval:
            return None
        return result.expert_load.tolist()

    def _show(self, loop: Loop, row: dict[str, Any]) -> None:
        step, train = loop.run.progress.step, loop.run.recipe.train
        line = headline(step, train.steps, row)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, description=line)
        if step % train.log_interval == 0 or "validation_loss" in row or step == train.steps:
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_checkpoint(self, loop: Loop, message: str) -> None:
        """Notes it."""
        self.writer.event("checkpoint", loop.run.progress.step, message)

    def on_note(self, loop: Loop, message: str) -> None:
        """Notes it, also on the terminal."""
        self.writer.event("note", loop.run.progress.step, message)
        self.console.print(message, highlight=False, soft_wrap=True)

    def on_finish(self, loop: Loop) -> None:
        """Says how the attempt ended."""
        kind, message = ("finish", "all steps done") if loop.done else ("stop", "stopped as asked")
        self.writer.event(kind, loop.run.progress.step, message)

    def on_error(self, run: Run, error: BaseException) -> None:
        """Leaves the reason in the run's events."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self.writer.event("error", run.progress.step, text[:2000])

    def close(self) -> None:
        """Flushes the files and puts the terminal back."""
        if self.bar is not None:
            self.bar.stop()
        self.writer.close()
