"""The timetable of a run: update -> stage, batch size, sequence length, learning rate, first sample. A pure function.

Nothing is stored and nothing is counted up, so a restart, another layout and a reader of the recipe alone agree on what
any update does (arXiv 2604.03044, 2.4 has the paper's stages). A recipe without [[stages]] is one stage.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .schema import Recipe, ScheduleSection, StageSection

ONLY_STAGE = "training"

Shares = tuple[tuple[str, float], ...]  # label of a source and its weight


@dataclass(frozen=True)
class Curve:
    """A piece of the learning rate: from `start`, which belongs to the update before it, to `end`, its last update's.

    Of n updates the i-th (from 1) has end + (start - end) * r, with r = 1 - i/n (linear) or (1 + cos(pi i/n)) / 2.
    """

    steps: int
    start: float
    end: float
    shape: str

    def rate(self, i: int) -> float:
        """The learning rate of update i, 1 .. steps."""
        done = i / self.steps
        remaining = {"constant": 0.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.shape]
        return self.end + (self.start - self.end) * remaining


@dataclass(frozen=True)
class Ramp:
    """Samples of each update of a stage: M sizes from `first` to `last`, each for the same number of updates.

    Update i (from 0) of n has first + increment * floor(i * M / n): the ramp is linear in updates and ends before the
    stage does. Its sizes are the recipe's and not the layout's, so another layout has the same global batches.
    """

    steps: int
    first: int
    last: int
    increment: int = 1

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The update from which each size holds: ceil(j * n / M) for size j."""
        sizes = (self.last - self.first) // self.increment + 1
        return tuple(-(-j * self.steps // sizes) for j in range(sizes))

    def size(self, i: int) -> int:
        """Samples of update i, 0 .. steps - 1."""
        return self.first + self.increment * (bisect_right(self.starts, i) - 1)

    def before(self, i: int) -> int:
        """Samples of updates 0 .. i - 1: every size above the first adds `increment` from its start on."""
        return i * self.first + self.increment * sum(i - start for start in self.starts[1:] if start < i)

    def sizes(self) -> Iterator[tuple[int, int]]:
        """(first update, samples) of each stretch of updates of one size; a size without updates is left out."""
        for start, after in zip(self.starts, (*self.starts[1:], self.steps), strict=True):
            if start < after:
                yield start, self.size(start)


def steps_for(tokens: int, sequence_length: int, first: int, last: int, increment: int = 1) -> int:
    """The fewest updates n whose ramp over n updates has at least so many tokens.

    A longer ramp always has more: with M sizes it has n * first + increment * ((M - 1)(n - 1) + gcd(M, n) - 1) / 2
    samples, and gcd moves by less than M. So the search may halve.
    """
    low, high = 0, -(-tokens // (sequence_length * first))
    while high - low > 1:
        middle = (low + high) // 2
        enough = sequence_length * Ramp(middle, first, last, increment).before(middle) >= tokens
        low, high = (low, middle) if enough else (middle, high)
    return high


@dataclass(frozen=True)
class Stage:
    """A stage with everything resolved; what lies before it counts updates, samples and tokens of the whole run."""

    index: int
    name: str
    ramp: Ramp
    curves: tuple[Curve, ...]
    sequence_length: int
    micro_batch_size: int
    blend: Shares
    mtp_loss_factor: float
    rope_theta: float
    router_bias_update_rate: float
    min_longest_document: int | None
    first_step: int
    first_sample: int
    first_token: int

    @property
    def steps(self) -> int:
        """Updates of the stage."""
        return self.ramp.steps

    @property
    def last_step(self) -> int:
        """The number, from 1, of the stage's last update."""
        return self.first_step + self.steps

    @property
    def samples(self) -> int:
        """Samples of the stage."""
        return self.ramp.before(self.steps)

    @property
    def tokens(self) -> int:
        """Tokens of the stage."""
        return self.samples * self.sequence_length

    def rate(self, i: int) -> float:
        """The learning rate of the stage's update i, from 1."""
        for curve in self.curves:
            if i <= curve.steps:
                return curve.rate(i)
            i -= curve.steps
        raise IndexError(f"stage {self.name} has {self.steps} updates")


@dataclass(frozen=True)
class StepPlan:
    """What one update does; `number` counts from 1, samples and tokens are those of all updates before it."""

    number: int
    stage: Stage
    global_batch_size: int
    learning_rate: float
    first_sample: int
    first_token: int

    @property
    def sequence_length(self) -> int:
        """Tokens of each sample."""
        return self.stage.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of the update."""
        return self.global_batch_size * self.sequence_length


class Timetable:
    """The whole run of a resolved recipe, looked up by update."""

    def __init__(self, recipe: Recipe) -> None:
        self.stages = tuple(_stages(recipe))
        self._starts = [stage.first_step for stage in self.stages]

    @property
    def steps(self) -> int:
        """Updates of the run."""
        return self.stages[-1].last_step

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return self.stages[-1].first_token + self.stages[-1].tokens

    @property
    def samples(self) -> int:
        """Samples of the run."""
        return self.stages[-1].first_sample + self.stages[-1].samples

    def stage_of(self, number: int) -> Stage:
        """The stage of update `number`, from 1. Raises IndexError outside 1 .. steps."""
        if not 1 <= number <= self.steps:
            raise IndexError(f"update {number} of {self.steps}")
        return self.stages[bisect_right(self._starts, number - 1) - 1]

    def at(self, number: int) -> StepPlan:
        """What update `number` does, from 1. Raises IndexError outside 1 .. steps."""
        stage = self.stage_of(number)
        i = number - 1 - stage.first_step
        before = stage.ramp.before(i)
        return StepPlan(
            number=number,
            stage=stage,
            global_batch_size=stage.ramp.size(i),
            learning_rate=stage.rate(i + 1),
            first_sample=stage.first_sample + before,
            first_token=stage.first_token + before * stage.sequence_length,
        )

    def samples_before(self, done: int) -> int:
        """Samples of the first `done` updates."""
        return self.at(done + 1).first_sample if done < self.steps else self.samples

    def stretches(self) -> Iterator[tuple[int, int, Stage]]:
        """(updates before it, samples of an update, stage) for each stretch of updates that are alike."""
        for stage in self.stages:
            for start, size in stage.ramp.sizes():
                yield stage.first_step + start, size, stage


def _stages(recipe: Recipe) -> Iterator[Stage]:
    step = sample = token = 0
    rate = 0.0
    for index, section in enumerate(recipe.stages or [None]):
        length = (section and section.sequence_length) or recipe.data.sequence_length
        ramp = _ramp(recipe, section, length)
        curves = _curves(section, ramp.steps, rate) if section else _classic(recipe.schedule, ramp.steps)
        stage = Stage(
            index=index,
            name=section.name if section else ONLY_STAGE,
            ramp=ramp,
            curves=curves,
            sequence_length=length,
            micro_batch_size=(section and section.micro_batch_size) or recipe.train.micro_batch_size,
            blend=_blend(recipe, section),
            mtp_loss_factor=_own(section, "mtp_loss_factor", recipe.model.mtp_loss_factor),
            rope_theta=_own(section, "rope_theta", recipe.model.rope_theta),
            router_bias_update_rate=_own(section, "router_bias_update_rate", recipe.model.router_bias_update_rate),
            min_longest_document=section.min_longest_document if section else None,
            first_step=step,
            first_sample=sample,
            first_token=token,
        )
        yield stage
        step, sample, token, rate = stage.last_step, sample + stage.samples, token + stage.tokens, curves[-1].end


def _own(section: StageSection | None, key: str, common: float) -> float:
    value = getattr(section, key, None)
    return common if value is None else float(value)


def _ramp(recipe: Recipe, section: StageSection | None, length: int) -> Ramp:
    last = (section and section.global_batch_size) or recipe.train.global_batch_size
    if section is None:
        return Ramp(recipe.train.steps, last, last)
    first, increment = section.ramp_from or last, section.ramp_increment or 1
    steps = section.steps or steps_for(section.tokens or 1, length, first, last, increment)
    return Ramp(steps, first, last, increment)


def _curves(section: StageSection, steps: int, before: float) -> tuple[Curve, ...]:
    start = before if section.start_lr is None else section.start_lr
    return (Curve(steps, start, start if section.end_lr is None else section.end_lr, section.lr_shape),)


def _classic(schedule: ScheduleSection, steps: int) -> tuple[Curve, ...]:
    """Warmup, stable, decay of a recipe without stages (WSD; arXiv 2604.03044, 1 and 2.4)."""
    peak, stable = schedule.peak_lr, steps - schedule.warmup_steps - schedule.decay_steps
    curves = (
        Curve(schedule.warmup_steps, 0.0, peak, "linear"),
        Curve(stable, peak, peak, "constant"),
        Curve(schedule.decay_steps, peak, schedule.final_lr, schedule.decay_shape),
    )
    return tuple(curve for curve in curves if curve.steps)


def _blend(recipe: Recipe, section: StageSection | None) -> Shares:
    if section and section.blend:
        return tuple((entry.source, entry.weight) for entry in section.blend)
    return tuple((entry.label, entry.weight) for entry in recipe.data.train)


def as_of(recipe: Recipe, done: int) -> Recipe:
    """The recipe with the model's settings as the last of `done` updates had them: what its weights are used with."""
    timetable = Timetable(recipe)
    stage = timetable.stage_of(min(max(done, 1), timetable.steps))
    model = {"rope_theta": stage.rope_theta, "mtp_loss_factor": stage.mtp_loss_factor}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})


def rate_key(recipe: Recipe, stage: Stage) -> str:
    """The key of a recipe that a stage's highest learning rate follows from, for a message."""
    if not recipe.stages:
        return "schedule.peak_lr"
    rising = stage.curves[0].end > stage.curves[0].start
    for index in range(stage.index, -1, -1):  # where the rate comes from
        section = recipe.stages[index]
        if section.end_lr is not None and (rising or index < stage.index):
            return f"stages.{index}.end_lr"
        if section.start_lr is not None:
            return f"stages.{index}.start_lr"
    return f"stages.{stage.index}.start_lr"


def stage_line(stage: Stage) -> str:
    """A stage in a line, for the terminal and the run's events."""
    first, last = stage.ramp.first, stage.ramp.last
    batch = f"{last}" if first == last else f"{first} to {last}"
    return (
        f"stage {stage.name}, updates {stage.first_step + 1} to {stage.last_step}: {batch} samples of "
        f"{stage.sequence_length} tokens, learning rate {stage.curves[0].start:g} to {stage.curves[-1].end:g}"
    )
