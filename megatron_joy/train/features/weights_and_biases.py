"""The scalars of a run in Weights & Biases, for recipes that ask; the package is imported for them alone."""

import importlib
import importlib.util
import logging
import secrets
from typing import Any

from megatron_joy.data.atomic import write_atomically
from megatron_joy.errors import UserError
from megatron_joy.recipe.schema import Recipe
from megatron_joy.report.tensorboard import TAGS
from megatron_joy.train.loop import Loop
from megatron_joy.train.moments import Feature
from megatron_joy.train.run import Run
from megatron_joy.train.step import StepResult

PACKAGE, ID_FILE = "wandb", "wandb_id"
logger = logging.getLogger(__name__)


def check_wandb(recipe: Recipe) -> None:
    """Raises UserError where a recipe asks for the package and it isn't installed."""
    if recipe.run.wandb_project is not None and importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            f"run.wandb_project: needs the package {PACKAGE}, which is not installed; "
            f"pip install 'megatron-joy[{PACKAGE}]' or leave the key out"
        )


class WeightsAndBiases(Feature):
    """On rank 0, after the metrics, whose row it sends. Should it fail, the run goes on without it and says so once.

    A run has one id through all its attempts, in `wandb_id` of its folder. Steps that a resumed attempt runs again are
    sent again: the later value of a step stands. The API key is the package's own business (its variable or netrc).
    """

    def __init__(self, run: Run) -> None:
        self.run, self.sink, self.exit_code = run, None, 0

    def _begin(self) -> Any:
        wandb = importlib.import_module(PACKAGE)
        section, file = self.run.recipe.run, self.run.folder / ID_FILE
        if not file.exists():
            write_atomically(file, secrets.token_hex(8).encode())
        sink = wandb.init(
            project=section.wandb_project,
            name=self.run.recipe.name,
            id=file.read_text(),
            resume="allow",
            mode=section.wandb_mode,
            dir=str(self.run.folder),
            config=self.run.recipe.model_dump(mode="json"),
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True),
        )
        sink.define_metric("step")
        sink.define_metric("*", step_metric="step")
        return sink

    def _guarded(self, loop: Loop | None, action: Any) -> None:
        try:
            action()
        except Exception as error:  # a service that is down must not end a run; its package raises many kinds
            logger.exception("Weights & Biases failed")
            self.sink = None
            if loop is not None:
                what = f"Weights & Biases failed ({type(error).__name__})"
                loop.tell("on_note", f"{what}: the run goes on without it, logs/rank_0.log has more")

    def on_start(self, loop: Loop) -> None:
        """Opens the run there."""

        def begin() -> None:
            self.sink = self._begin()

        self._guarded(loop, begin)

    def after_step(self, loop: Loop, result: StepResult) -> None:
        """Sends the row's scalars under their names in TensorBoard."""
        sink = self.sink
        if sink is not None:
            values = {tag: loop.row[key] for key, tag in TAGS.items() if loop.row.get(key) is not None}
            self._guarded(loop, lambda: sink.log({"step": loop.row["step"]} | values))

    def on_error(self, run: Run, error: BaseException) -> None:
        """The run there ends as failed."""
        self.exit_code = 1

    def close(self) -> None:
        """Ends the run there and waits until what was sent has left."""
        sink, self.sink = self.sink, None
        if sink is not None:
            self._guarded(None, lambda: sink.finish(exit_code=self.exit_code))
