"""The ledger of a run: which samples its updates have, and which updates a guard left out.

Sample k of a run follows from the ledger, and so does the first sample of update u. An entry says what the recipe
planned from its step on; it holds until the next one begins. There are three reasons for a new one: the run begins, a
recipe whose blend was edited goes on, or a guard goes back to before a spike and leaves its samples out. In each case
what was read stays what it was, and every source goes on where it stopped. Checkpoints keep the ledger; the run's
folder has a copy, which is written before a guard's decision is carried out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_joy.errors import UserError

from .schema import Recipe
from .timetable import Shares, Timetable

LEDGER_FILE = "ledger.json"  # in a run's folder


@dataclass(frozen=True)
class Stretch:
    """Consecutive samples of the run, from `start`, that have one length and one blend."""

    start: int
    samples: int
    sequence_length: int
    blend: Shares


@dataclass(frozen=True)
class Entry:
    """What was planned after `from_step` updates: the next one's first sample is `from_sample`.

    skipped: updates from then on that were computed and not made, by number. reason: why a guard made this entry; empty
    for the recipe's own.
    """

    from_step: int
    from_sample: int
    stretches: tuple[Stretch, ...]
    skipped: tuple[int, ...] = ()
    reason: str = ""


Ledger = tuple[Entry, ...]  # in the order in which the entries were made; their samples ascend, their steps may not


def begin(recipe: Recipe) -> Ledger:
    """The ledger of a run that follows this recipe from its start."""
    return (Entry(0, 0, _planned(recipe, 0, 0)),)


def _planned(recipe: Recipe, step: int, sample: int) -> tuple[Stretch, ...]:
    """The recipe's stretches after `step` updates where the next one's first sample is `sample`."""
    timetable = Timetable(recipe)
    first = timetable.samples_before(step)
    stretches: list[Stretch] = []
    for stage in timetable.stages:
        start, end = max(stage.first_sample, first), stage.first_sample + stage.samples
        if end <= start:
            continue
        last = stretches[-1] if stretches else None
        # A stage that changes neither length nor blend goes on in the same cycle of slots.
        if last and (last.sequence_length, last.blend) == (stage.sequence_length, stage.blend):
            stretches[-1] = Stretch(last.start, end - last.start, last.sequence_length, last.blend)
        else:
            stretches.append(Stretch(start, end - start, stage.sequence_length, stage.blend))
    return tuple(replace(stretch, start=stretch.start + sample - first) for stretch in stretches)


def entry_of(ledger: Ledger, update: int) -> Entry:
    """The entry that update `update` (from 1) follows: the newest that begins before it."""
    return next(entry for entry in reversed(ledger) if entry.from_step < update)


def first_sample(ledger: Ledger, timetable: Timetable, update: int) -> int:
    """The first sample of an update: the timetable's, moved by what was left out before it."""
    entry = entry_of(ledger, update)
    return entry.from_sample + timetable.samples_before(update - 1) - timetable.samples_before(entry.from_step)


def is_skipped(ledger: Ledger, update: int) -> bool:
    """Whether an update was, or is to be, computed and not made."""
    return update in entry_of(ledger, update).skipped


def with_skipped(ledger: Ledger, update: int) -> Ledger:
    """The ledger with one update more that isn't made."""
    mine = entry_of(ledger, update)
    changed = replace(mine, skipped=tuple(sorted({*mine.skipped, update})))
    return tuple(changed if entry is mine else entry for entry in ledger)


def skipped_updates(ledger: Ledger) -> list[int]:
    """The updates that are not made, ascending; those that a later going back has undone are not among them."""
    return sorted(update for entry in ledger for update in entry.skipped if entry_of(ledger, update) is entry)


def rollbacks(ledger: Ledger) -> int:
    """How often a guard went back."""
    return sum(bool(entry.reason) for entry in ledger)


def with_rollback(ledger: Ledger, recipe: Recipe, first: int, last: int, reason: str) -> Ledger:
    """The ledger after going back to before update `first` and leaving out all samples up to update `last`'s.

    Updates before `first` are made again as they were; `first` goes on with what `last`'s successor would have read.
    """
    timetable = Timetable(recipe)
    sample = first_sample(ledger, timetable, last) + timetable.at(last).global_batch_size
    return (*ledger, Entry(first - 1, sample, _planned(recipe, first - 1, sample), reason=reason))


def follows(ledger: Ledger, recipe: Recipe) -> bool:
    """Whether the newest entry is what the recipe plans from there on."""
    newest = ledger[-1]
    planned = _planned(recipe, newest.from_step, newest.from_sample)
    return bool(planned) and _order(newest.stretches, 0) == _order(planned, 0)


def outdated(then: Ledger, step: int, now: Ledger) -> bool:
    """Whether a checkpoint of `step` updates with ledger `then` has updates that the run has gone back on since."""
    known = {(entry.from_step, entry.from_sample) for entry in then}
    return any(
        entry.reason and entry.from_step < step and (entry.from_step, entry.from_sample) not in known for entry in now
    )


def decides_after(ledger: Ledger, step: int) -> bool:
    """Whether a guard's decision changes anything after the first `step` updates."""
    back = any(entry.reason and entry.from_step >= step for entry in ledger)
    return back or any(update > step for update in skipped_updates(ledger))


def go_on(ledger: Ledger, recipe: Recipe, step: int) -> Ledger:
    """The ledger for going on after `step` updates under a recipe: the same, or with an entry more.

    A guard's decisions about later updates hold as long as the recipe is the one that they were made under; an edit
    makes these updates other ones.
    """
    if decides_after(ledger, step) and follows(ledger, recipe):
        return ledger
    ledger = tuple(
        replace(entry, skipped=tuple(update for update in entry.skipped if update <= step))
        for i, entry in enumerate(ledger)
        if i == 0 or not (entry.reason and entry.from_step >= step)
    )
    sample = first_sample(ledger, Timetable(recipe), step + 1)
    stretches = _planned(recipe, step, sample)
    if not stretches or _order(in_force(ledger), sample) == _order(stretches, 0):
        return ledger
    kept = tuple(entry for entry in ledger if entry.from_step < step)
    return (*kept, Entry(step, sample, stretches))


def _order(stretches: Sequence[Stretch], first: int) -> list[tuple[int, int, Shares]]:
    """What decides the order from sample `first` on: beginnings, lengths, blends."""
    return [
        (max(stretch.start, first), stretch.sequence_length, stretch.blend)
        for stretch, after in zip(stretches, [*stretches[1:], None], strict=True)
        if after is None or after.start > first
    ]


def in_force(ledger: Ledger) -> list[Stretch]:
    """Each entry's stretches as far as they were read, or will be: cut where the next entry begins."""
    found: list[Stretch] = []
    for entry, after in zip(ledger, (*ledger[1:], None), strict=True):
        for stretch in entry.stretches:
            end = stretch.start + stretch.samples
            end = end if after is None else min(end, after.from_sample)
            if end > stretch.start:
                found.append(Stretch(stretch.start, end - stretch.start, stretch.sequence_length, stretch.blend))
    return found


def planned_tokens(ledger: Ledger) -> Mapping[str, Mapping[int, Fraction]]:
    """For each source the tokens at each sequence length, by the plan of the entry that named it first.

    These decide which part of a source is read at which length (`data.cut`), so they must not change later.
    """
    found: dict[str, dict[int, Fraction]] = {}
    for entry in ledger:
        new: dict[str, dict[int, Fraction]] = {}
        for stretch in entry.stretches:
            total = sum(Fraction(repr(weight)) for _, weight in stretch.blend)
            for label, weight in stretch.blend:
                tokens = Fraction(repr(weight)) / total * stretch.samples * stretch.sequence_length
                lengths = new.setdefault(label, {})
                lengths[stretch.sequence_length] = lengths.get(stretch.sequence_length, Fraction(0)) + tokens
        found |= {label: lengths for label, lengths in new.items() if label not in found}
    return found


def as_json(ledger: Ledger) -> list[dict[str, Any]]:
    """Plain values, read back by `from_json`."""
    return [asdict(entry) for entry in ledger]


def from_json(value: Any) -> Ledger:
    """A ledger from `as_json`'s values. Raises UserError for anything else."""
    try:
        return tuple(
            Entry(
                int(entry["from_step"]),
                int(entry["from_sample"]),
                tuple(
                    Stretch(
                        int(stretch["start"]),
                        int(stretch["samples"]),
                        int(stretch["sequence_length"]),
                        tuple((str(label), float(weight)) for label, weight in stretch["blend"]),
                    )
                    for stretch in entry["stretches"]
                ),
                tuple(int(update) for update in entry["skipped"]),
                str(entry["reason"]),
            )
            for entry in value
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"ledger: not a run's ledger ({type(error).__name__}: {error}); resume from another checkpoint"
        ) from None


def read_ledger(run_folder: Path) -> Ledger | None:
    """The ledger in a run's folder, None where there is none yet. Raises UserError for a damaged one."""
    path = run_folder / LEDGER_FILE
    return load_ledger(path) if path.is_file() else None


def load_ledger(path: Path) -> Ledger:
    """The ledger in a file. Raises UserError when there is none, or a damaged one."""
    try:
        return from_json(json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"guards.ledger: {path} can't be read ({error.strerror}); name a run's {LEDGER_FILE}") from None
    except ValueError as error:
        raise UserError(
            f"{path}: not JSON ({error}); move it away: the run goes on with the newest checkpoint's"
        ) from None


def check_history(old: Recipe, new: Recipe, done: int) -> None:
    """Refuses a recipe under which the first `done` updates of `old`'s run would have been other ones.

    Blends are the ledger's business; learning rates and loss factors of what is done don't matter any more. Raises
    UserError that names the first update that differs.
    """
    before, after = _alike(Timetable(old), done), _alike(Timetable(new), done)
    if before == after:
        return
    starts = sorted({start for start, *_ in before} | {start for start, *_ in after})
    first = next(start for start in starts if _text(before, start) != _text(after, start))
    raise UserError(
        f"cannot resume {new.run.folder}: update {first + 1} was trained with {_text(before, first)} and the recipe "
        f"now has {_text(after, first)} there; what {done} updates have done can't change: put it back, or "
        "add the change as a stage that begins later"
    )


Alike = list[tuple[int, int, int, float]]  # updates before it, samples, sequence length, base of rotary positions


def _alike(timetable: Timetable, done: int) -> Alike:
    found: Alike = []
    for start, size, stage in timetable.stretches():
        kind = (size, stage.sequence_length, stage.rope_theta)
        if start < done and (not found or found[-1][1:] != kind):
            found.append((start, *kind))
    return found if done <= timetable.steps else [*found, (timetable.steps, 0, 0, 0.0)]


def _text(stretches: Alike, step: int) -> str:
    _, size, length, base = max(stretch for stretch in stretches if stretch[0] <= step)
    return f"{size} x {length} tokens and rotary base {base:g}" if size else "nothing (it is over)"
