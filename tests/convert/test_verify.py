"""The verification of an export compares what it says it compares, and a difference undoes the export."""

import json
from pathlib import Path

import pytest
import torch

from megatron_joy.convert import export_job
from megatron_joy.convert import verify as room
from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.precisions.table import PRECISIONS
from megatron_joy.convert.safetensors_file import Entry, write_file
from megatron_joy.convert.to_hf import to_hf
from megatron_joy.errors import WorkError
from tests.convert.worlds import MODEL, Reference, make_reference
from tests.gloo import run_world


def test_an_export_is_verified_against_transformers_in_other_processes(reference: Reference, tmp_path: Path) -> None:
    done = to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions())
    assert done.verification is not None
    logits = done.verification.logits
    assert logits is not None
    assert logits.max_difference < 1e-5
    assert logits.top1_agreement == 1.0
    assert logits.largest_logit > 1.0
    assert logits.tokens == MODEL["max_position_embeddings"]
    written = json.loads((tmp_path / "hf" / "joy_conversion.json").read_text())["verification"]
    assert written["tensors"] == done.tensors
    assert written["logits"]["max_difference"] == logits.max_difference


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "family"), [("bf16", "deepseek_v3"), ("fp32", "joyai_llm_flash")])
def test_both_families_and_rounded_weights_are_verified_too(
    dtype: str, family: str, reference: Reference, tmp_path: Path
) -> None:
    done = to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions(precision=dtype, family=family))
    assert done.verification is not None
    assert done.verification.logits is not None
    assert done.verification.logits.max_difference < 1e-5


@pytest.mark.slow
def test_an_export_of_other_weights_is_found_by_the_logits(reference: Reference, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    run_world(make_reference, 1, other, "fp32", {"router_bias_update_rate": 0.5, "routed_scaling_factor": 2.4})
    to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions(verify=False))
    ids = reference.outputs["ids"][:1].numpy()
    found = room.compare_logits(tmp_path / "hf", Reference(other).checkpoint, ids, "fp32")
    assert found.max_difference > room.LOGITS_TOLERANCE


def test_a_difference_of_logits_leaves_no_folder(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = room.LogitsAgreement(64, 2e-4, 1e-5, 3.0, 1.0)
    monkeypatch.setattr(room, "compare_logits", lambda *args: worse)
    with pytest.raises(WorkError, match=r"differ from the training model's by 2\.00e-04 \(expected at most 1e-04\)"):
        to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions())
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_numbers_do_not_pass(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = room.LogitsAgreement(64, float("nan"), float("nan"), 3.0, 1.0)
    monkeypatch.setattr(room, "compare_logits", lambda *args: nan)
    with pytest.raises(WorkError, match="differ"):
        to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions())


def test_a_byte_that_flips_on_the_way_to_disk_is_found(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(path: Path, *args: object) -> dict[str, str]:
        digests = write_file(path, *args)  # type: ignore[arg-type]
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return digests

    monkeypatch.setattr(export_job, "write_file", flip)
    with pytest.raises(WorkError, match=r"safetensors: \S+ on disk is not the checkpoint's"):
        to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions())
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_written_from_another_place_is_found(exported: Path) -> None:
    """The re-read tensor is compared with the checkpoint itself, not only with the hash of what was written."""
    from megatron_joy.convert.mapping import conversion_plan
    from tests.convert.tampering import all_tensors
    from tests.convert.worlds import make_recipe

    told = json.loads((exported / "joy_conversion.json").read_text())["tensors"]
    tensors = all_tensors(exported)
    expert = "model.layers.1.mlp.experts.0."
    file = told[expert + "gate_proj.weight"]["file"]
    swapped = tensors | {expert + "gate_proj.weight": tensors[expert + "up_proj.weight"]}
    written = room.Written(
        plan=conversion_plan(make_recipe().model),
        precision=PRECISIONS["fp32"],
        original=swapped.__getitem__,
        stored=lambda name: {name: [swapped[name]]},
        weight_of={name: name for name, entry in told.items() if entry["file"] == file},
        quantised=frozenset(),
        digests={name: entry["blake3"] for name, entry in told.items()},
    )
    with pytest.raises(WorkError, match=r"experts\.0\.gate_proj\.weight on disk is not the checkpoint's"):
        room.verify_file(written, exported / file, lambda done: None)


def test_a_model_too_large_for_memory_is_verified_by_its_bits_alone(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "memory_problem", lambda plan: "both models need 1,000 GiB")
    done = to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions())
    assert done.verification is not None
    assert done.verification.logits is None
    assert done.verification.why_no_logits == "both models need 1,000 GiB"
    assert done.verification.tensors == done.tensors


def test_a_file_holds_what_the_header_says_and_only_that(tmp_path: Path) -> None:
    wrong = torch.zeros(2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"a: \[2\] torch\.bfloat16, expected"):
        write_file(tmp_path / "x.safetensors", [Entry("a", "fp32", (3,))], lambda entry: {"a": [wrong]})
    assert list(tmp_path.iterdir()) == []
