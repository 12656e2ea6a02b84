"""What is written beside exported weights: where they are from, tensor by tensor, and a model card for readers."""

from fractions import Fraction
from importlib.metadata import version
from typing import Any

import torch

import megatron_joy
from megatron_joy.checkpoint.marker import Checkpoint
from megatron_joy.convert.export_job import ExportJob, ExportOptions
from megatron_joy.convert.import_job import DTYPE_NAMES, ImportJob
from megatron_joy.convert.verify import Verification
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.ledger import first_sample, from_json, in_force
from megatron_joy.recipe.timetable import Timetable

PROVENANCE = "joy_conversion.json"
CARD = "README.md"


def provenance(
    job: ExportJob,
    options: ExportOptions,
    data: list[dict[str, Any]],
    digests: dict[str, str],
    verification: Verification | None,
) -> dict[str, Any]:
    """The content of joy_conversion.json. data: `data_read`. digests: BLAKE3 of each stored tensor."""
    marker = job.source.checkpoint.marker
    return {
        "format_version": 1,
        "direction": "to-hf",
        "made_by": _made_by(),
        "checkpoint": {
            "run": job.source.recipe.name,
            "step": marker.step,
            "progress": marker.state.get("progress"),
            "recipe_sha256": marker.recipe_sha256,
            "written": marker.time,
            "layout": marker.layout,
        },
        "data": data,
        "family": options.family,
        "precision": job.precision.name,
        "rounded": job.rounded,
        "vocab_size": job.plan.vocabulary,
        "verification": verification.as_json() if verification else None,
        "quantised": sorted(job.quantised),
        "not_quantised": job.left_out if job.precision.scheme else {},
        "tensors": {
            entry.name: {
                "file": file,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "blake3": digests[entry.name],
                "compared": verification is not None and job.weight_of[entry.name] in job.compared,
                "megatron": job.plan.by_name[job.weight_of[entry.name]].key,
            }
            for file, entries in job.files.items()
            for entry in entries
        },
    }


def import_provenance(job: ImportJob, verified: bool) -> dict[str, Any]:
    """The content of joy_conversion.json in an imported checkpoint: what came from where, and what was compared."""
    folder, compared = job.folder, job.compared if verified else frozenset()
    sampled = verified and len(compared) < len(job.plan.parameters)
    return {
        "format_version": 1,
        "direction": "from-hf",
        "made_by": _made_by(),
        "source": {"folder": folder.folder.absolute().name, "files": sorted(set(folder.file_of.values()))},
        "precision": DTYPE_NAMES[job.dtype],
        "vocab_size": job.plan.vocabulary,
        "verification": {
            "parameters": len(compared),
            "bytes": sum(job.sizes[key] for key in compared),
            "only_hashed": len(job.plan.parameters) - len(compared),
            "seed": job.sample.seed if sampled else None,
        }
        if verified
        else None,
        "parameters": {
            key: {
                "file": file,
                "dtype": DTYPE_NAMES[job.dtype_of(key)],
                "shape": list(job.plan.parameters[key]),
                "tensors": len(job.plan.by_key[key]),
                "compared": key in compared,
            }
            for file, keys in job.files.items()
            for key in keys
        },
    }


def _made_by() -> dict[str, str]:
    return {
        "megatron_joy": megatron_joy.__version__,
        "torch": torch.__version__,
        "safetensors": version("safetensors"),
    }


def data_read(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What a checkpoint's run has read (`data_summary`). Raises UserError for a ledger that can't be read."""
    state = checkpoint.state
    if not state.get("ledger"):
        return []
    timetable = Timetable(load_recipe(str(checkpoint.recipe_path)))
    return data_summary(state, first_sample(from_json(state["ledger"]), timetable, checkpoint.step + 1))


def data_summary(state: dict[str, Any], end: int) -> list[dict[str, Any]]:
    """Each source that the run has read up to sample `end`: tokens by the ledger's shares, and its shards' fingerprint.

    Samples that a guard went back on count as read.
    """
    tokens: dict[str, Fraction] = {}
    for stretch in in_force(from_json(state["ledger"])):
        read = max(0, min(stretch.samples, end - stretch.start)) * stretch.sequence_length
        total = sum(Fraction(repr(weight)) for _, weight in stretch.blend)
        for label, weight in stretch.blend:
            tokens[label] = tokens.get(label, Fraction(0)) + Fraction(repr(weight)) / total * read
    fingerprints = state.get("sources", {})
    return [
        {"source": label, "tokens": round(count), "fingerprint": fingerprints.get(label)}
        for label, count in sorted(tokens.items())
        if count
    ]


def model_card(job: ExportJob, told: dict[str, Any]) -> str:
    """README.md of the folder: where the weights are from and what was proved of them."""
    checkpoint, progress = told["checkpoint"], told["checkpoint"]["progress"] or {}
    parameters = sum(tensor.elements for tensor in job.plan.tensors if tensor.copy_of is None)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {checkpoint['run']}, step {checkpoint['step']:,}",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {parameters:,} |",
        f"| architecture | {told['family']}, {job.plan.model.num_hidden_layers} layers |",
        f"| precision | {told['precision']}: {job.precision.what} |",
        f"| run, step | {checkpoint['run']}, {checkpoint['step']:,} |",
        f"| tokens seen | {_count(progress.get('tokens'))} |",
        f"| recipe | SHA-256 `{checkpoint['recipe_sha256']}` |",
        f"| written by | megatron-joy {told['made_by']['megatron_joy']} |",
        "",
        *_data_lines(told["data"]),
        "## Verification",
        "",
        *_verification_lines(told["verification"]),
        "",
        f"`{PROVENANCE}` has the BLAKE3 of every tensor, its Megatron name, whether it was compared, and what was "
        "and was not quantised.",
        "",
    ]
    return "\n".join(lines)


def _count(number: int | None) -> str:
    return "not recorded" if number is None else f"{number:,}"


def _data_lines(data: list[dict[str, Any]]) -> list[str]:
    if not data:
        return [
            "## Data",
            "",
            "The checkpoint has no ledger of data: its weights were imported, or not trained yet.",
            "",
        ]
    rows = [f"| {row['source']} | {row['tokens']:,} | `{row['fingerprint']}` |" for row in data]
    return ["## Data", "", "| source | tokens read | fingerprint of its shards |", "|---|---|---|", *rows, ""]


def _verification_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["Not verified (`--no-verify`)."]
    lines = [f"- {found['tensors']:,} tensors ({found['bytes']:,} bytes) were read back and compared bit for bit."]
    if found["only_hashed"]:
        lines.append(
            f"- They are a sample, some of every kind (seed {found['seed']}). Of the other {found['only_hashed']:,} "
            f"only the bytes on disk were checked, by their BLAKE3; `compared` in `{PROVENANCE}` says which are which."
        )
    if found["errors"]:
        worst = max(error["relative"] for error in found["errors"].values())
        lines.append(
            f"- {len(found['errors']):,} quantised weights were dequantised by {found['dequantised_by']}: each number "
            f"within half a step, the largest relative error {worst:.2%}."
        )
    logits = found["logits"]
    if logits is None:
        return [*lines, f"- Logits were not compared: {found['why_no_logits']}."]
    return [
        *lines,
        f"- Against the training model on {logits['tokens']} tokens of text: KL {logits['kl']:.2e} nats a token, the "
        f"same first choice at {logits['top1_agreement']:.1%} of positions, perplexity x "
        f"{logits['perplexity_ratio']:.4f}, largest difference of a logit {logits['max_difference']:.1e}.",
    ]
