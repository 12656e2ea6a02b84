"""Time by phase, memory by kind and MFU are what they say."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gloo import run_world
from tests.parallel.worlds import uneven_recipe

SPANS = {"forward-backward", "interval-time"}  # timers around others


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    from megatron_joy.train import phases

    made = Clock()
    monkeypatch.setattr(phases.time, "perf_counter", made.perf_counter)
    return made


def test_a_phase_inside_another_stops_the_outer_ones_hand(clock: Clock) -> None:
    from megatron_joy.train.phases import Phases

    phases = Phases()
    clock.now += 7  # in no phase
    with phases("optimizer"):
        clock.now += 1
        with phases("communication"):
            clock.now += 4
        clock.now += 2
    assert phases.take() == dict.fromkeys(phases.take(), 0.0) | {"optimizer": 3.0, "communication": 4.0}
    with phases(None), phases("forward"):
        clock.now += 0.5
    assert phases.take()["forward"] == 0.5
    assert set(phases.take().values()) == {0.0}


def test_a_validation_is_one_phase_whatever_it_runs(clock: Clock) -> None:
    from megatron_joy.train.phases import Phases, Timers

    phases = Phases()
    timer = Timers(phases)("forward-compute", log_level=2)
    with phases("validation"):
        timer.start()
        clock.now += 3
        timer.stop()
    timer.start(barrier=True)
    clock.now += 2
    timer.stop()
    taken = phases.take()
    assert (taken["validation"], taken["forward"]) == (3.0, 2.0)


def test_waiting_for_batches_is_data_and_what_is_done_with_them_is_not(clock: Clock) -> None:
    from megatron_joy.train.phases import Phases

    def slow() -> Iterator[int]:
        for number in range(3):
            clock.now += 1
            yield number

    phases, seen = Phases(), []
    for number in phases.timed(slow(), "data"):
        clock.now += 10
        seen.append(number)
    assert seen == [0, 1, 2]
    assert phases.take()["data"] == 3.0


def timers_of(path: Path) -> set[str]:
    """Names of the timers that a file of Megatron-core starts."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {
        call.args[0].value
        for call in calls
        if ast.unparse(call.func).endswith("timers") and call.args and isinstance(call.args[0], ast.Constant)
    }


def test_every_timer_of_megatron_core_has_a_phase() -> None:
    import megatron.core

    from megatron_joy.train.phases import phase_of

    root = Path(megatron.core.__path__[0])
    files = (
        "pipeline_parallel/schedules.py",
        "pipeline_parallel/p2p_communication.py",
        "optimizer/optimizer.py",
        "optimizer/distrib_optimizer.py",
        "distributed/finalize_model_grads.py",
    )
    names = set().union(*(timers_of(root / file) for file in files))
    found = {name: phase_of(name) for name in names - SPANS}
    assert {"forward-compute", "backward-compute", "all-grads-sync", "params-all-gather"} <= set(found)
    assert None not in found.values()
    assert found["forward-recv"] == found["embedding-grads-all-reduce"] == found["params-all-gather"] == "communication"
    assert found["optimizer-inner-step"] == "optimizer"


def _memory(recipe: Any) -> tuple[dict[str, int], dict[str, int]]:
    from megatron_joy.model.build import build_model
    from megatron_joy.optim.build import parts
    from megatron_joy.platform import process as processes
    from megatron_joy.train.memory import largest_memory, memory_of_rank
    from megatron_joy.train.step import Trainer

    process = processes.start(recipe.layout, recipe.seed)
    trainer = Trainer(recipe, process, build_model(recipe, process))
    for part in parts(trainer.optimizer):
        part._init_optimizer_states_with_dummy_values()
    return memory_of_rank(trainer), largest_memory(trainer)


def test_memory_by_kind_is_what_the_plan_counts_to_the_byte() -> None:
    from megatron_joy.parallel.states import rank_states

    recipe = uneven_recipe({"data_parallel_size": 2, "expert_model_parallel_size": 2}, "bf16")
    ranks = run_world(_memory, 2, recipe)
    for rank, (mine, largest) in enumerate(ranks):
        planned = rank_states(recipe, rank)
        assert (mine["parameters"], mine["gradients"], mine["optimizer"]) == (
            planned.parameters,
            planned.gradients,
            planned.optimizer,
        )
        assert mine["peak"] > 50e6  # Python and torch alone
        assert largest == {kind: max(one[kind] for one, _ in ranks) for kind in mine} | {"peak": largest["peak"]}


def test_mfu_is_model_flops_over_the_given_peak_and_unknown_without_one() -> None:
    import torch

    from megatron_joy.parallel import flops
    from megatron_joy.train.features.usage import Usage, peak_flops
    from megatron_joy.train.phases import Phases

    recipe = uneven_recipe({"data_parallel_size": 2, "expert_model_parallel_size": 2})
    given = recipe.model_copy(update={"run": recipe.run.model_copy(update={"peak_tflops": 0.5})})
    assert peak_flops(given, torch.device("cpu")) == 0.5e12
    assert peak_flops(recipe, torch.device("cpu")) is None
    for peak, factor in ((0.5e12, 0.1), (None, 0.0)):
        loop = SimpleNamespace(
            plan=SimpleNamespace(stage=SimpleNamespace(mtp_loss_factor=factor)),
            row={"tokens_per_second": 3000.0},
            trainer=SimpleNamespace(phases=Phases()),
            run=SimpleNamespace(progress=SimpleNamespace(step=1)),
            done=False,
        )
        feature = Usage(recipe.model_copy(update={"train": recipe.train.model_copy(update={"log_interval": 7})}), peak)
        feature.after_step(loop, SimpleNamespace(keys_per_token=11.5))  # type: ignore[arg-type]
        cost = flops.per_token(recipe, 11.5, with_mtp=factor > 0)
        assert loop.row["tokens_per_second_per_device"] == 1500.0
        assert loop.row["model_flops_per_token"] == cost
        assert loop.row["mfu"] == (None if peak is None else pytest.approx(1500 * cost / 0.5e12))
        assert "peak_bytes" not in loop.row


def test_the_peak_is_that_of_the_very_device() -> None:
    from megatron_joy.parallel.gpus import peak_of_device

    assert peak_of_device("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_of_device("NVIDIA H100 PCIe") is None  # a slower form of the chip
