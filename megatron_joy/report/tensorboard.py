"""The TensorBoard mirror of a run's metrics, through TensorBoard's own event writer: no torch, no TensorFlow."""

from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_joy.report import heat
from megatron_joy.report.png import palette_png

# Key of metrics.jsonl -> tag in TensorBoard.
TAGS = {
    "loss": "loss/train",
    "mtp_loss": "loss/mtp",
    "validation_loss": "loss/validation",
    "validation_mtp_loss": "loss/validation_mtp",
    "balance_loss": "loss/balance",
    "worst_violation": "expert_load/worst_max_violation",
    "mtp_acceptance_length": "mtp_acceptance/length",
    "mtp_acceptance_ratio": "mtp_acceptance/ratio",
    "mtp_acceptance_1": "mtp_acceptance/first_draft",
    "mtp_acceptance_2": "mtp_acceptance/first_two_drafts",
    "mtp_acceptance_3": "mtp_acceptance/all_three_drafts",
    "lr": "lr",
    "grad_norm": "grad_norm",
    "tokens_per_second": "throughput",
    "tokens_per_second_per_device": "throughput_per_device",
    "mfu": "mfu",
    "data_seconds": "seconds/data",
    "forward_seconds": "seconds/forward",
    "backward_seconds": "seconds/backward",
    "communication_seconds": "seconds/communication",
    "optimizer_seconds": "seconds/optimizer",
    "validation_seconds": "seconds/validation",
    "checkpoint_seconds": "seconds/checkpoint",
    "parameters_bytes": "memory/parameters",
    "gradients_bytes": "memory/gradients",
    "optimizer_bytes": "memory/optimizer",
    "peak_bytes": "memory/peak",
}
IMAGE_INTERVAL = 100
_FLUSH_SECONDS = 5
_QUEUE = 256


class TensorBoardMirror:
    """Writes rows of metrics.jsonl as TensorBoard events.

    Args:
        folder: where the event file goes.
        purge_step: on a resume, the first step that is written anew; TensorBoard then hides what an earlier attempt
            wrote from that step on (a session-start event, as torch's SummaryWriter does for its `purge_step`).
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self._writer = EventFileWriter(str(folder), _QUEUE, _FLUSH_SECONDS)
        self._last = -1
        if purge_step is not None:
            self._hide_from(purge_step)

    def _hide_from(self, step: int) -> None:
        self._writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def step(self, row: dict[str, Any]) -> None:
        """Adds one row: its scalars, the worst layer's load ratio, and now and then the picture of the load.

        A step that is not after the last one means that the run went back: what is there from it on is hidden.
        """
        if row["step"] <= self._last:
            self._hide_from(row["step"])
        self._last = row["step"]
        values = [
            Summary.Value(tag=tag, simple_value=row[key]) for key, tag in TAGS.items() if row.get(key) is not None
        ]
        values += [
            Summary.Value(tag=TAGS[key], simple_value=float(text))
            for key, text in row.get("nonfinite", {}).items()
            if key in TAGS
        ]
        if row.get("expert_load") is not None:
            ratio = np.asarray(row["expert_load"], np.float64)
            ratio = ratio * ratio.shape[1]
            values.append(Summary.Value(tag="expert_load/worst_max_over_mean", simple_value=float(ratio.max())))
            if row["step"] % IMAGE_INTERVAL == 0 or row.get("validation_loss") is not None:
                values.append(Summary.Value(tag="expert_load/layers_by_experts", image=_picture(ratio)))
        self._writer.add_event(Event(wall_time=row["time"], step=row["step"], summary=Summary(value=values)))

    def flush(self) -> None:
        """Waits until everything so far is in the file."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and ends the writer's thread."""
        self._writer.close()


def _picture(ratio: np.ndarray) -> Summary.Image:
    """Layers down, experts across, each cell enlarged to a few pixels."""
    cell = max(1, 512 // ratio.shape[1])
    codes = np.kron(heat.encode(ratio), np.ones((cell, cell), np.uint8))
    return Summary.Image(
        height=codes.shape[0],
        width=codes.shape[1],
        colorspace=3,
        encoded_image_string=palette_png(codes, heat.palette()),
    )
