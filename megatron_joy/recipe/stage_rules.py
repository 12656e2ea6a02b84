"""What must hold between a recipe's stages, and between each stage and the rest of the recipe."""

import difflib
from collections.abc import Callable, Iterator

from .dump import format_value
from .schema import Recipe, StageSection
from .timetable import Timetable

Check = Callable[[Recipe, int, StageSection], Iterator[str]]


def _length(recipe: Recipe, index: int, stage: StageSection) -> Iterator[str]:
    key = f"stages.{index}"
    if stage.steps is None and stage.tokens is None:
        yield f"{key}.tokens: missing; say how long the stage is, in tokens or in steps"
    if stage.steps is not None and stage.tokens is not None:
        yield (
            f"{key}.steps = {stage.steps}: the stage has tokens = {stage.tokens} as well, and one of them says how "
            "long it is; leave steps out"
        )


def _ramp(recipe: Recipe, index: int, stage: StageSection) -> Iterator[str]:
    key, first, increment = f"stages.{index}", stage.ramp_from, stage.ramp_increment
    last = stage.global_batch_size or recipe.train.global_batch_size
    if first is None and increment is not None:
        yield f"{key}.ramp_increment = {increment}: has no effect without ramp_from; leave it out"
    if first is None:
        return
    if first >= last:
        yield f"{key}.ramp_from = {first}: must be below the stage's global batch of {last}; leave it out for no ramp"
    elif increment is None:
        yield f"{key}.ramp_increment: missing beside ramp_from = {first}; set {key}.ramp_increment = {_step(recipe)}"
    elif (last - first) % increment and not first % _step(recipe) and not increment % _step(recipe):
        yield (
            f"{key}.ramp_increment = {increment}: must divide the way from {first} to {last}, {last - first}; "
            f"set {key}.ramp_from = {last - max(1, (last - first) // increment) * increment}"
        )


def _step(recipe: Recipe) -> int:
    return recipe.train.micro_batch_size * recipe.layout.data_parallel_size


def _rate(recipe: Recipe, index: int, stage: StageSection) -> Iterator[str]:
    key = f"stages.{index}"
    if index == 0 and stage.start_lr is None:
        yield f"{key}.start_lr: missing, no stage goes before; set {key}.start_lr = 0.0 to warm up or the rate to hold"
    if stage.lr_shape == "constant" and stage.end_lr is not None:
        yield (
            f'{key}.end_lr = {stage.end_lr}: has no effect with lr_shape = "constant"; set {key}.lr_shape = "cosine" '
            "or leave end_lr out"
        )
    if stage.lr_shape != "constant" and stage.end_lr is None:
        yield f'{key}.end_lr: missing beside lr_shape = "{stage.lr_shape}"; set the rate of the stage\'s last step'
    if index == 0 and stage.lr_shape == "constant" and stage.start_lr == 0:
        yield f'{key}.start_lr = 0.0: trains nothing; set {key}.lr_shape = "linear" and {key}.end_lr, or a rate to hold'


def _blend(recipe: Recipe, index: int, stage: StageSection) -> Iterator[str]:
    labels = [source.label for source in recipe.data.train]
    seen: set[str] = set()
    for number, entry in enumerate(stage.blend):
        key = f"stages.{index}.blend.{number}"
        if entry.source not in labels:
            near = difflib.get_close_matches(entry.source, labels, n=1, cutoff=0.0)
            fix = f"the nearest is {format_value(near[0])}" if near else "name one in [[data.train]]"
            yield f"{key}.source = {format_value(entry.source)}: is no source of data.train; {fix}"
        if entry.source in seen:
            yield f"{key}.source = {format_value(entry.source)}: is in the blend twice; keep one with both weights"
        seen.add(entry.source)
    if len(stage.blend) == 1 and stage.blend[0].weight != 1.0:
        yield (
            f"stages.{index}.blend.0.weight = {stage.blend[0].weight}: has no effect, it is the only source; leave "
            "weight out"
        )


def _mtp(recipe: Recipe, index: int, stage: StageSection) -> Iterator[str]:
    if stage.mtp_loss_factor is not None and recipe.model.num_nextn_predict_layers == 0:
        yield (
            f"stages.{index}.mtp_loss_factor = {stage.mtp_loss_factor}: has no effect with "
            "model.num_nextn_predict_layers = 0, there is no MTP layer; leave it out"
        )


def _long_documents(recipe: Recipe, index: int, stage: StageSection) -> Iterator[str]:
    length = stage.sequence_length or recipe.data.sequence_length
    if stage.min_longest_document is not None and stage.min_longest_document < 2:
        yield (
            f"stages.{index}.min_longest_document = {stage.min_longest_document}: every document has that, it has no "
            f"effect; set {length}"
        )


def _name(recipe: Recipe, index: int, stage: StageSection) -> Iterator[str]:
    first = next(i for i, other in enumerate(recipe.stages) if other.name == stage.name)
    if first != index:
        yield f"stages.{index}.name = {format_value(stage.name)}: is already stages.{first}; give it another name"


EACH: tuple[Check, ...] = (_name, _length, _ramp, _rate, _blend, _mtp, _long_documents)


def _unused_sources(recipe: Recipe) -> Iterator[str]:
    if any(not stage.blend for stage in recipe.stages):
        return
    named = {entry.source for stage in recipe.stages for entry in stage.blend}
    for number, source in enumerate(recipe.data.train):
        if source.label not in named:
            yield (
                f"data.train.{number} ({source.label}): has no effect, no stage's blend names it; name it in one or "
                "leave it out"
            )
        elif source.weight != 1.0:
            yield f"data.train.{number}.weight = {source.weight}: has no effect, every stage has a blend; leave it out"


def _unused_keys(recipe: Recipe) -> Iterator[str]:
    """What all stages say for themselves; two of the keys serve validation too."""
    validates = bool(recipe.data.validation and recipe.train.validation_interval)
    for section, key, validation in (
        ("data", "sequence_length", True),
        ("train", "global_batch_size", False),
        ("train", "micro_batch_size", True),
    ):
        values = [getattr(stage, key) for stage in recipe.stages]
        common = getattr(getattr(recipe, section), key)
        if None in values or (validation and validates) or common == values[0]:
            continue
        yield (
            f"{section}.{key} = {common}: has no effect, every stage has its own {key}; set {section}.{key} = "
            f"{values[0]} and leave it out of stages.0"
        )


def sum_problem(recipe: Recipe, known: bool = True) -> list[str]:
    """What is wrong with the sum of stages that are sound by themselves; known: whether train.steps has a value."""
    timetable = Timetable(recipe)
    if known and timetable.steps == recipe.train.steps:
        return []
    parts = " + ".join(str(stage.steps) for stage in timetable.stages)
    found = f"train.steps = {recipe.train.steps}" if known else "train.steps"
    return [
        f"{found}: the stages have {parts} = {timetable.steps} updates "
        f"({timetable.tokens:,} tokens); set train.steps = {timetable.steps}"
    ]


def _validation_names(recipe: Recipe) -> Iterator[str]:
    for number, source in enumerate(recipe.data.validation):
        if source.name is not None:
            yield (
                f"data.validation.{number}.name = {format_value(source.name)}: has no effect, stages name sources of "
                "data.train only; leave it out"
            )


def _last_stage(recipe: Recipe) -> Iterator[str]:
    name, names = recipe.run.last_stage, [stage.name for stage in recipe.stages]
    if not name or name in names:
        return
    found = f"run.last_stage = {format_value(name)}"
    if not names:
        yield f"{found}: has no effect, the recipe has no [[stages]]; leave it out"
        return
    near = difflib.get_close_matches(name, names, n=1)
    yield f"{found}: is no stage; {f'the nearest is {near[0]}' if near else f'stages are {chr(44).join(names)}'}"


def stage_problems(recipe: Recipe) -> list[str]:
    """All that is wrong with the stages of a derived recipe, but for their sum."""
    found = [
        problem
        for index, stage in enumerate(recipe.stages)
        for check in EACH
        for problem in check(recipe, index, stage)
    ]
    found += [*_validation_names(recipe), *_last_stage(recipe)]
    found += [*_unused_sources(recipe), *_unused_keys(recipe)] if recipe.stages else []
    return found


def stage_views(recipe: Recipe) -> Iterator[tuple[Recipe, dict[str, str]]]:
    """The recipe as each stage has it, at each end of its ramp, and what the keys that the stage sets are called.

    For the rules that hold a sequence length or a batch against the layout.
    """
    for index, stage in enumerate(recipe.stages):
        own = {
            "data.sequence_length": ("sequence_length", stage.sequence_length),
            "train.micro_batch_size": ("micro_batch_size", stage.micro_batch_size),
            "train.global_batch_size": ("global_batch_size", stage.global_batch_size),
        }
        batches = [("global_batch_size", stage.global_batch_size)]
        batches += [("ramp_from", stage.ramp_from), ("ramp_increment", stage.ramp_increment)] if stage.ramp_from else []
        for key, size in batches:
            changes = own | {"train.global_batch_size": (key, size)}
            yield _with(recipe, changes), {k: f"stages.{index}.{v[0]}" for k, v in changes.items() if v[1] is not None}


def _with(recipe: Recipe, changes: dict[str, tuple[str, int | None]]) -> Recipe:
    for key, (_, value) in changes.items():
        section, _, name = key.partition(".")
        if value is not None:
            changed = getattr(recipe, section).model_copy(update={name: value})
            recipe = recipe.model_copy(update={section: changed})
    return recipe
