"""The schedule of a run as its recipe plans it: learning rate and batch over updates, the stages as bands."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from megatron_joy.errors import UserError
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.timetable import Stage, Timetable
from megatron_joy.recipe.usage import shares_of
from megatron_joy.report import text
from megatron_joy.report.charts import linear_ticks
from megatron_joy.report.panels import panel
from megatron_joy.report.tables import table

_WIDTH, _LEFT, _RIGHT = 1120, 64, 16
_TOP, _PART, _GAP, _FOOT = 26, 130, 22, 30
_POINTS = 200
CAPTION = (
    "What the recipe plans, for the whole run: the learning rate above, the tokens of an update below, a band for "
    "each stage. The dotted line is where the run is. <b>Good:</b> the learning rate has no jump at a band's edge "
    "unless the recipe wants one."
)


def timetable_of(run_folder: Path) -> Timetable | None:
    """The timetable of a run's recipe; None where the recipe is missing or no longer of the schema."""
    try:
        return Timetable(load_recipe(str(run_folder / "recipe.toml")))
    except UserError:
        return None


def stage_at(timetable: Timetable | None, done: int) -> Stage | None:
    """The stage of the update that comes next, or the last one; None for a recipe without stages."""
    if timetable is None or len(timetable.stages) == 1:
        return None
    return timetable.stage_of(min(done + 1, timetable.steps))


def schedule_panel(run_folder: Path, done: int) -> str:
    """The panel, drawn without JavaScript; nothing where the schedule is not known."""
    timetable = timetable_of(run_folder)
    if timetable is None:
        return ""
    height = _TOP + 2 * _PART + _GAP + _FOOT
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" class="static" role="img" aria-label="Planned schedule">']
    parts += _bands(timetable, height)
    rates = [(n, timetable.at(n).learning_rate) for n in _updates(timetable)]
    batches = [(n, float(timetable.at(n).tokens)) for n in _updates(timetable)]
    for number, (points, unit, colour) in enumerate(((rates, text.general, "c1"), (batches, text.count, "c2"))):
        parts += _plot(timetable.steps, points, unit, colour, _TOP + number * (_PART + _GAP))
    for tick in linear_ticks(0, timetable.steps, 8):
        at = f'x="{_x(timetable.steps, tick):.1f}" y="{height - 8}"'
        parts.append(f'<text class="tick middle" {at}>{text.count(tick)}</text>')
    parts.append(f'<text class="axis-label end" x="{_LEFT - 24}" y="{height - 8}">step</text>')
    x = f"{_x(timetable.steps, done):.1f}"
    parts.append(f'<line class="reference" x1="{x}" x2="{x}" y1="{_TOP}" y2="{height - _FOOT}"/></svg>')
    legend = "".join(
        f'<span class="legend-item"><i class="swatch {colour}"></i>{name}</span>'
        for colour, name in (("c1", "learning rate"), ("c2", "tokens of an update"))
    )
    picture = "".join(parts) + _table(timetable.stages)
    return panel("schedule", "Planned schedule", CAPTION, picture, legend=legend, wide=True)


def _table(stages: Sequence[Stage]) -> str:
    """The stages in figures: bands of a long run may be too narrow for their names."""
    if len(stages) == 1:
        return ""
    head = (
        "Stage",
        "Updates",
        "Tokens",
        "Tokens of an update",
        "Sequence",
        "Learning rate",
        "MTP",
        "RoPE base",
        "Blend",
    )
    return table(head, map(_row, stages), numeric=(1, 2, 3, 4, 5, 6, 7))


def _row(stage: Stage) -> tuple[str, ...]:
    shares = (f"{label} {float(share):.0%}" for label, share in shares_of(stage).items())
    return (
        escape(stage.name),
        f"{stage.first_step + 1:,}–{stage.last_step:,}",
        text.count(stage.tokens),
        _from_to(text.count, stage.ramp.first * stage.sequence_length, stage.ramp.last * stage.sequence_length),
        f"{stage.sequence_length:,}",
        _from_to(text.general, stage.curves[0].start, stage.curves[-1].end),
        text.general(stage.mtp_loss_factor) if stage.mtp_loss_factor else "off",
        text.general(stage.rope_theta),
        escape(", ".join(shares)),
    )


def _from_to(write: Callable[[float], str], first: float, last: float) -> str:
    return write(first) if first == last else f"{write(first)} → {write(last)}"


def _x(steps: int, step: float) -> float:
    return _LEFT + step / steps * (_WIDTH - _LEFT - _RIGHT)


def _updates(timetable: Timetable) -> list[int]:
    """Updates to draw: both ends of each stage, every change of batch, and enough between."""
    found = {start + 1 for start, _, _ in timetable.stretches()} | {start for start, _, _ in timetable.stretches()}
    for stage in timetable.stages:
        stride = max(1, stage.steps // _POINTS)
        found |= {*range(stage.first_step + 1, stage.last_step, stride), stage.last_step}
    return sorted(found - {0})


def _bands(timetable: Timetable, height: int) -> list[str]:
    parts = []
    for stage in timetable.stages if len(timetable.stages) > 1 else ():
        left, right = _x(timetable.steps, stage.first_step), _x(timetable.steps, stage.last_step)
        parts.append(
            f'<rect class="band{stage.index % 2}" x="{left:.1f}" width="{right - left:.1f}" y="{_TOP - 16}" '
            f'height="{height - _FOOT - _TOP + 16}"><title>{escape(_describe(stage))}</title></rect>'
        )
        if right - left > 7 * len(stage.name):
            parts.append(f'<text class="tick" x="{left + 4:.1f}" y="{_TOP - 4}">{escape(stage.name)}</text>')
    return parts


def _describe(stage: Stage) -> str:
    return f"{stage.name}: updates {stage.first_step + 1} to {stage.last_step}, {text.count(stage.tokens)} tokens"


def _plot(
    steps: int, points: Sequence[tuple[int, float]], unit: Callable[[float], str], colour: str, top: float
) -> list[str]:
    highest = max(value for _, value in points) * 1.05 or 1.0

    def y(value: float) -> float:
        return top + (1 - value / highest) * _PART

    parts = []
    for tick in linear_ticks(0, highest, 3):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}">{unit(tick)}</text>')
    path = "L".join(f"{_x(steps, step):.1f} {y(value):.1f}" for step, value in points)
    return [*parts, f'<path class="line {colour}" d="M{path}"/>']
