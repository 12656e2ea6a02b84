"""`make demo`: the whole mission in small, on a machine without a GPU.

Every stage is a `joy` command that is printed before it runs, so what is seen here can be typed again. The run is
killed with SIGKILL at a random step on the way and goes on from its last whole checkpoint; the steps that are trained
twice must have the same losses bit for bit.
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_joy.data.manifest import load_manifest
from megatron_joy.errors import UserError, WorkError
from megatron_joy.recipe import Recipe, load_recipe

RECIPE = "joyai_tiny"
PIPELINE = "data_pipeline/pipelines/demo.toml"
PROMPT = "def __init__(self"
KILL_TIMEOUT_SECONDS = 900

console = Console(highlight=False)


@dataclass
class Demo:
    """What the stages hand on to each other, and how long each took."""

    recipe: Recipe
    run: Path
    seconds: dict[str, float] = field(default_factory=dict)
    repeated: int = 0

    def joy(self, *arguments: str) -> None:
        """Prints and runs a `joy` command; its failure ends the demo."""
        console.print(f"[bold green]$[/] joy {shlex.join(arguments)}", soft_wrap=True)
        code = subprocess.run(joy_command(*arguments), check=False).returncode
        if code:
            raise WorkError(f"`joy {shlex.join(arguments)}` left with exit code {code}")


def joy_command(*arguments: str) -> list[str]:
    """The command line of this environment's `joy`."""
    return [sys.executable, "-m", "megatron_joy.cli.main", *arguments]


def rows(run: Path) -> list[dict[str, Any]]:
    """All whole rows of a run's metrics."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [json.loads(line) for line in whole]


def make_data(demo: Demo) -> None:
    """Real text that this environment holds, as Megatron shards, and every byte of them checked."""
    demo.joy("data", "run", PIPELINE)
    for split in ("train", "validation"):
        demo.joy("data", "verify", f"data/demo/{split}")


def train_and_kill(demo: Demo) -> None:
    """Starts the run and kills all its processes with SIGKILL at a random step after the first checkpoint."""
    interval = demo.recipe.checkpoint.interval
    at = random.randint(interval + 2, 2 * interval - 1)
    arguments = ("launch", "local", RECIPE, f"run.folder={demo.run}")
    console.print(
        f"[bold green]$[/] joy {shlex.join(arguments)}    [dim]# will be killed at a random step[/]", soft_wrap=True
    )
    process = subprocess.Popen(joy_command(*arguments), start_new_session=True)
    started = time.monotonic()
    try:
        while not any(row["step"] >= at for row in rows(demo.run)):
            if process.poll() is not None:
                raise WorkError(f"the training run ended by itself with exit code {process.returncode}")
            if time.monotonic() - started > KILL_TIMEOUT_SECONDS:
                raise WorkError(f"step {at} was not reached in {KILL_TIMEOUT_SECONDS} s")
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    console.print(f"[bold red]SIGKILL[/] to every process of the run after step {rows(demo.run)[-1]['step']}")


def resume(demo: Demo) -> None:
    """The same command again; the losses of steps that were trained twice must be the same bits."""
    demo.joy("launch", "local", RECIPE, f"run.folder={demo.run}")
    first = {row["step"]: row for row in rows(demo.run) if row["attempt"] == 0}
    second = {row["step"]: row for row in rows(demo.run) if row["attempt"] == 1}
    twice = sorted(first.keys() & second.keys())
    if not twice:
        raise WorkError("no step was trained twice, so the resume proves nothing")
    for step in twice:
        for key in ("loss", "mtp_loss", "grad_norm"):
            if first[step][key] != second[step][key]:
                raise WorkError(f"step {step}: {key} {first[step][key]!r} before the kill, {second[step][key]!r} after")
    demo.repeated = len(twice)
    console.print(
        f"steps {twice[0]} to {twice[-1]} were trained twice: losses and gradient norms are equal [bold]bit for bit[/]",
        soft_wrap=True,
    )


def export(demo: Demo) -> None:
    """To Hugging Face's format, checked against transformers, and back."""
    demo.joy("convert", "to-hf", str(demo.run), "--out", str(demo.run / "hf"))
    demo.joy("convert", "from-hf", str(demo.run / "hf"), "--out", str(demo.run / "from_hf"), "--recipe", RECIPE)


def write_text(demo: Demo) -> None:
    """From the exported folder, and from the checkpoint with the MTP layer drafting: the same text."""
    demo.joy("generate", str(demo.run / "hf"), "--prompt", PROMPT, "--max-new-tokens", "60")
    demo.joy("generate", str(demo.run), "--prompt", PROMPT, "--max-new-tokens", "60", "--speculative")


def write_report(demo: Demo) -> None:
    """One page to look at."""
    demo.joy("report", str(demo.run))


STAGES: dict[str, Callable[[Demo], None]] = {
    "text to shards": make_data,
    "train, then SIGKILL": train_and_kill,
    "resume to the end": resume,
    "export and import": export,
    "write text": write_text,
    "report": write_report,
}


def summary(demo: Demo) -> Table:
    """The figures of this demo."""
    losses = [row["validation_loss"] for row in rows(demo.run) if "validation_loss" in row]
    entropy = load_manifest(Path("data/demo/validation")).unigram_entropy
    table = Table(title="The demo in figures", show_header=False)
    for name, seconds in demo.seconds.items():
        table.add_row(name, f"{seconds:.0f} s")
    table.add_row("total", f"{sum(demo.seconds.values()):.0f} s")
    table.add_row("steps trained twice, same bits", str(demo.repeated))
    table.add_row("unigram entropy of the validation text", f"{entropy:.3f} nats per token")
    table.add_row("validation loss at the end", f"{losses[-1]:.3f} nats per token")
    return table


def new_run_folder() -> Path:
    """runs/demo, or runs/demo_2 and so on when earlier demos are still there."""
    number = 1
    while (folder := Path("runs") / ("demo" if number == 1 else f"demo_{number}")).exists():
        number += 1
    return folder


def main() -> int:
    """Runs all stages; 0, or 1 with the reason."""
    demo = Demo(load_recipe(RECIPE), new_run_folder())
    try:
        for number, (name, stage) in enumerate(STAGES.items(), start=1):
            console.rule(f"{number}/{len(STAGES)}  {name}", align="left")
            started = time.monotonic()
            stage(demo)
            demo.seconds[name] = time.monotonic() - started
    except (UserError, WorkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.rule()
    console.print(summary(demo))
    page = demo.run / "report.html"
    console.print(f"Open [bold]{page}[/] in a browser; `joy status {demo.run}` says the same in short.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
