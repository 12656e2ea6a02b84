"""What the person who started the run sees, on rank 0: a line now and then and, on a terminal, a bar."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megatron_joy.recipe.schema import LayoutSection
from megatron_joy.recipe.timetable import Stage, stage_line
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
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
    """The degrees that are more than one: 'EP2 DP2'; nothing when none is."""
    return " ".join(f"{short}{getattr(layout, key)}" for short, key in DEGREES.items() if getattr(layout, key) > 1)


def world_text(layout: LayoutSection) -> str:
    """'2 processes (EP2 DP2)' or '1 process'."""
    size = layout.world_size
    return f"{size} processes ({layout_text(layout)})" if size > 1 else "1 process"


def headline(step: int, steps: int, row: dict[str, Any]) -> str:
    """One step in a line."""
    parts = [f"step {step}/{steps}", f"loss {row['loss']:.4f}"]
    for key, label in (("mtp_loss", "mtp"), ("validation_loss", "validation")):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:.4f}")
    if row.get("mtp_acceptance_length") is not None:
        parts.append(f"with drafts {row['mtp_acceptance_length']:.2f} tokens a pass")
    parts += [f"lr {row['lr']:.2e}", f"grad norm {row['grad_norm']:.3f}", f"{row['tokens_per_second']:,.0f} tokens/s"]
    return "  ".join(parts)


class Terminal(Feature):
    """Comes after the metrics, whose row it shows. Writes to stderr."""

    def __init__(self, resumed_from: str | None) -> None:
        self.resumed_from = resumed_from
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def on_start(self, loop: Loop) -> None:
        """Says what begins."""
        run = loop.run
        how = f"goes on from {self.resumed_from}" if self.resumed_from else "training begins"
        self.console.print(f"[bold]{escape(str(run.folder))}[/bold]: {how} on {world_text(run.recipe.layout)}")
        if self.console.is_terminal and not loop.done:
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            steps = run.recipe.train.steps
            self.task = self.bar.add_task("", total=steps, completed=run.progress.step)
            self.bar.start()

    def on_stage_change(self, loop: Loop, stage: Stage) -> None:
        """Says it where a run has stages."""
        if loop.run.recipe.stages:
            self.console.print(escape(stage_line(stage)))

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Moves the bar, and says the step in a line when the recipe wants one or there is a validation."""
        step, train = loop.run.progress.step, loop.run.recipe.train
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=f"loss {result.loss:.4f}")
        if step % train.log_interval == 0 or "validation_loss" in loop.row or loop.done:
            self.console.print(headline(step, train.steps, loop.row))

    def on_decision(self, loop: Loop, kind: str, message: str, **extra: Any) -> None:
        """Says it."""
        self.console.print(f"[yellow]{kind}[/yellow], step {loop.run.progress.step}: {escape(message)}")

    def on_note(self, loop: Loop, message: str) -> None:
        """Says it."""
        self.console.print(f"[yellow]note[/yellow]: {escape(message)}")

    def on_alarm(self, loop: Loop, message: str) -> None:
        """Says it louder."""
        self.console.print(f"[red]alarm[/red]: {escape(message)}")

    def on_finish(self, loop: Loop) -> None:
        """Says how it ended and what can be done now."""
        self._remove_bar()
        step, folder = loop.run.progress.step, escape(str(loop.run.folder))
        if loop.done and loop.last_step < loop.run.recipe.train.steps:
            self.console.print(f"[bold]{folder}[/bold]: left after step {step}, as run.last_stage asks")
        elif loop.done:
            self.console.print(f"[bold]{folder}[/bold]: all {step} steps are done; `joy report {folder}` shows them")
        else:
            self.console.print(f"[bold]{folder}[/bold]: stopped after step {step}; the same command goes on")

    def close(self) -> None:
        """Puts the terminal back."""
        self._remove_bar()

    def _remove_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
