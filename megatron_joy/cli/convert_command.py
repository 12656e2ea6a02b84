"""`joy convert`: checkpoints to and from Hugging Face's format."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_joy.errors import UserError
from megatron_joy.recipe import load_recipe

if TYPE_CHECKING:
    from megatron_joy.convert.sample import Sample
    from megatron_joy.convert.to_hf import Export
    from megatron_joy.convert.workers import Crew

app = typer.Typer(help="To and from Hugging Face's format. Example: joy convert to-hf runs/joyai_tiny --out hf/tiny")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", help="Processes; without it by the model's size and this machine's CPUs.")
]
ExecutorOption = Annotated[
    str, typer.Option("--executor", metavar="local|mpi", help="Processes here, or the ranks that mpiexec started.")
]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Prove what was written.")]
VerifySample = Annotated[
    str | None,
    typer.Option(
        "--verify-sample", metavar="SIZE|all", help="Compare everything up to this size, of more a sample; 20GB unsaid."
    ),
]
VerifySeed = Annotated[int | None, typer.Option("--verify-seed", help="Which sample; 0 if not said.")]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str, option: str = "--max-shard-size") -> int:
    """'5GB' as a number of bytes. Raises UserError for anything else than a number and a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"{option} {text}: not a size; expected a number and a unit, as 5GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _sample(verify: bool, size: str | None, seed: int | None) -> "Sample":
    """What a verification compares. Raises UserError for an option that would have no effect."""
    from megatron_joy.convert.sample import VERIFY_BYTES, Sample

    given = [name for name, value in (("--verify-sample", size), ("--verify-seed", seed)) if value is not None]
    if given and not verify:
        raise UserError(f"{given[0]}: nothing is verified with --no-verify; leave one of the two out")
    if size == "all":
        if seed is not None:
            raise UserError("--verify-seed: --verify-sample all compares everything; leave one of the two out")
        return Sample(None)
    return Sample(VERIFY_BYTES if size is None else size_in_bytes(size, "--verify-sample"), seed or 0)


@contextmanager
def _crew(executor: str, command: str, workers: int | None) -> Iterator["Crew | None"]:
    """What starts the workers; None on a rank that was one, and has nothing left to do."""
    if executor == "local":
        from megatron_joy.convert.workers import processes

        yield processes
        return
    if executor != "mpi":
        raise UserError(f"--executor {executor}: expected local or mpi")
    from megatron_joy.platform.mpi import world

    comm = world(command)
    if workers is not None:
        if comm.rank:  # rank 0 says it for all
            yield None
            return
        raise UserError("--workers: has no effect with --executor mpi, whose workers mpiexec starts; remove it")
    from megatron_joy.convert import mpi_workers

    if comm.rank:
        mpi_workers.serve(comm)
        yield None
        return
    with mpi_workers.crew_of(comm) as crew:
        yield crew


def _notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


@app.command("to-hf", epilog="Example: joy convert to-hf runs/joyai_tiny --out hf/joyai_tiny")
def to_hf_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run: its newest whole one.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder.")],
    precision: Annotated[
        str | None, typer.Option(help="bf16, fp32, fp8, int8, int8-channel, int4 or int4-fp8; without it the run's.")
    ] = None,
    family: Annotated[
        str, typer.Option(help="model_type of config.json: deepseek_v3 or joyai_llm_flash.")
    ] = "deepseek_v3",
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file, as 5GB.")] = "5GB",
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The tokenizer's folder; without it the training data's.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Rows of embedding and head to write; without it all, or what was imported.")
    ] = None,
    workers: WorkersOption = None,
    executor: ExecutorOption = "local",
    verify: Verify = True,
    verify_sample: VerifySample = None,
    verify_seed: VerifySeed = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint of any layout as a folder that transformers, vLLM and SGLang load without our code.

    Proved unless --no-verify: every tensor (a sample of a model of more than 20 GB) is read back bit for bit and, for a
    model that fits into memory twice, the training model's logits on real text are compared with transformers'.
    """
    with _crew(executor, "joy convert to-hf CKPT --out DIR", workers) as crew:
        if crew is None:
            return
        from megatron_joy.convert.export_job import ExportOptions
        from megatron_joy.convert.progress import shown_phases
        from megatron_joy.convert.to_hf import to_hf

        size = size_in_bytes(max_shard_size)
        sample = _sample(verify, verify_sample, verify_seed)
        options = ExportOptions(precision, family, size, vocab_size, tokenizer, verify, sample, workers)
        with shown_phases() as phases:
            export = to_hf(checkpoint, out, options, phases, crew)
    _notes(export.notes)
    if as_json:
        print(json.dumps(export.as_json(), indent=2))
    else:
        _print_export(export)


def _print_export(export: "Export") -> None:
    print(
        f"{export.folder}: {export.tensors} tensors, {export.bytes:,} bytes in {len(export.files)} files, "
        f"{export.precision}, from step {export.step} of {export.checkpoint}"
    )
    if export.verification is None:
        return
    print(f"verified: {export.verification.tensors} tensors read back bit for bit")
    if others := export.verification.only_hashed:
        print(
            f"NOT compared: {others} other tensors, whose bytes on disk were checked by their BLAKE3 alone "
            f"(a sample of seed {export.verification.seed}; --verify-sample all compares everything)"
        )
    if errors := export.verification.errors:
        worst = max(errors, key=lambda name: errors[name].relative)
        print(
            f"verified: {len(errors)} quantised weights by {export.verification.dequantised_by}, each number within "
            f"half a step; the largest relative error is {errors[worst].relative:.2%} ({worst})"
        )
    logits = export.verification.logits
    if logits is None:
        print(f"logits not compared: {export.verification.why_no_logits}")
        return
    if export.verification.errors:
        print(
            f"against bf16 on {logits.tokens} tokens of text: KL {logits.kl:.2e} nats, the same first choice at "
            f"{logits.top1_agreement:.1%} of positions, perplexity x {logits.perplexity_ratio:.4f}"
        )
        return
    print(
        f"verified: logits of {logits.tokens} tokens agree with transformers' to {logits.max_difference:.1e} "
        f"(largest logit {logits.largest_logit:.2f}), the first choice at {logits.top1_agreement:.1%} of positions"
    )


@app.command("to-gguf", epilog="Example: joy convert to-gguf hf/joyai_tiny --out joyai_tiny.gguf --type q8_0")
def to_gguf_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face folder, as to-hf writes it.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The new file.")],
    kind: Annotated[str, typer.Option("--type", help="Format of the matrices: bf16, f16 or q8_0.")] = "bf16",
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Write a folder as one GGUF file of llama.cpp's architecture deepseek2, without its MTP layer.

    Proved unless --no-verify: every tensor is read back and dequantised by the gguf package.
    """
    from megatron_joy.convert.gguf_file import to_gguf
    from megatron_joy.convert.progress import shown_phases

    with shown_phases() as phases:
        done = to_gguf(folder, out, kind, verify, phases)
    _notes(done.notes)
    if as_json:
        print(json.dumps(done.as_json(), indent=2))
        return
    print(f"{done.file}: {done.tensors} tensors, {done.bytes:,} bytes, {done.type}")
    if done.largest_error is not None:
        print(f"verified: read back, each number within {done.largest_error:.2%} of its row's largest magnitude")


@app.command("from-hf", epilog="Example: joy convert from-hf hf/joyai_tiny --out imported --recipe joyai_tiny")
def from_hf_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face folder with safetensors.")],
    out: Annotated[Path, typer.Option("--out", metavar="CKPT", help="The new checkpoint folder.")],
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="What it is to be trained with; its model must be the same.")
    ] = None,
    workers: WorkersOption = None,
    executor: ExecutorOption = "local",
    verify: Verify = True,
    verify_sample: VerifySample = None,
    verify_seed: VerifySeed = None,
    as_json: Json = False,
) -> None:
    """Write a folder of the DeepSeek-V3 family as a checkpoint of weights, of step 0, that any layout starts from.

    With --recipe and --out RUN/checkpoints/step_00000000 the recipe becomes the run's too. No code of the folder is run
    and no pickle opened.
    """
    with _crew(executor, "joy convert from-hf DIR --out CKPT", workers) as crew:
        if crew is None:
            return
        from megatron_joy.convert.from_hf import from_hf
        from megatron_joy.convert.progress import shown_phases

        loaded = load_recipe(recipe) if recipe is not None else None
        with shown_phases() as phases:
            sample = _sample(verify, verify_sample, verify_seed)
            done = from_hf(folder, out, loaded, verify, phases, workers, crew=crew, sample=sample)
    _notes(done.notes)
    if as_json:
        print(json.dumps(done.as_json(), indent=2))
        return
    print(f"{done.checkpoint}: {done.parameters} parameters, {done.bytes:,} bytes, {done.precision}, step 0")
    if done.verified and done.seed is None:
        print(f"verified: {done.tensors} tensors read back bit for bit")
    elif done.verified:
        print(
            f"verified: {done.compared} parameters read back bit for bit\n"
            f"NOT compared: {done.parameters - done.compared} other parameters, whose files were checked by their "
            f"BLAKE3 alone (a sample of seed {done.seed}; --verify-sample all compares everything)"
        )
    if done.run_recipe is not None:
        print(f"{done.run_recipe}: the run's recipe")
