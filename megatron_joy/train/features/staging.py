"""What a stage changes in the model: rotary base, MTP, router balance."""

from megatron_joy.recipe.timetable import Stage
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature


class StageSettings(Feature):
    """Comes first: what other features do in a stage, they do with its model. Batch and rate are the timetable's."""

    def on_stage_change(self, loop: Loop, stage: Stage) -> None:
        """Sets the model up for the stage."""
        loop.trainer.enter(stage)
