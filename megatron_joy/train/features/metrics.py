"""metrics.jsonl, events.jsonl and TensorBoard, on rank 0."""

from typing import Any

from megatron_joy.data.stream import SampleStream
from megatron_joy.recipe.ledger import first_sample
from megatron_joy.recipe.timetable import Stage, stage_line
from megatron_joy.report.writer import MetricsWriter
from megatron_joy.train.features.terminal import layout_text, world_text
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.run import Run
from megatron_joy.train.step import StepResult


class Metrics(Feature):
    """Comes after the features that add to a step's row, and completes it."""

    def __init__(self, run: Run, stream: SampleStream, resumed_from: str | None) -> None:
        self.writer = MetricsWriter(run.folder, run.attempt, tensorboard=run.recipe.run.tensorboard)
        self.stream, self.resumed_from = stream, resumed_from

    def on_start(self, loop: Loop) -> None:
        """Writes the attempt's first event."""
        layout = loop.run.recipe.layout
        kind, message = ("resume", f"resumed from {self.resumed_from}") if self.resumed_from else ("start", "started")
        self.writer.event(
            kind,
            loop.run.progress.step,
            f"{message} on {world_text(layout)}",
            world_size=layout.world_size,
            layout=layout_text(layout),
        )

    def on_stage_change(self, loop: Loop, stage: Stage) -> None:
        """Notes it where a run has stages."""
        if loop.run.recipe.stages:
            self.writer.event("stage", loop.run.progress.step, stage_line(stage))

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Writes the step's row."""
        progress = loop.run.progress
        plan = loop.plan
        first = first_sample(loop.run.ledger, loop.trainer.timetable, progress.step)
        loop.row |= {
            "step": progress.step,
            "stage": plan.stage.name,
            "sequence_length": plan.sequence_length,
            "global_batch_size": plan.global_batch_size,
            "loss": result.loss,
            "mtp_loss": result.mtp_loss,
            "lr": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": progress.tokens,
            "samples": progress.samples,
            "loss_tokens": result.loss_tokens,
            "expert_load": self._expert_load(loop, result),
            "sources": self.stream.sources_in(range(first, first + plan.global_batch_size)),
        }
        if loop.trainer.refused is not None:
            loop.row["refused"] = loop.trainer.refused
        if result.balance_loss is not None:
            loop.row["balance_loss"] = result.balance_loss
        loop.row |= self._violation(result)
        self.writer.metrics(loop.row)

    @staticmethod
    def _violation(result: StepResult) -> dict[str, Any]:
        """MaxVio (arXiv 2408.15664): by layer, how far the busiest expert of the step's batch was above the mean."""
        if result.expert_load is None:
            return {}
        above = result.expert_load.amax(-1) * result.expert_load.shape[1] - 1  # [MoE layers]
        return {"max_violation": [round(value, 4) for value in above.tolist()], "worst_violation": float(above.max())}

    def _expert_load(self, loop: Loop, result: StepResult) -> list[list[float]] | None:
        """Large for many experts, so it is kept every so often only."""
        if result.expert_load is None or loop.run.progress.step % loop.run.recipe.run.expert_load_interval:
            return None
        return result.expert_load.tolist()

    def on_checkpoint(self, loop: Loop, step: int, message: str) -> None:
        """Notes it, at the step that the checkpoint is of."""
        self.writer.event("checkpoint", step, message)

    def on_decision(self, loop: Loop, kind: str, message: str, **extra: Any) -> None:
        """Notes it under its own kind."""
        self.writer.event(kind, loop.run.progress.step, message, **extra)

    def on_note(self, loop: Loop, message: str) -> None:
        """Notes it."""
        self.writer.event("note", loop.run.progress.step, message)

    def on_alarm(self, loop: Loop, message: str) -> None:
        """Notes it as what it is."""
        self.writer.event("alarm", loop.run.progress.step, message)

    def on_finish(self, loop: Loop) -> None:
        """Says how the attempt ended."""
        kind, message = ("finish", "all steps done") if loop.done else ("stop", "stopped as asked")
        if loop.done and loop.last_step < loop.run.recipe.train.steps:
            kind, message = "stop", f"stage {loop.run.recipe.run.last_stage} done, after which run.last_stage leaves"
        self.writer.event(kind, loop.run.progress.step, message)

    def on_error(self, run: Run, error: BaseException) -> None:
        """Leaves the reason in the run's events."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self.writer.event("error", run.progress.step, text[:2000])

    def close(self) -> None:
        """Flushes the files."""
        self.writer.close()
