"""The batch script's program: `python -m launch.in_slurm [options] -- COMMAND ...` brings a run to its end in this job.

COMMAND is what every rank runs, `joy pretrain RECIPE ...` as a rule. Exits 0 when the run is finished or its job was
requeued, 75 after a stop without a requeue, 2 on a user's mistake, 93 when a restart would be pointless, 1 on other
failures: what depends on the job with `afterok` starts after a finished run alone, since a requeued job is not over.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.policy import EXIT_FAILED, EXIT_FINISHED, EXIT_HOPELESS, EXIT_USER_MISTAKE, FIRST_WAIT_SECONDS
from launch.slurm_preflight import find_fit_nodes
from launch.slurm_ranks import Job, SlurmPlace
from launch.supervise import Supervisor, conclude, say
from launch.watch import Limits
from megatron_joy.errors import HopelessError, UserError, WorkError


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    usual = Limits()
    parser = argparse.ArgumentParser(prog="python -m launch.in_slurm", description=__doc__)
    parser.add_argument("--run", type=Path, help="the run's folder; default: that of the recipe in COMMAND")
    parser.add_argument("--restarts", type=int, default=10, help="how often the run may fail; stops don't count")
    parser.add_argument(
        "--first-wait", type=float, default=FIRST_WAIT_SECONDS, help="before the first restart, seconds"
    )
    parser.add_argument("--spares", type=int, default=0, help="nodes of the job that are idle until another fails")
    parser.add_argument("--preflight", action="store_true", help="measure the nodes first and leave out unfit ones")
    parser.add_argument("--hang-factor", type=float, default=usual.factor, help="limit of a step, in medians of a step")
    parser.add_argument("--hang-least", type=float, default=usual.least, help="smallest limit of a step, seconds")
    parser.add_argument("--hang-slow", type=float, default=usual.slow, help="limit of start and checkpoint, seconds")
    parser.add_argument("--step-option", action="append", default=[], help="an option of srun, as --container-image=X")
    parser.add_argument("command", nargs="+", help="what each rank runs")
    return parser.parse_args(arguments)


def _run_folder(command: Sequence[str]) -> Path:
    """The folder of the recipe in a `joy pretrain RECIPE ...` command."""
    if "pretrain" not in command[:-1]:
        raise UserError("in_slurm: --run is not given and COMMAND has no `pretrain RECIPE`; give --run FOLDER")
    from megatron_joy.recipe import load_recipe  # pydantic, which a batch host may lack when --run is given

    at = list(command).index("pretrain")
    return Path(load_recipe(command[at + 1], command[at + 2 :]).run.folder or "")


def supervise(arguments: Sequence[str]) -> int:
    """The exit code of a launch in this job; raises UserError and WorkError."""
    options = _arguments(arguments)
    job = Job.from_environment(os.environ)
    if not 0 <= options.spares < len(job.nodes):
        raise UserError(f"--spares {options.spares}: the job has {len(job.nodes)} nodes; leave at least one to work")
    run = options.run or _run_folder(options.command)
    run.mkdir(parents=True, exist_ok=True)
    place = SlurmPlace(run, job, options.command, options.spares, options.step_option)
    limits = Limits(options.hang_factor, options.hang_least, options.hang_slow)
    say(f"{place.launch} on {', '.join(job.nodes)}, {job.tasks_per_node} ranks a node; the run is {run}")
    if options.preflight and not find_fit_nodes(place, run):
        return EXIT_FINISHED
    return conclude(Supervisor(run, place, options.restarts, limits, options.first_wait).supervise())


def main() -> int:
    """Entry point: errors are one line each."""
    try:
        return supervise(sys.argv[1:])
    except (UserError, WorkError) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, UserError):
            return EXIT_USER_MISTAKE
        return EXIT_HOPELESS if isinstance(error, HopelessError) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
