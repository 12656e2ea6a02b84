"""From mixed raw inputs to a trained model, killed twice on the way: what `docs/data.md` promises, in one go.

    python benchmarks/data/mixed.py [--megabytes 200] [--workers 2] [--steps 40] [--html FOLDER ...] [--keep FOLDER]

--html names folders with more pages, as documentation packages unpack into. Makes WARC, JSONL, parquet and a source
tree of what is installed; runs the pipeline undisturbed; runs it again and kills all of it (SIGKILL) after a third and
after two thirds of its tasks; compares every byte; verifies; reads a shard with Megatron-core's GPTDataset against the
tokens of its documents; trains joyai_tiny on it; writes the report. Fails at the first thing that does not hold.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.inputs import write_inputs, write_pipeline

from megatron_joy.data.ledger import load_ledger
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.shards import ShardReader
from megatron_joy.data.verify import verify
from megatron_joy.report.data_page import write_data_page

JOY = [sys.executable, "-m", "megatron_joy.cli.main"]
SEQUENCE = 256


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of everything that is published."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and "work" not in path.relative_to(out).parts]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_whole(pipeline: Path, workers: int) -> float:
    """Run a pipeline to its end; returns seconds."""
    began = time.monotonic()
    subprocess.run([*JOY, "data", "run", str(pipeline), "--workers", str(workers)], check=True, stdout=sys.stderr)
    return time.monotonic() - began


def run_and_kill(pipeline: Path, out: Path, workers: int, records: int) -> int:
    """Start a pipeline and kill all of it once so many tasks are done; returns how many are."""
    command = [*JOY, "data", "run", str(pipeline), "--workers", str(workers)]
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    while len(list(out.glob("work/tasks/*/*.json"))) < records:
        if process.poll() is not None:
            raise SystemExit("error: the run ended before it could be killed")
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return len(list(out.glob("work/tasks/*/*.json")))


def read_with_megatron(folder: Path, cache: Path) -> int:
    """Every sample of a shard as Megatron-core's GPTDataset gives it, against our own reader; returns samples."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    manifest = load_manifest(folder)
    entry, identity = manifest.shards[0], manifest.tokenizer
    prefix = str(folder / entry.name)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(cache),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        tokenizer=_Tokenizer(identity.eod_id, identity.vocab_size),
    )
    indices = np.arange(entry.documents, dtype=np.int32)
    dataset = GPTDataset(IndexedDataset(prefix), prefix, indices, None, Split.train, config)
    reader = ShardReader(folder / entry.name)
    text = np.concatenate([reader.document(number) for number in dataset.document_index.tolist()])
    for number in range(len(dataset)):
        first = int(dataset.shuffle_index[number]) * SEQUENCE
        assert np.array_equal(dataset[number]["tokens"].numpy(), text[first : first + SEQUENCE]), number
    return len(dataset)


class _Tokenizer:
    """What GPTDataset asks a tokenizer for."""

    def __init__(self, eod: int, vocab_size: int) -> None:
        self.eod, self.pad, self.vocab_size = eod, eod, vocab_size
        self.unique_identifiers = {"class": "mixed"}


def train(out: Path, run: Path, steps: int) -> tuple[float, float]:
    """Train joyai_tiny; returns the first and the last update's loss."""
    recipe = [
        "joyai_tiny",
        f"run.folder={run}",
        f"data.train.0.manifest={out}/train",
        f"data.validation.0.manifest={out}/validation",
        f"train.steps={steps}",
        f"train.validation_interval={steps}",
        "schedule.warmup_steps=5",
        "schedule.decay_steps=5",
    ]
    subprocess.run([*JOY, "launch", "local", *recipe], check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return losses[0], losses[-1]


def whole_story(folder: Path, megabytes: float, html: list[Path], workers: int, steps: int) -> dict[str, Any]:
    """Do all of it; returns what was seen."""
    sizes = write_inputs(folder / "in", megabytes, html)
    shard = max(0.5, megabytes / 20)
    first = write_pipeline(folder / "in", folder / "undisturbed", shard)
    seconds = run_whole(first, workers)
    tasks = len(list((folder / "undisturbed").glob("work/tasks/*/*.json")))
    second = write_pipeline(folder / "in", folder / "killed", shard)
    kills = [run_and_kill(second, folder / "killed", workers, tasks * part // 3) for part in (1, 2)]
    run_whole(second, workers)
    assert digests(folder / "killed") == digests(folder / "undisturbed"), "the killed run gave other bytes"
    out = folder / "killed"
    problems = [problem for split in ("train", "validation") for problem in verify(out / split).problems]
    assert not problems, problems
    ledger = load_ledger(out)
    samples = read_with_megatron(out / "train", folder / "cache")
    losses = train(out, folder / "run", steps)
    assert losses[1] < losses[0], losses
    return {
        "input_megabytes": {name: round(size, 1) for name, size in sizes.items()},
        "tasks": tasks,
        "killed_after_tasks": kills,
        "seconds_undisturbed": round(seconds, 1),
        "files_alike": len(digests(out)),
        "steps": {step.name: [step.documents_in, step.documents_out] for step in ledger.steps},
        "tokens": sum(totals.tokens for totals in ledger.splits.values()),
        "gpt_dataset_samples_alike": samples,
        "loss": [round(loss, 3) for loss in losses],
        "report": str(write_data_page(out, folder / "report.html")),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--html", type=Path, nargs="*", default=[], help="folders with more HTML")
    parser.add_argument("--keep", type=Path, help="a folder for everything; none: a temporary one, removed at the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = (options.keep or Path(name)).absolute()
        print(
            json.dumps(whole_story(folder, options.megabytes, options.html, options.workers, options.steps), indent=2)
        )


if __name__ == "__main__":
    main()
