"""Going back: the last checkpoint from before a spike, and on from there without the spike's samples."""

from megatron_joy.checkpoint.find import candidates, read_candidate
from megatron_joy.checkpoint.load import choose
from megatron_joy.checkpoint.marker import Checkpoint, step_of
from megatron_joy.checkpoint.retention import discard
from megatron_joy.data.stream import SampleStream
from megatron_joy.data.supply import Supply
from megatron_joy.recipe.ledger import Ledger, rollbacks, with_rollback
from megatron_joy.train.loop import Loop
from megatron_joy.train.resume import go_to, gone_back_on
from megatron_joy.train.run import decide


class Rollback:
    """What a guard needs to change a run's course, on all ranks together."""

    def __init__(self, stream: SampleStream, supply: Supply) -> None:
        self.stream, self.supply = stream, supply

    def decide(self, loop: Loop, ledger: Ledger) -> None:
        """Makes this the run's ledger, on disk first."""
        decide(loop.run, ledger)

    def go_back(self, loop: Loop, number: int, reason: str) -> bool:
        """Leaves out the samples of update `number` and of those before it that the recipe's span has.

        Weights, optimizer state and progress become those of the newest whole checkpoint from before the span; newer
        ones are removed. False, nothing changed, where there is none.
        """
        run = loop.run
        first = max(1, number - run.recipe.guards.spike_span + 1)
        loop.tell("on_rollback")
        checkpoint = choose(
            run.folder / "checkpoints",
            run.process,
            lambda found: _too_new(found, first) or gone_back_on(found, run.ledger),
        ).checkpoint
        if checkpoint is None:
            loop.tell("on_note", f"no checkpoint is from before update {first}: the run can't go back")
            return False
        self.supply.stop()
        ledger = with_rollback(run.ledger, run.recipe, first, number, reason)
        self.decide(loop, ledger)
        done = checkpoint.marker.step
        loop.tell(
            "on_decision",
            "rollback",
            f"back to {checkpoint.path.name}; the samples of updates {first} to {number} are left out: {reason}",
            back_to=done,
            left_out=[ledger[-1].from_step + 1, number],
        )
        self.clean(loop)
        go_to(checkpoint, run, loop.trainer)
        self.stream.follow(ledger)
        self.supply.restart(run.progress.step)
        loop.went_back = True
        return True

    def clean(self, loop: Loop) -> None:
        """Removes checkpoints of updates that the run went back on: nobody may take one for the newest."""
        run = loop.run
        if not (run.process.is_first_rank and rollbacks(run.ledger)):
            return
        found = [(path, read_candidate(path)) for path in candidates(run.folder / "checkpoints")]
        old = [path for path, one in found if isinstance(one, Checkpoint) and gone_back_on(one, run.ledger)]
        for note in discard(old).notes:
            loop.tell("on_note", note)


def _too_new(found: Checkpoint, first: int) -> str | None:
    """Progress is what imported weights lack: there is no optimizer state to go back to with them."""
    step = step_of(found.path.name)
    if step is None or step >= first:
        return "it has the span's updates"
    return None if "progress" in found.state else "it has weights only"
