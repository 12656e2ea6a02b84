"""A rank whose nodes may be unfit, without torch: `measured_rank.py preflight|pretrain RUN SCRIPT UNFIT`.

UNFIT is a JSON list of nodes that the preflight's verdict names; `pretrain` follows the script as supervised ranks do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_joy.runstate import VERDICT_FILE
from tests.launch import supervised_rank


def preflight(run: Path, unfit: list[str]) -> int:
    """Writes the verdict on rank 0, as `joy preflight` does; every rank leaves with its exit code."""
    listed = os.environ["SLURM_STEP_NODELIST"]
    names = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True)
    nodes = names.stdout.split()
    bad = [node for node in nodes if node in unfit]
    if os.environ["SLURM_PROCID"] == "0":
        reasons = {node: ["its clock is 9.0 s ahead"] if node in bad else [] for node in nodes}
        rows = {node: {"ok": not why, "reasons": why} for node, why in reasons.items()}
        (run / VERDICT_FILE).write_text(json.dumps({"ok": not bad, "reasons": [], "nodes": rows}))
    return 1 if bad else 0


if __name__ == "__main__":
    kind, folder, script, listed = sys.argv[1:]
    if kind == "preflight":
        sys.exit(preflight(Path(folder), json.loads(Path(listed).read_text())))
    sys.argv[1:] = [folder, script]
    supervised_rank.main()
