"""The training process: what every rank runs, from a recipe to its last step."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
import torch.distributed as dist

from megatron_joy.data.batch import Batch, BatchLoader, make_batch
from megatron_joy.data.caps import check_epochs
from megatron_joy.data.steps import BatchShape, micro_batch_indices, planned_indices
from megatron_joy.data.stream import SampleStream, open_streams
from megatron_joy.data.supply import Supply
from megatron_joy.errors import UserError
from megatron_joy.model.build import build_model
from megatron_joy.platform import process as processes
from megatron_joy.platform.process import Process
from megatron_joy.platform.rank import rank_info
from megatron_joy.platform.stop_request import StopRequest
from megatron_joy.recipe.schema import Recipe
from megatron_joy.recipe.timetable import Timetable
from megatron_joy.report.notify import check as check_notify
from megatron_joy.train.features.checkpointing import Checkpointing
from megatron_joy.train.features.experts import DeadExperts
from megatron_joy.train.features.guard import Guard
from megatron_joy.train.features.liveness import Liveness
from megatron_joy.train.features.metrics import Metrics
from megatron_joy.train.features.notify import Notify
from megatron_joy.train.features.profiler import Profiler
from megatron_joy.train.features.recheck import Recheck
from megatron_joy.train.features.rollback import Rollback
from megatron_joy.train.features.signals import StopOnSignal
from megatron_joy.train.features.staging import StageSettings
from megatron_joy.train.features.statistics import Statistics
from megatron_joy.train.features.stopwatch import Stopwatch
from megatron_joy.train.features.stragglers import Stragglers
from megatron_joy.train.features.terminal import Terminal
from megatron_joy.train.features.usage import Usage, peak_flops
from megatron_joy.train.features.validation import Validation
from megatron_joy.train.features.weights_and_biases import WeightsAndBiases, check_wandb
from megatron_joy.train.logs import RankLog
from megatron_joy.train.loop import Loop, train
from megatron_joy.train.moments import Feature
from megatron_joy.train.phases import DATA
from megatron_joy.train.resume import Past, look_back
from megatron_joy.train.run import Run, open_run, recorded
from megatron_joy.train.step import Trainer


def pretrain(recipe: Recipe, stop: StopRequest | None = None) -> bool:
    """Trains a recipe in the launched world; True when all steps are done, False when `stop` was asked for.

    A run folder with checkpoints is gone on with. Raises UserError for what the user can mend (data, layout, a changed
    recipe) before anything is trained or written, WorkError when the work itself fails.
    """
    check_notify(recipe.run.notify)
    check_wandb(recipe)
    torch.set_num_threads(_threads(recipe))
    process = processes.start(recipe.layout, recipe.seed)
    with RankLog() as log, ExitStack() as opened:
        run = open_run(recipe, process)
        past = look_back(run)
        train_stream, validation_stream = _open_data(run, opened)
        past.check_sources(train_stream.labels, train_stream.tokenizer_sha256)
        trainer = Trainer(recipe, process, build_model(recipe, process))
        past.load(run, trainer)
        opened.enter_context(recorded(run))
        log.open(run)
        supply = opened.enter_context(Supply(partial(_loader, run, train_stream), run.progress.step))
        guard = Guard(Rollback(train_stream, supply))
        features = _features(run, train_stream, validation_stream, stop or StopRequest(), past, guard)
        loop = Loop(run, trainer, features, past.notes)
        train(loop, trainer.phases.timed(supply, DATA))
    # Not after an error: ranks that are gone can't take leave.
    processes.stop()
    return loop.done


def _threads(recipe: Recipe) -> int:
    if recipe.train.threads:
        return recipe.train.threads
    return max(1, (os.cpu_count() or 1) // rank_info().local_world_size)


def _open_data(run: Run, opened: ExitStack) -> tuple[SampleStream, SampleStream | None]:
    """Opens the streams on every rank; rank 0 alone looks at every shard's size, and all hear what it found."""
    recipe, process = run.recipe, run.process
    if not recipe.data.train:
        raise UserError("data.train: no source is given, expected at least one; add [[data.train]] with a manifest")
    check_epochs(recipe)
    train_stream, validation_stream = open_streams(recipe, run.ledger)
    streams = [stream for stream in (train_stream, validation_stream) if stream is not None]
    for stream in streams:
        opened.callback(stream.close)
    problem: list[str | None] = [None]
    if process.is_first_rank:
        try:
            for stream in streams:
                stream.check_sizes()
            train_stream.check_documents(_wanted_documents(recipe, run.progress.step))
        except UserError as error:
            problem[0] = str(error)
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])
    return train_stream, validation_stream


def _wanted_documents(recipe: Recipe, done: int) -> list[tuple[str, str, int]]:
    """(key, source, tokens of its longest document) that stages ask for which are not over yet."""
    return [
        (f"stages.{stage.index}.min_longest_document", label, stage.min_longest_document)
        for stage in Timetable(recipe).stages
        if stage.min_longest_document and stage.last_step > done
        for label, _ in stage.blend
    ]


def _loader(run: Run, stream: SampleStream, done: int) -> BatchLoader:
    recipe = run.recipe
    deal = partial(
        planned_indices,
        timetable=Timetable(recipe),
        ledger=run.ledger,
        data_parallel_size=recipe.layout.data_parallel_size,
        data_parallel_rank=run.process.groups.dp.rank(),
    )
    return BatchLoader(stream, deal, recipe.data.document_mask, first_step=done, last_step=recipe.train.steps)


def _validation_batches(recipe: Recipe, process: Process, stream: SampleStream) -> list[Batch]:
    """This rank's micro-batches of validation samples 0 .. validation_samples - 1."""
    shape = BatchShape(recipe.train.validation_samples, recipe.train.micro_batch_size, recipe.layout.data_parallel_size)
    return [
        make_batch([stream.sample(k) for k in samples], recipe.data.document_mask, stream.eod_id)
        for samples in micro_batch_indices(0, shape, process.groups.dp.rank())
    ]


def _features(
    run: Run,
    train_stream: SampleStream,
    validation_stream: SampleStream | None,
    stop: StopRequest,
    past: Past,
    guard: Guard,
) -> Sequence[Feature]:
    """In the order in which a step's end needs them: what adds to the row, the row, the guard, the checkpoint."""
    recipe = run.recipe
    guards = recipe.guards
    features: list[Feature] = [Liveness(run), StageSettings(), Stopwatch()]
    if guards.straggler_interval and recipe.layout.world_size > 1:
        features.append(Stragglers(guards.straggler_interval, guards.straggler_factor))
    features.append(StopOnSignal(stop))
    if recipe.run.profile_steps and run.process.info.rank in recipe.run.profile_ranks:
        features.append(Profiler(run.folder, run.process.info.rank, recipe.run.profile_steps))
    if validation_stream is not None and recipe.train.validation_interval:
        batches = _validation_batches(recipe, run.process, validation_stream)
        features.append(Validation(batches, recipe.train.validation_interval, recipe.train.acceptance_passes))
    if recipe.run.notify.wanted:
        features.append(Notify(recipe.run.notify))
    features.append(Usage(recipe, peak_flops(recipe, run.process.device)))
    if run.process.is_first_rank:
        features += [Metrics(run, train_stream, past.name), Terminal(past.name)]
        features += [WeightsAndBiases(run)] if recipe.run.wandb_project is not None else []
        if recipe.run.dead_expert_steps:
            features.append(DeadExperts(recipe.run.dead_expert_steps, recipe.model.first_k_dense_replace))
    if guards.recheck_interval:
        features.append(Recheck(guards.recheck_interval))
    if guards.statistics_interval:
        features.append(Statistics(run, guards.statistics_interval))
    features.append(guard)
    features.append(Checkpointing(run, past.sources | train_stream.labels, train_stream.tokenizer_sha256))
    return features
