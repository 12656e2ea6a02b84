"""The proof of an export: every tensor re-read bit for bit, and logits of the training model against transformers'."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from megatron_joy.convert.hf_folder import INDEX
from megatron_joy.convert.mapping import ConversionPlan
from megatron_joy.convert.precisions.independent import independent
from megatron_joy.convert.precisions.schemes import Scheme, spread
from megatron_joy.convert.precisions.table import Precision
from megatron_joy.convert.progress import Phases
from megatron_joy.convert.safetensors_file import elements_of
from megatron_joy.convert.sample_text import sample_ids
from megatron_joy.errors import WorkError

LOGITS_TOLERANCE = 1e-4  # fp32, the largest absolute difference of any logit
_FP32_ROUNDING = 1e-6
LENGTH = 256  # tokens that are compared
# Two processes hold the model in fp32 at the same time, and loading needs some more.
_BYTES_PER_PARAMETER = 12
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class LogitsAgreement:
    """Training model against transformers on the same tokens, both in fp32 with the exported weights' values."""

    tokens: int
    max_difference: float
    mean_difference: float
    largest_logit: float
    top1_agreement: float  # share of positions
    kl: float = 0.0  # nats a token, of transformers' distribution from the training model's
    perplexity_ratio: float = 1.0  # transformers' over the training model's


@dataclass(frozen=True)
class Error:
    """What quantising did to a weight: the largest difference of an element, and the norm of all over the weight's."""

    largest: float
    relative: float


@dataclass(frozen=True)
class Verification:
    """What was compared. `logits` is None where the model does not fit; `why_no_logits` says so."""

    tensors: int
    bytes: int
    logits: LogitsAgreement | None
    why_no_logits: str | None = None
    errors: dict[str, Error] | None = None
    dequantised_by: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For reports and `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Written:
    """An export to be proved.

    original, stored: name of a tensor of the plan -> it as the checkpoint has it, and what is to be on disk for it.
    weight_of: name on disk -> the plan's. digests: SHA-256 of each tensor as it was written.
    """

    folder: Path
    checkpoint: Path
    plan: ConversionPlan
    precision: Precision
    original: Callable[[str], Tensor]
    stored: Callable[[str], dict[str, Tensor]]
    weight_of: dict[str, str]
    quantised: frozenset[str]
    digests: dict[str, str]


def verify_folder(written: Written, tokenizer: Tokenizer | None, phases: Phases) -> Verification:
    """Raises WorkError when a tensor on disk is not what the checkpoint says, or when the logits differ."""
    size = verify_tensors(written, phases)
    errors, whose = verify_quantised(written, phases) if written.quantised else (None, None)
    problem = memory_problem(written.plan)
    if problem is not None:
        return Verification(len(written.digests), size, None, problem, errors, whose)
    phases("comparing logits with transformers", None)
    length = min(LENGTH, written.plan.model.max_position_embeddings)
    ids = sample_ids(tokenizer, written.plan.vocabulary, length)
    agreement = compare_logits(written.folder, written.checkpoint, ids, written.precision.rest)
    if not written.quantised and not agreement.max_difference <= LOGITS_TOLERANCE:
        raise WorkError(
            f"transformers' logits of the export differ from the training model's by {agreement.max_difference:.2e} "
            f"(expected at most {LOGITS_TOLERANCE:.0e}); it is not kept"
        )
    return Verification(len(written.digests), size, agreement, None, errors, whose)


def verify_tensors(written: Written, phases: Phases) -> int:
    """Reads every tensor back through the safetensors library and compares its bits; returns the bytes compared."""
    total = sum(path.stat().st_size for path in written.folder.glob("*.safetensors"))
    advance = phases("reading back", total)
    size, seen = 0, set()
    latest: tuple[str, dict[str, Tensor]] = ("", {})
    for path in sorted(written.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - not a dictionary
                found = elements_of(stream.get_tensor(name))
                same_as_written = hashlib.sha256(found).hexdigest() == written.digests.get(name)
                weight = written.weight_of.get(name, name)
                if latest[0] != weight:
                    latest = (weight, written.stored(weight))
                if not same_as_written or found != elements_of(latest[1][name]):
                    raise WorkError(f"{path.name}: {name} on disk is not the checkpoint's; the export is not kept")
                advance(found.nbytes)
                size += found.nbytes
                seen.add(name)
    missing = written.weight_of.keys() - seen
    if missing:
        raise WorkError(f"{sorted(missing)[0]} is in no file of the export; it is not kept")
    return size


def verify_quantised(written: Written, phases: Phases) -> tuple[dict[str, Error], str]:
    """Dequantises what is on disk by other code than wrote it; each element must lie within half a step of its scale.

    Returns the error of every quantised weight and whose code it was. Raises WorkError for an element further away.
    """
    scheme = written.precision.scheme
    assert scheme is not None
    dequantise, whose = independent(written.precision, scheme)
    names = [tensor.name for tensor in written.plan.tensors if tensor.name in written.quantised]
    weights = json.loads((written.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    advance = phases("dequantising", sum(written.plan.by_name[name].elements for name in names))
    errors = {}
    with ExitStack() as opened:
        files = {f: opened.enter_context(safe_open(written.folder / f, framework="pt")) for f in set(weights.values())}
        for name in names:
            parts = scheme.parts(written.plan.by_name[name].shape)
            keys = {part.suffix: name.removesuffix("weight") + part.suffix for part in parts}
            stored = {suffix: files[weights[key]].get_tensor(key) for suffix, key in keys.items()}
            errors[name] = error_of(name, written.original(name).float(), dequantise(stored), stored, scheme)
            advance(written.plan.by_name[name].elements)
    return errors, whose


def error_of(name: str, weight: Tensor, found: Tensor, stored: dict[str, Tensor], scheme: Scheme) -> Error:
    """weight, found: fp32 [out, in]. Raises WorkError where an element is more than half a step away."""
    scales = spread(stored[scheme.scale].float(), tuple(weight.shape), scheme.tile)
    difference = (found - weight).abs()
    allowed = scheme.half_step(weight, scales) + weight.abs() * _FP32_ROUNDING
    if not bool((difference <= allowed).all()):
        raise WorkError(f"{name} dequantised is further from the checkpoint's than rounding explains; it is not kept")
    norm = float(torch.linalg.vector_norm(weight))
    return Error(float(difference.max()), float(torch.linalg.vector_norm(difference)) / norm if norm else 0.0)


def memory_problem(plan: ConversionPlan) -> str | None:
    """Why the logits can't be compared on this machine, or None."""
    needed = _BYTES_PER_PARAMETER * sum(tensor.elements for tensor in plan.tensors)
    available = psutil.virtual_memory().available
    if needed <= available:
        return None
    return f"both models in fp32 need {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are free"


def compare_logits(folder: Path, checkpoint: Path, ids: np.ndarray[Any, Any], precision: str) -> LogitsAgreement:
    """Computes logits of both models on ids [1, s], each in a process of its own.

    The CPU stand-ins for Megatron-core's modules live in one of them only, so that they can't touch transformers.
    """
    with tempfile.TemporaryDirectory(prefix="joy-verify-") as scratch:
        np.save(f"{scratch}/ids.npy", ids)
        jobs = [("megatron", checkpoint), ("transformers", folder)]
        running = [(kind, _start(kind, path, Path(scratch), precision)) for kind, path in jobs]
        try:
            for kind, process in running:
                _, errors = process.communicate()
                if process.returncode != 0:
                    last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
                    raise WorkError(f"the logits of {kind} could not be computed: {last}")
        finally:
            for _, process in running:
                process.kill()
        ours, theirs = (torch.from_numpy(np.load(f"{scratch}/{kind}.npy")) for kind, _ in jobs)
    return agreement_of(ours[..., : theirs.shape[-1]], theirs, torch.from_numpy(ids))


def agreement_of(ours: Tensor, theirs: Tensor, ids: Tensor) -> LogitsAgreement:
    """Both [1, s, v] fp32, of the tokens ids [1, s]."""
    difference = (ours - theirs).abs()
    one, other = (F.log_softmax(logits.double(), dim=-1) for logits in (ours, theirs))
    losses = [F.nll_loss(p[0, :-1], ids[0, 1:]) for p in (one, other)]
    return LogitsAgreement(
        tokens=ours.shape[1],
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        largest_logit=float(theirs.abs().max()),
        top1_agreement=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        kl=float(F.kl_div(other, one, log_target=True, reduction="none").sum(-1).mean()),
        perplexity_ratio=float((losses[1] - losses[0]).exp()),
    )


def _start(kind: str, path: Path, scratch: Path, precision: str) -> "subprocess.Popen[bytes]":
    """Starts `megatron_joy.convert.logits` on the CPU, offline, outside any launched world."""
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [sys.executable, "-m", "megatron_joy.convert.logits", kind, str(path.absolute())]
    command += [str(scratch / "ids.npy"), str(scratch / f"{kind}.npy"), precision]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
