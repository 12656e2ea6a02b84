"""Resident memory of a worker in each stage of a pipeline, for shards of several sizes.

    python benchmarks/data/stage_memory.py [--megabytes 100] [--shards 8 32] [--html FOLDER ...]

The inputs and the pipeline of `mixed.py` (WARC, JSONL, parquet and a source tree of what is installed; extraction,
cleaning, near-duplicates, scores, a trained tokenizer), run with one worker for each size; the figures are what
`joy plan --data` reads from the run's records: the most of any task of the stage, in MB (10^6 bytes).
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.inputs import write_inputs, write_pipeline

from data_pipeline.config import load_pipeline
from data_pipeline.engine import Job, load_plan
from data_pipeline.planner import measure

JOY = [sys.executable, "-m", "megatron_joy.cli.main"]


def peaks(inputs: Path, size: float) -> dict[str, float]:
    """Stage -> MB, of a run with shards of `size` MB of text."""
    path = write_pipeline(inputs, inputs / f"shards_of_{size:g}", size)
    subprocess.run([*JOY, "data", "run", str(path), "--workers", "1"], check=True, stdout=sys.stderr)
    pipeline = load_pipeline(str(path))
    return {part.stage: part.peak_bytes / 1e6 for part in measure(Job(pipeline, load_plan(pipeline)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100, help="inputs, before compression")
    parser.add_argument("--shards", type=float, nargs="+", default=[8, 32], help="megabytes of text of a shard")
    parser.add_argument("--html", type=Path, nargs="*", default=[], help="folders with more pages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), options.megabytes, options.html)
        found = [peaks(Path(folder), size) for size in options.shards]
    print("| stage | " + " | ".join(f"{size:g} MB shards" for size in options.shards) + " |")
    print("|---|" + "---|" * len(found))
    for stage in found[0]:
        print(f"| {stage} | " + " | ".join(f"{row[stage]:.0f}" for row in found) + " |")


if __name__ == "__main__":
    main()
