"""The proof of an export: every tensor re-read bit for bit, and logits of the training model against transformers'."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from blake3 import blake3
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from megatron_joy.convert.mapping import ConversionPlan
from megatron_joy.convert.precisions.independent import independent
from megatron_joy.convert.precisions.schemes import Scheme, spread
from megatron_joy.convert.precisions.table import Precision
from megatron_joy.convert.progress import Advance
from megatron_joy.convert.safetensors_file import elements_of
from megatron_joy.convert.sample_text import sample_ids
from megatron_joy.errors import WorkError

LOGITS_TOLERANCE = 1e-4  # fp32, the largest absolute difference of any logit
_FP32_ROUNDING = 1e-6
LENGTH = 256  # tokens that are compared
# Two processes hold the model in fp32 at the same time, and loading needs some more.
_BYTES_PER_PARAMETER = 12
_MAPPED = 1 << 28  # bytes of a file that may be mapped into memory at a time
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
    """What was compared. `logits` is None where the model does not fit; `why_no_logits` says so.

    tensors, bytes: those compared bit for bit. only_hashed: the others of a sampled verification, of which the bytes on
    disk were checked against the BLAKE3 of what was written. seed: what the sample was drawn by, None without one.
    errors: of the quantised weights among those compared.
    """

    tensors: int
    bytes: int
    logits: LogitsAgreement | None
    why_no_logits: str | None = None
    errors: dict[str, Error] | None = None
    dequantised_by: str | None = None
    only_hashed: int = 0
    seed: int | None = None

    def as_json(self) -> dict[str, Any]:
        """For reports and `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Written:
    """A file of an export to be proved.

    original: name of a tensor of the plan -> it as the checkpoint has it. stored: the same name -> what is to be on
    disk for it, in pieces. weight_of: name on disk -> the plan's, of all that is compared. digests: BLAKE3 of each
    tensor as it was written.
    """

    plan: ConversionPlan
    precision: Precision
    original: Callable[[str], Tensor]
    stored: Callable[[str], Mapping[str, Iterable[Tensor]]]
    weight_of: dict[str, str]
    quantised: frozenset[str]
    digests: dict[str, str]


@dataclass(frozen=True)
class FileProof:
    """Of a file that holds: how many of its tensors were compared, their bytes, each quantised one's error."""

    tensors: int
    bytes: int
    errors: dict[str, Error]


def verification_of(proofs: Sequence[FileProof], stored: int, precision: Precision, seed: int) -> Verification:
    """The files' proofs as one, without logits yet. stored: tensors in all files."""
    errors = {name: error for proof in proofs for name, error in proof.errors.items()}
    whose = independent(precision, precision.scheme)[1] if precision.scheme else None
    tensors, size = sum(proof.tensors for proof in proofs), sum(proof.bytes for proof in proofs)
    return Verification(
        tensors=tensors,
        bytes=size,
        logits=None,
        errors=errors if whose else None,
        dequantised_by=whose,
        only_hashed=stored - tensors,
        seed=seed if tensors < stored else None,
    )


def with_logits(
    found: Verification,
    folder: Path,
    checkpoint: Path,
    plan: ConversionPlan,
    precision: Precision,
    tokenizer: Tokenizer | None,
) -> Verification:
    """Adds the comparison of logits where the model fits. Raises WorkError when unquantised ones differ."""
    problem = memory_problem(plan)
    if problem is not None:
        return replace(found, why_no_logits=problem)
    ids = sample_ids(tokenizer, plan.vocabulary, min(LENGTH, plan.model.max_position_embeddings))
    agreement = compare_logits(folder, checkpoint, ids, precision.rest)
    if precision.scheme is None and not agreement.max_difference <= LOGITS_TOLERANCE:
        raise WorkError(
            f"transformers' logits of the export differ from the training model's by {agreement.max_difference:.2e} "
            f"(expected at most {LOGITS_TOLERANCE:.0e}); it is not kept"
        )
    return replace(found, logits=agreement)


def verify_file(written: Written, path: Path, advance: Advance) -> FileProof:
    """Reads every tensor of `weight_of` back through the safetensors library and compares its bits with the original's.

    What is quantised is also dequantised by other code than wrote it; each element must lie within half a step of its
    scale. Raises WorkError for a tensor that is missing, not what was written, or further away.
    """
    size, errors = 0, {}
    reader = _Reader(path)
    if missing := written.weight_of.keys() - reader.names:
        raise WorkError(f"{sorted(missing)[0]} is in no file of the export; it is not kept")
    for weight in dict.fromkeys(written.weight_of.values()):
        whole: dict[str, Tensor] = {}
        for name, pieces in written.stored(weight).items():
            size += _check_bits(name, reader.pieces(name, pieces), written.digests, path, advance)
            if weight in written.quantised:
                whole[name.removeprefix(weight.removesuffix("weight"))] = reader.whole(name)
        if weight in written.quantised:
            errors[weight] = _check_error(written, weight, whole)
    return FileProof(len(written.weight_of), size, errors)


class _Reader:
    """A file through the safetensors library, opened anew after some bytes: it maps the file and keeps what it read."""

    def __init__(self, path: Path) -> None:
        self.path, self._left = path, 0
        self._stream: Any = None
        self.names = frozenset(self._opened(0).keys())

    def _opened(self, size: int) -> Any:
        if self._left < size or self._stream is None:
            self._stream, self._left = safe_open(self.path, framework="pt"), _MAPPED
        self._left -= size
        return self._stream

    def whole(self, name: str) -> Tensor:
        """A tensor."""
        tensor: Tensor = self._opened(0).get_tensor(name)
        self._left -= tensor.nbytes
        return tensor

    def pieces(self, name: str, like: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The tensor's rows in pieces as those of `like`, each beside the one it is to be."""
        first = 0
        for expected in like:
            rows = self._opened(expected.nbytes).get_slice(name)[first : first + expected.shape[0]]
            first += expected.shape[0]
            yield rows, expected


def _check_bits(
    name: str, pieces: Iterable[tuple[Tensor, Tensor]], digests: Mapping[str, str], path: Path, advance: Advance
) -> int:
    """Returns the bytes compared."""
    digest, size, same = blake3(), 0, True
    for found, expected in pieces:
        data = elements_of(found)
        digest.update(data)
        same = same and found.dtype == expected.dtype and data == elements_of(expected)
        size += data.nbytes
        advance(data.nbytes)
    if not same or digest.hexdigest() != digests.get(name):
        raise WorkError(f"{path.name}: {name} on disk is not the checkpoint's; the export is not kept")
    return size


def _check_error(written: Written, weight: str, stored: dict[str, Tensor]) -> Error:
    scheme = written.precision.scheme
    assert scheme is not None
    dequantise, _ = independent(written.precision, scheme)
    return error_of(weight, written.original(weight).float(), dequantise(stored), stored, scheme)


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
