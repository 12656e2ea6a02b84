"""How long a run takes from the start of its processes to its first step, part by part, by number of processes.

    python benchmarks/restart.py [--recipe joyai_mini] [--worlds 1,2] [k=v ...]

writes one checkpoint with one process and resumes from it with data-parallel worlds (each rank checks a share of the
files and reads what it needs); prints one JSON object a world with medians over ranks. Files lie in the page cache, as
after a kill on the same machine. Opening the data is not in it: `benchmarks/startup.py` measures that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_joy.platform.world import run_world

ALONE = ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor")
BATCH = ("data.sequence_length=256", "train.global_batch_size=4", "train.micro_batch_size=1")


def _recipe(name: str, overrides: list[str], replicas: int) -> Any:
    from megatron_joy.recipe import load_recipe

    layout = [*(f"layout.{kind}_parallel_size=1" for kind in ALONE), f"layout.data_parallel_size={replicas}"]
    return load_recipe(name, [*layout, *BATCH, "train.validation_interval=0", *overrides])


def write(folder: str, name: str, overrides: list[str]) -> int:
    """A checkpoint after one step; its bytes."""
    from shared.turns import batches_in_memory

    from megatron_joy.checkpoint.save import save_checkpoint
    from megatron_joy.model.build import build_model
    from megatron_joy.platform import process as processes
    from megatron_joy.train.step import Trainer

    recipe = _recipe(name, overrides, 1)
    process = processes.start(recipe.layout, recipe.seed)
    trainer = Trainer(recipe, process, build_model(recipe, process))
    trainer.step(1, batches_in_memory(recipe))
    about = {"recipe": recipe, "chunks": trainer.chunks, "optimizer": trainer.optimizer, "process": process}
    path = save_checkpoint(Path(folder), 1, state={}, **about)
    return sum(file.stat().st_size for file in path.iterdir())


def resume(folder: str, name: str, overrides: list[str], replicas: int) -> dict[str, float]:
    """Seconds of each part on this rank."""
    from shared.turns import batches_in_memory

    from megatron_joy.checkpoint.load import choose, load_checkpoint
    from megatron_joy.model.build import build_model
    from megatron_joy.platform import process as processes
    from megatron_joy.train.step import Trainer

    marks = {"": time.perf_counter()}

    def mark(part: str) -> None:
        marks[part] = time.perf_counter()

    recipe = _recipe(name, overrides, replicas)
    process = processes.start(recipe.layout, recipe.seed)
    mark("process groups")
    checkpoint = choose(Path(folder), process).checkpoint
    assert checkpoint is not None
    mark("check")
    trainer = Trainer(recipe, process, build_model(recipe, process))
    mark("build")
    load_checkpoint(checkpoint, chunks=trainer.chunks, optimizer=trainer.optimizer, process=process)
    mark("load")
    batches = batches_in_memory(recipe)
    trainer.step(2, batches[: len(batches) // replicas])
    mark("first step")
    seconds = list(marks.values())
    parts = zip(list(marks)[1:], seconds, seconds[1:], strict=False)
    return {part: after - before for part, before, after in parts}


def imports() -> float:
    """Seconds of a new process to the point where it has imported what training needs."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import megatron_joy.train.pretrain"], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="joyai_mini")
    parser.add_argument("--worlds", default="1,2")
    parser.add_argument("--folder", help="where the checkpoint is written; none: the system's temporary folder")
    parser.add_argument("overrides", nargs="*", metavar="k=v")
    arguments = parser.parse_args()
    about = (arguments.recipe, arguments.overrides)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        (size,) = run_world(write, 1, folder, *about, patience=600.0)
        for world in map(int, arguments.worlds.split(",")):
            ranks = run_world(resume, world, folder, *about, world, patience=600.0)
            parts = {"imports": imports()}
            parts |= {part: statistics.median(rank[part] for rank in ranks) for part in ranks[0]}
            told = {part: round(seconds, 2) for part, seconds in parts.items()}
            total = round(sum(parts.values()), 1)
            print(json.dumps({"processes": world, "megabytes": round(size / 1e6), **told, "total": total}), flush=True)


if __name__ == "__main__":
    main()
