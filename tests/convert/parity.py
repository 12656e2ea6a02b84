"""The numbers of docs/results/hf_parity.md: `python -m tests.convert.parity` prints the largest differences."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.logits import transformers_logits
from megatron_joy.convert.to_hf import to_hf
from megatron_joy.infer.weights import build_decoder, open_weights
from tests.convert.tampering import all_tensors
from tests.convert.test_mtp import dense_mtp_layer, load_main_model, mtp_logits
from tests.convert.worlds import LENGTH, Reference, make_reference
from tests.gloo import run_world


def apart(one: Tensor, other: Tensor) -> str:
    """The largest absolute difference."""
    return f"{float((one - other).abs().max()):.1e}"


@torch.no_grad()
def measure(folder: Path, dtype: str) -> dict[str, str]:
    """Differences in fp32 on a minuscule model whose weights are of this dtype."""
    folder.mkdir()
    run_world(make_reference, 1, folder, dtype, {})
    reference, exported = Reference(folder), folder / "hf"
    to_hf(reference.checkpoint, exported, ExportOptions(verify=False))
    outputs = reference.outputs
    ids = outputs["ids"]
    theirs = transformers_logits(exported, ids)
    with open_weights(exported) as weights:
        decoder = build_decoder(weights, "fp32")
    cache = decoder.new_cache(torch.zeros(ids.shape[0], dtype=torch.int64), LENGTH)
    full = decoder.forward(ids).logits
    steps = torch.cat([decoder.decode(ids[:, i : i + 1], cache).logits for i in range(LENGTH)], dim=1)
    model = load_main_model(exported)
    predicted = mtp_logits(model, dense_mtp_layer(model, all_tensors(exported)), ids)
    loss = F.cross_entropy(predicted[:, :-1].flatten(0, 1), ids[:, 2:].flatten(), reduction="sum")
    return {
        "largest logit": f"{float(theirs.abs().max()):.2f}",
        "training model, transformers": apart(outputs["logits"], theirs),
        "decoder, transformers": apart(full, theirs),
        "decoder, token by token from the latent cache, all at once": apart(steps, full),
        "MTP logits: training model, transformers' MtpLayer": apart(outputs["mtp_logits"][:, :-1], predicted),
        "MTP loss, relative": f"{float((loss / outputs['mtp_loss_sum'] - 1).abs()):.1e}",
    }


def main() -> None:
    """Prints a table."""
    with tempfile.TemporaryDirectory() as scratch:
        found = {dtype: measure(Path(scratch) / dtype, dtype) for dtype in ("fp32", "bf16")}
    for name, value in found["fp32"].items():
        print(f"| {name} | {value} | {found['bf16'][name]} |")


if __name__ == "__main__":
    main()
