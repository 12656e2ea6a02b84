"""One worker: `python -m data_pipeline.worker PIPELINE.toml [k=v ...] --stage S --shard K`.

This is the whole contract with whatever starts workers (the local pool, a Slurm array, MPI ranks): the same command,
the same files, no other communication. `--plan` makes the plan that the workers of a run share. `--serve` does task
after task: it reads "stage shard" lines from its input and answers each with one JSON line; it ends with its input.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, TextIO

import orjson

from data_pipeline.config import load_pipeline
from data_pipeline.cost import resident_bytes
from data_pipeline.engine import Engine, Job, load_plan, make_plan, save_plan
from data_pipeline.stages import STAGES
from megatron_joy.errors import UserError, WorkError, exit_code


def open_engine(pipeline: str, overrides: Sequence[str]) -> Engine:
    """The engine of a planned pipeline. Raises UserError when the plan is missing or of other settings."""
    resolved = load_pipeline(pipeline, overrides)
    return Engine(Job(resolved, load_plan(resolved)), STAGES)


def attempt(engine: Engine, stage: str, shard: int) -> dict[str, Any]:
    """Do one task; the answer says what it counted, or what kind of error stopped it."""
    began = time.monotonic()
    answer: dict[str, Any] = {"stage": stage, "shard": shard, "kind": "done", "message": ""}
    try:
        engine.run_task(stage, shard)
    except UserError as error:
        answer |= {"kind": "user", "message": str(error)}
    except WorkError as error:
        answer |= {"kind": "work", "message": f"stage {stage} shard {shard}: {error}"}
    except OSError as error:
        # A full disk names no file; numpy's own error of one has not even a number.
        place, reason = error.filename or engine.job.folder, error.strerror or error
        answer |= {"kind": "work", "message": f"stage {stage} shard {shard}: {place}: {reason}; mend it and run again"}
    except Exception as error:
        traceback.print_exc()
        answer |= {"kind": "work", "message": f"stage {stage} shard {shard}: {type(error).__name__}: {error}"}
    answer |= {"seconds": time.monotonic() - began, "resident_bytes": resident_bytes()}
    return answer


def serve(engine: Engine, requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more: when whoever asks dies, its workers finish their task and leave."""
    for line in requests:
        stage, shard = line.split()
        answers.write(json.dumps(attempt(engine, stage, int(shard))) + "\n")
        answers.flush()


def _private_answers() -> TextIO:
    """Standard output for answers alone: whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.worker", description=__doc__)
    parser.add_argument("pipeline", help="a pipeline's TOML or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    parser.add_argument("--plan", action="store_true", help="make the plan that all workers of a run share")
    parser.add_argument("--stage", help=f"one of {', '.join(stage.name for stage in STAGES)}")
    parser.add_argument("--shard", type=int, help="number of the task in its stage, from 0")
    parser.add_argument("--serve", action="store_true", help="answer requests from standard input")
    return parser


def run(arguments: Sequence[str]) -> int:
    """The worker command; returns its exit code. Raises UserError and WorkError."""
    options = _arguments().parse_intermixed_args(arguments)
    if options.plan:
        pipeline = load_pipeline(options.pipeline, options.overrides)
        plan = make_plan(pipeline)
        save_plan(pipeline, plan)
        counts = {stage.name: stage.shards(Job(pipeline, plan)) for stage in STAGES}
        print(orjson.dumps(counts).decode())
        return 0
    if options.serve:
        # Ctrl-C goes to the whole terminal: the one who asks decides what becomes of its workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        answers = _private_answers()
        serve(open_engine(options.pipeline, options.overrides), sys.stdin, answers)
        return 0
    if options.stage is None or options.shard is None:
        raise UserError("worker: give --stage and --shard, or --plan")
    print(
        orjson.dumps(open_engine(options.pipeline, options.overrides).run_task(options.stage, options.shard)).decode()
    )
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(run, sys.argv[1:]))
