"""What finding near-duplicates takes, stage by stage, for any number of documents; and whether all planted ones go.

    python benchmarks/data/near_duplicates.py [--documents 1000000] [--workers 2] [k=v ...]

writes documents of 100 random words, a third of them copies of earlier ones with a word added, runs `joy data run` with
`[near_duplicates]` on them and prints what its records say: tasks, seconds of CPU and by the clock, the most resident
memory of a task, bytes written. Exit code 1 where another number of documents goes than was planted.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import orjson

from data_pipeline.config import load_pipeline
from data_pipeline.engine import Job, load_plan
from data_pipeline.planner import measure
from megatron_joy.data.ledger import load_ledger

JOY = [sys.executable, "-m", "megatron_joy.cli.main"]
WORDS, VOCABULARY = 100, 50_000
STAGES = ("read", "sign", "match", "verify", "cluster", "write")
PIPELINE = """
name = "near"
[[sources]]
name = "texts"
reader = "jsonl"
paths = ["{folder}/*.jsonl"]
[near_duplicates]
enabled = true
[tokenizer]
vocab_size = 512
sample_megabytes = 1
[output]
folder = "{folder}/out"
shard_megabytes = 64
"""


def write_documents(folder: Path, count: int) -> int:
    """JSONL files of 100,000 documents; each third is the one before with a word more. Returns how many those are."""
    chance, planted = np.random.default_rng(1), 0
    for start in range(0, count, 100_000):
        with open(folder / f"{start:010d}.jsonl", "wb") as stream:
            text = ""
            for number in range(start, min(count, start + 100_000)):
                if (number - start) % 3 == 2:
                    text, planted = f"{text} copy{number}", planted + 1
                else:
                    text = " ".join(f"w{word}" for word in chance.integers(0, VOCABULARY, WORDS).tolist())
                stream.write(orjson.dumps({"text": text}) + b"\n")
    return planted


def main() -> None:
    """Runs, prints a table, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="where all is written; none: the system's temporary folder")
    parser.add_argument("overrides", nargs="*", metavar="k=v")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        planted = write_documents(Path(name), options.documents)
        path = Path(name) / "pipeline.toml"
        path.write_text(PIPELINE.format(folder=name))
        command = [*JOY, "data", "run", str(path), "--workers", str(options.workers), *options.overrides]
        subprocess.run(command, check=True, stdout=sys.stderr)
        pipeline = load_pipeline(str(path), options.overrides)
        parts = {part.stage: part for part in measure(Job(pipeline, load_plan(pipeline)))}
        steps = load_ledger(pipeline.folder).steps
        dropped = {reason: count for step in steps for reason, count in step.dropped.items()}
    print("| stage | tasks | CPU s | clock s | MB resident | MB written |\n|---|---|---|---|---|---|")
    for stage in STAGES:
        part = parts[stage]
        seconds = f"{part.cpu_seconds:.1f} | {part.wall_seconds:.1f}"
        print(f"| {stage} | {part.tasks} | {seconds} | {part.peak_bytes / 1e6:.0f} | {part.bytes / 1e6:.0f} |")
    print(f"{planted:,} planted, gone: {dropped}")
    sys.exit(dropped != {"near_duplicate": planted})


if __name__ == "__main__":
    main()
