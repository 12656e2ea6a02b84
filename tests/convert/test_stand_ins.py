"""The CPU stand-ins for Megatron-core's modules leave transformers alone, in the same process too."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_joy.convert.logits import transformers_logits
from tests.convert.worlds import Reference


def test_transformers_computes_the_same_with_and_without_stand_ins(
    exported: Path, reference: Reference, tmp_path: Path
) -> None:
    """In one process: a Megatron-core model is built behind the stand-ins, then transformers loads and computes."""
    ids = reference.outputs["ids"][:1]
    np.save(tmp_path / "ids.npy", ids.numpy())
    script = (
        "import sys, numpy, torch\n"
        "from pathlib import Path\n"
        "from megatron_joy.platform import cpu, process\n"
        "from megatron_joy.convert.logits import megatron_logits, transformers_logits\n"
        "from megatron_joy.platform.cpu import install\n"
        "checkpoint, folder, ids, out = sys.argv[1:]\n"
        "ids = torch.from_numpy(numpy.load(ids))\n"
        "ours = megatron_logits(Path(checkpoint), ids, 'fp32')\n"
        "assert torch.cuda.is_available() or install() is True\n"
        "numpy.save(out, transformers_logits(Path(folder), ids).numpy())\n"
        "print('difference', float((ours - torch.from_numpy(numpy.load(out))).abs().max()))\n"
    )
    arguments = [str(reference.checkpoint), str(exported), str(tmp_path / "ids.npy"), str(tmp_path / "out.npy")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    beside = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert not any(name.startswith("megatron.core") for name in sys.modules)  # this process has no stand-ins
    alone = transformers_logits(exported, ids)
    torch.testing.assert_close(beside, alone, atol=0, rtol=0)
    assert float(done.stdout.split("difference")[1]) < 1e-5
