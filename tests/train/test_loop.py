"""The loop: moments in order, every feature closed, no collective after an error, and it reads as the algorithm."""

import ast
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.gloo import WorldFailed, run_world
from tests.train.minuscule import EP2, joy, read_lines

ROOT = Path(__file__).parents[2]
LONGEST_LOOP = 80


@dataclass
class FakeTrainer:
    """Steps without a model."""

    timetable: Any
    phases: Any

    def step(self, number: int, batches: Sequence[Any]) -> Any:
        """The number and what was computed on."""
        return number, batches


def make_loop(features: Sequence[Any], steps: int = 2, notes: Sequence[str] = (), stages: Sequence[Any] = ()) -> Any:
    """A loop over fakes."""
    from megatron_joy.recipe import Recipe
    from megatron_joy.recipe.timetable import Timetable
    from megatron_joy.train.loop import Loop
    from megatron_joy.train.phases import Phases
    from megatron_joy.train.run import Progress, Run
    from tests.data.tiny_shards import recipe_table

    table = recipe_table([], 4, steps=steps, global_batch_size=2, micro_batch_size=1)
    recipe = Recipe.model_validate(table | {"stages": list(stages)})
    run = Run(recipe, None, Path("nowhere"), 0, Progress())  # type: ignore[arg-type]
    return Loop(run, FakeTrainer(Timetable(recipe), Phases()), features, notes)  # type: ignore[arg-type]


def numbered() -> Iterator[list[Any]]:
    """A name for each step's batches."""
    for number in range(1, 100):
        yield [f"batch {number}"]


def recorder(name: str, heard: list[str], fails_at: str = "") -> Any:
    """A feature that writes down every moment, and raises at one."""
    from megatron_joy.train.moments import Feature

    moments = [m for m, _ in inspect.getmembers(Feature, inspect.isfunction) if not m.startswith("_")]

    class Recorder(Feature):
        pass

    def noting(moment: str) -> Any:
        def note(self: Any, *arguments: Any) -> None:
            said = [str(a) for a in arguments if isinstance(a, str | BaseException | tuple)]
            heard.append(" ".join([name, moment, *said]))
            if moment == fails_at:
                raise ArithmeticError(f"{name} fails at {moment}")

        return note

    for moment in moments:
        setattr(Recorder, moment, noting(moment))
    return Recorder()


def test_moments_come_in_order_and_to_each_feature_in_turn() -> None:
    from megatron_joy.train.loop import train

    heard: list[str] = []
    loop = make_loop([recorder("a", heard), recorder("b", heard)], notes=["a note"])
    train(loop, numbered())
    assert heard == [
        "a on_start",
        "b on_start",
        "a on_note a note",
        "b on_note a note",
        "a on_stage_change",
        "b on_stage_change",
        "a before_step",
        "b before_step",
        "a after_step (1, ['batch 1'])",
        "b after_step (1, ['batch 1'])",
        "a before_step",
        "b before_step",
        "a after_step (2, ['batch 2'])",
        "b after_step (2, ['batch 2'])",
        "a on_finish",
        "b on_finish",
        "b close",
        "a close",
    ]
    assert loop.done
    assert (loop.run.progress.step, loop.run.progress.samples, loop.run.progress.tokens) == (2, 4, 16)


@pytest.mark.parametrize("moment", ["on_start", "before_step", "after_step", "on_finish"])
def test_an_error_at_any_moment_is_told_to_all_and_all_are_closed(moment: str) -> None:
    from megatron_joy.train.loop import train

    heard: list[str] = []
    features = [recorder("a", heard), recorder("b", heard, fails_at=moment), recorder("c", heard)]
    with pytest.raises(ArithmeticError, match=f"b fails at {moment}"):
        train(make_loop(features), numbered())
    assert heard[-6:] == [
        *(f"{name} on_error b fails at {moment}" for name in "abc"),
        *(f"{name} close" for name in "cba"),
    ]


def test_a_feature_that_fails_at_failing_hides_nothing_and_keeps_nobody_from_closing() -> None:
    from megatron_joy.train.loop import train

    heard: list[str] = []
    features = [recorder("a", heard, "on_error"), recorder("b", heard, "after_step"), recorder("c", heard, "close")]
    with pytest.raises(ArithmeticError) as raised:
        train(make_loop(features), numbered())
    chain = [str(raised.value), str(raised.value.__context__)]
    assert "b fails at after_step" in chain
    assert [entry for entry in heard if entry.endswith("close")] == ["c close", "b close", "a close"]
    assert sum("on_error b fails at after_step" in entry for entry in heard) == 3


def test_a_wish_to_stop_ends_the_loop_after_the_step() -> None:
    from megatron_joy.train.loop import train
    from megatron_joy.train.moments import Feature

    class StopsAtThree(Feature):
        def after_step(self, loop: Any, result: Any) -> None:
            loop.wants_stop = result[0] == 3

    heard: list[str] = []
    loop = make_loop([StopsAtThree(), recorder("a", heard)], steps=9)
    train(loop, numbered())
    assert loop.run.progress.step == 3
    assert not loop.done
    assert heard[-2:] == ["a on_finish", "a close"]


def _rank_1_fails(folder: Path) -> None:
    """A feature on rank 1 raises after step 3; from then on its rank's collectives are written down."""
    import torch.distributed as dist

    from megatron_joy.train import pretrain
    from megatron_joy.train.moments import Feature

    collectives = ["all_reduce", "broadcast", "barrier", "all_gather_object", "broadcast_object_list", "all_gather"]

    def watched(name: str) -> Any:
        issue = getattr(dist, name)

        def then(*arguments: Any, **more: Any) -> Any:
            (folder / f"collective_{name}").touch()
            return issue(*arguments, **more)

        return then

    class Fails(Feature):
        def after_step(self, loop: Any, result: Any) -> None:
            if os.environ["RANK"] == "1" and loop.run.progress.step == 3:
                for name in collectives:
                    setattr(dist, name, watched(name))
                raise ArithmeticError("seven is odd")

        def close(self) -> None:
            (folder / f"closed_{os.environ['RANK']}").touch()

    make = pretrain._features
    pretrain._features = lambda *arguments: [*make(*arguments), Fails()]  # type: ignore[assignment]


def _fail(home: Path, run: Path) -> int:
    _rank_1_fails(run.parent)
    code = joy(["pretrain", str(home / "minuscule.toml"), f"run.folder={run}", *EP2])
    if code == 1 and os.environ["RANK"] == "1":
        os._exit(code)  # as the process of a rank does
    return code


def test_a_rank_that_fails_issues_no_collective_and_its_traceback_is_in_its_log(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(WorldFailed, match="rank 1: died with exit code 1") as failed:
        run_world(_fail, 2, home, run, timeout=60.0)
    assert failed.value.exit_code == 1
    assert not list(tmp_path.glob("collective_*"))
    assert (tmp_path / "closed_1").exists()
    log = (run / "logs" / "rank_1.log").read_text()
    assert "Traceback" in log
    assert "ArithmeticError: seven is odd" in log
    assert f"error: rank 1: ArithmeticError: seven is odd; the traceback is in {run / 'logs' / 'rank_1.log'}" in log
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")][:2] == [1, 2]


def test_the_loop_fits_a_screen_and_names_no_feature() -> None:
    path = ROOT / "megatron_joy" / "train" / "loop.py"
    source = path.read_text()
    tree = ast.parse(source)
    (loop,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno + 1 <= LONGEST_LOOP
    assert len(source.splitlines()) <= LONGEST_LOOP  # the whole file does, too
    imported = {name for node in ast.walk(tree) for name in imports_of(node)}
    assert not [name for name in imported if "feature" in name]
    features = {
        node.name.lower() for path in feature_files() for node in ast.parse(path.read_text()).body if named(node)
    }
    assert len(features) >= 7
    words = {getattr(node, key).lower() for node in ast.walk(tree) for key in ("id", "attr", "name") if has(node, key)}
    assert not words & (features | {path.stem for path in feature_files()})


def feature_files() -> list[Path]:
    """Every file of features."""
    return [path for path in (ROOT / "megatron_joy" / "train" / "features").glob("*.py") if path.stem != "__init__"]


def named(node: ast.AST) -> bool:
    """A class."""
    return isinstance(node, ast.ClassDef)


def has(node: ast.AST, key: str) -> bool:
    """Whether a node has a name under a key."""
    return isinstance(getattr(node, key, None), str)


def imports_of(node: ast.AST) -> list[str]:
    """The modules and names that a node imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []
