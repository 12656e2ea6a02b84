"""What a run's ranks and whoever looks after them tell each other through the run's folder. Standard library only: a
supervisor may run where nothing is installed but Python.

Everything lies in RUN/launch: heartbeats, the run's state, the lease and the claims of attempts. The verdict of a
preflight lies beside the ranks' logs.
"""

from pathlib import Path

LAUNCH = "launch"
VERDICT_FILE = Path("logs") / "preflight.json"
FENCE_VARIABLE = "JOY_FENCE"  # a rank's environment: the number of the attempt that it belongs to


def launch_folder(run: Path) -> Path:
    """Where launches of a run keep their files."""
    return run / LAUNCH
