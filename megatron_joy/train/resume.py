"""Going on: what the newest checkpoint holds a run to, its ledger, and the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_joy.checkpoint.load import choose, load_checkpoint
from megatron_joy.checkpoint.marker import Checkpoint
from megatron_joy.errors import UserError
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.ledger import (
    Ledger,
    begin,
    check_history,
    decides_after,
    follows,
    from_json,
    go_on,
    outdated,
)
from megatron_joy.recipe.resume import changes
from megatron_joy.recipe.schema import Recipe
from megatron_joy.train.run import Progress, Run, ledgers_on_disk
from megatron_joy.train.step import Trainer


@dataclass(frozen=True)
class Past:
    """The checkpoint to go on from, if there is one, and what is to be said about those passed over.

    sources: fingerprint of each source that the run has read, by its label in the recipe. tokenizer: SHA-256 of theirs.
    """

    checkpoint: Checkpoint | None = None
    notes: Sequence[str] = ()
    sources: dict[str, str] = field(default_factory=dict)
    tokenizer: str | None = None

    @property
    def name(self) -> str | None:
        """The checkpoint's folder."""
        return None if self.checkpoint is None else self.checkpoint.path.name

    def check_sources(self, now: Mapping[str, str], tokenizer: str) -> None:
        """Refuses sources that are not what they were: another tokenizer's, other shards under a label, known shards
        under a new one.
        """
        if self.checkpoint is None:
            return
        if self.tokenizer not in (None, tokenizer):
            raise UserError(
                f"{self.checkpoint.path}: was trained on tokenizer {str(self.tokenizer)[:12]}, and the shards in "
                f"data.train are tokenizer {tokenizer[:12]}'s, whose ids mean other text; give shards of the run's"
            )
        for label, fingerprint in now.items():
            known = self.sources.get(label)
            if known is not None and known != fingerprint:
                raise UserError(
                    f"{self.checkpoint.path}: was trained on other data (source {label} had fingerprint {known[:12]}, "
                    f"now {fingerprint[:12]}); put the old shards back or give the new ones another name in data.train"
                )
            before = next((old for old, one in self.sources.items() if one == fingerprint), label)
            if before != label:
                raise UserError(
                    f"data.train: {label} holds the shards that the run has read as {before}, and would read them from "
                    f'the start again; set name = "{before}" beside its manifest'
                )

    def load(self, run: Run, trainer: Trainer) -> None:
        """Puts weights, optimizer state and progress in place; imported weights start with a fresh optimizer."""
        if self.checkpoint is None:
            return
        if "imported" in self.checkpoint.state:
            load_checkpoint(self.checkpoint, chunks=trainer.chunks, optimizer=None, process=run.process)
            trainer.optimizer.reload_model_params()  # its fp32 copies
        else:
            go_to(self.checkpoint, run, trainer)


def go_to(checkpoint: Checkpoint, run: Run, trainer: Trainer) -> None:
    """Weights, optimizer state and progress become a checkpoint's; all ranks call it together."""
    state = load_checkpoint(checkpoint, chunks=trainer.chunks, optimizer=trainer.optimizer, process=run.process)
    run.progress = Progress(**state["progress"])


def gone_back_on(checkpoint: Checkpoint, now: Ledger) -> str | None:
    """Why a checkpoint is none to go on from: the run went back to before its step, and what is in it was left out."""
    then = checkpoint.state.get("ledger")
    if then is None or not outdated(from_json(then), checkpoint.marker.step, now):
        return None
    return "a guard went back to before it"


def look_back(run: Run) -> Past:
    """Chooses the checkpoint and completes the run's ledger; all ranks together, nothing is loaded or written.

    Raises UserError when the recipe would make what is done something else.
    """
    saved, repeated = ledgers_on_disk(run)
    choice = choose(run.folder / "checkpoints", run.process, lambda found: gone_back_on(found, saved or ()))
    checkpoint = choice.checkpoint
    if checkpoint is None:
        run.ledger = _with_decisions(_first(run.recipe, repeated), saved, run.recipe, 0)
        return Past(None, choice.notes)
    # Imported weights have none: the run begins with them. Other weights alone are refused when they are loaded.
    state, done = checkpoint.state, checkpoint.marker.step
    if "ledger" not in state:
        run.ledger = _with_decisions(_first(run.recipe, repeated), saved, run.recipe, 0)
        return Past(checkpoint, choice.notes)
    old = load_recipe(str(checkpoint.recipe_path))
    check_history(old, run.recipe, done)
    before = from_json(state["ledger"])
    run.ledger = _with_decisions(before, saved, run.recipe, done)
    run.progress.step = done
    notes = list(choice.notes)
    if changed := changes(old, run.recipe):
        notes.append(f"since {checkpoint.path.name} the recipe was changed: {changed}")
    if run.ledger[-1] != before[-1] and not run.ledger[-1].reason and run.ledger[-1].from_step == done:
        notes.append(f"the recipe's blend was changed: the new one holds from update {done + 1} on")
    if run.recipe.precision.fp8.recipe == "delayed" and run.recipe.precision.fp8 != old.precision.fp8:
        notes.append("precision.fp8 was changed: delayed scales that the checkpoint doesn't have begin anew")
    if decides_after(saved or (), done) and run.ledger != saved:
        notes.append(f"a guard's decisions about update {done + 1} and later ones are dropped: the recipe was changed")
    return Past(checkpoint, notes, dict(state["sources"]), state.get("tokenizer"))


def _first(recipe: Recipe, repeated: Ledger | None) -> Ledger:
    """The ledger of a run that begins: the recipe's, or another run's that it repeats."""
    if repeated is None:
        return begin(recipe)
    if not follows(repeated, recipe):
        raise UserError(
            f"guards.ledger = {recipe.guards.ledger}: its samples from update {repeated[-1].from_step + 1} on are of "
            "other stages, lengths or blends than this recipe's; use the recipe.toml beside it"
        )
    return repeated


def _with_decisions(before: Ledger, saved: Ledger | None, recipe: Recipe, done: int) -> Ledger:
    """The ledger to go on with: the checkpoint's, or the folder's where that has decisions of later updates."""
    if saved is not None and decides_after(saved, done) and follows(saved, recipe):
        return saved
    return go_on(before, recipe, done)
