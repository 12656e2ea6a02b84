"""The CPU stand-ins for Megatron-core's modules leave transformers alone, in the same process too."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.convert.worlds import Reference

BESIDE = """
import sys, numpy, torch
from pathlib import Path
from megatron_joy.convert.logits import megatron_logits, transformers_logits
from megatron_joy.platform.cpu import install
checkpoint, folder, ids, out = sys.argv[1:]
ids = torch.from_numpy(numpy.load(ids))
ours = megatron_logits(Path(checkpoint), ids, "fp32")
assert torch.cuda.is_available() or install() is True
numpy.save(out, transformers_logits(Path(folder), ids).numpy())
print("difference", float((ours - torch.from_numpy(numpy.load(out))).abs().max()))
"""
ALONE = """
import sys, numpy, torch
from pathlib import Path
from megatron_joy.convert.logits import transformers_logits
_, folder, ids, out = sys.argv[1:]
numpy.save(out, transformers_logits(Path(folder), torch.from_numpy(numpy.load(ids))).numpy())
assert not any(name.startswith("megatron.core") for name in sys.modules)
"""


def test_transformers_computes_the_same_with_and_without_stand_ins(
    exported: Path, reference: Reference, tmp_path: Path
) -> None:
    """Two processes: in one a Megatron-core model is built behind the stand-ins first, in one nobody imports it."""
    np.save(tmp_path / "ids.npy", reference.outputs["ids"][:1].numpy())

    def computed(script: str, name: str) -> tuple[np.ndarray, str]:
        arguments = [str(reference.checkpoint), str(exported), str(tmp_path / "ids.npy"), str(tmp_path / name)]
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        return np.load(tmp_path / name), done.stdout

    beside, said = computed(BESIDE, "beside.npy")
    alone, _ = computed(ALONE, "alone.npy")
    np.testing.assert_array_equal(beside, alone)
    assert float(said.split("difference")[1]) < 1e-5
