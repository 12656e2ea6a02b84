"""What it costs to take a large checkpoint to and from Hugging Face's format: memory, speed against cp, workers.

A folder with the true widths of joyai_48b_a3b and fewer layers and experts is written with random numbers, shard by
shard, and taken in (`joy convert from-hf`); the checkpoint is taken out again in bf16 and fp8 by one process and by
two, each in a process of its own whose memory is watched. Right before each, cp copies the same files and syncs them;
files are dropped from the page cache before they are read. What comes out in bf16 must be what went in, bit for bit.
Two sizes show whether memory grows with the model. transformers' own from_pretrained and save_pretrained do the like on
a small model.

    python benchmarks/conversion.py --scratch FOLDER [--layers 7,14] [--experts 64] [--precisions bf16,fp8] [--no-peer]

needs about three times the largest model's bytes in FOLDER (14 layers: 10.4 GB) and prints one JSON object a line.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

RECIPE = "joyai_48b_a3b"
SHARD_BYTES = 1_000_000_000
PEER = {"num_hidden_layers": 2, "n_routed_experts": 16}
FULL_BYTES = 98_572_189_184  # the 48B in bf16: 2 x (48,942,542,592 + 78,786,560 of MTP + 264,765,440, head's copy)


def write_folder(folder: Path, layers: int, experts: int) -> tuple[int, dict[str, str]]:
    """Random numbers under the names and shapes of the model; returns the bytes and the BLAKE3 of all tensors."""
    import torch

    from megatron_joy.convert.export_job import file_contents
    from megatron_joy.convert.hf_config import SpecialTokens, model_config
    from megatron_joy.convert.mapping import conversion_plan
    from megatron_joy.convert.precisions.table import left_out, precision_of
    from megatron_joy.convert.safetensors_file import DTYPES, Entry, write_file
    from megatron_joy.recipe import load_recipe

    model = load_recipe(RECIPE).model.model_copy(update={"num_hidden_layers": layers, "n_routed_experts": experts})
    plan, precision = conversion_plan(model), precision_of("bf16")
    pool = torch.randn(1 << 25, generator=torch.Generator().manual_seed(1)).mul_(0.02)
    pools = {dtype: pool.to(DTYPES[dtype][1]) for dtype in ("bf16", "fp32")}
    firsts = {tensor.name: 7919 * i for i, tensor in enumerate(plan.tensors)}

    def produce(entry: Entry) -> Mapping[str, Iterator[Any]]:
        tensor = plan.by_name[entry.name]
        return {entry.name: rows(pools[entry.dtype], firsts[tensor.copy_of or tensor.name], entry.shape)}

    def rows(numbers: Any, first: int, shape: tuple[int, ...]) -> Iterator[Any]:
        width = shape[1] if len(shape) > 1 else 1
        for row in range(0, shape[0], 2048):
            size = min(2048, shape[0] - row) * width
            start = (first + row) % (len(numbers) - size)
            yield numbers[start : start + size].view(-1, *shape[1:])

    folder.mkdir()
    files = file_contents(plan, precision, left_out(plan, precision), SHARD_BYTES)
    digests: dict[str, str] = {}
    for name, entries in files.items():
        digests |= write_file(folder / name, entries, produce)
    weight_map = {entry.name: name for name, entries in files.items() for entry in entries}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = model_config(model, "deepseek_v3", "bf16", plan.vocabulary, SpecialTokens())
    (folder / "config.json").write_text(json.dumps(config))
    return sum(entry.bytes for entries in files.values() for entry in entries), digests


def drop_from_cache(folder: Path) -> None:
    """Asks the kernel to forget the files' pages, which are on the disk already."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextmanager
def watched_memory(pid: int) -> Iterator[dict[int, int]]:
    """Peak resident bytes of a process and of each of its children, by pid, while the block runs."""
    peaks: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            try:
                for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
                    peaks[process.pid] = int(line.split()[1]) * 1024
            except (psutil.Error, OSError, ValueError):
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def timed(command: list[str]) -> dict[str, Any]:
    """Runs a command: seconds of the clock and of all its processes' CPUs, peaks of the largest process and of all."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, watched_memory(process.pid) as peaks:
        printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{command} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mb": round(max(peaks.values(), default=0) / 1e6),
        "peak_mb_of_all": round(sum(peaks.values()) / 1e6),
        "printed": printed,
    }


def copied(folder: Path, out: Path) -> dict[str, Any]:
    """cp, then a sync of what it wrote; the copy is removed."""
    drop_from_cache(folder)
    found = timed(["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(folder), str(out)])
    shutil.rmtree(out)
    return found


def converted(arguments: list[str], source: Path, out: Path) -> dict[str, Any]:
    """`joy convert` with these arguments, and cp of its source; the ratio of their times, 1 being as fast as cp."""
    copy = copied(source, out.with_name("copy"))
    drop_from_cache(source)
    found = timed([sys.executable, "-m", "megatron_joy.cli.main", "convert", *arguments, "--out", str(out), "--json"])
    told = json.loads(found.pop("printed"))
    return {
        **found,
        "workers": told["workers"],
        "bytes_written": told["bytes"],
        "cp_seconds": copy["seconds"],
        "cp_cpu_seconds": copy["cpu_seconds"],
        "ratio_to_cp": round(copy["seconds"] / found["seconds"], 2),
    }


def size_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def one_size(scratch: Path, layers: int, options: argparse.Namespace) -> None:
    """Both directions at one size."""
    hf, checkpoint, out = scratch / "hf", scratch / "step_00000000", scratch / "out"
    size, original = write_folder(hf, layers, options.experts)
    common = {"layers": layers, "experts": options.experts, "model_bytes": size}
    for workers in options.workers:
        shutil.rmtree(checkpoint, ignore_errors=True)
        show(
            "from-hf", common, converted(["from-hf", str(hf), "--no-verify", "--workers", str(workers)], hf, checkpoint)
        )
    shutil.rmtree(hf)
    digests = {"bf16": original}
    for precision in options.precisions:
        for workers, verify in [(n, False) for n in options.workers] + [(options.workers[-1], True)] * options.verify:
            arguments = ["to-hf", str(checkpoint), "--precision", precision, "--workers", str(workers)]
            arguments += ["--max-shard-size", str(SHARD_BYTES)] + ["--no-verify"] * (not verify)
            row = converted(arguments, checkpoint, out)
            told = json.loads((out / "joy_conversion.json").read_text())["tensors"]
            found = {name: entry["blake3"] for name, entry in told.items()}
            assert found == digests.setdefault(precision, found), "other bytes than went in, or with other workers"
            row |= {"verified": verify, "hours_for_48b": round(row["seconds"] * FULL_BYTES / size / 3600, 2)}
            show(f"to-hf {precision}", common, row)
            shutil.rmtree(out)
    shutil.rmtree(checkpoint)


def show(case: str, common: dict[str, Any], row: dict[str, Any]) -> None:
    """One line."""
    print(json.dumps({"case": case, **common, **row}), flush=True)


PEER_CODE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, local_files_only=True)
model.save_pretrained(sys.argv[2], max_shard_size=int(sys.argv[3]))
"""


def peer(scratch: Path) -> None:
    """transformers' from_pretrained and save_pretrained against our two directions, on the same small folder."""
    hf, out = scratch / "hf", scratch / "out"
    size, _ = write_folder(hf, PEER["num_hidden_layers"], PEER["n_routed_experts"])
    common = {"layers": PEER["num_hidden_layers"], "experts": PEER["n_routed_experts"], "model_bytes": size}
    copy = copied(hf, scratch / "copy")
    drop_from_cache(hf)
    theirs = timed([sys.executable, "-W", "ignore", "-c", PEER_CODE, str(hf), str(out), str(SHARD_BYTES)])
    del theirs["printed"]
    show("transformers from_pretrained and save_pretrained", common, {**theirs, "cp_seconds": copy["seconds"]})
    shutil.rmtree(out)
    checkpoint = scratch / "step_00000000"
    there = converted(["from-hf", str(hf), "--no-verify", "--workers", "1"], hf, checkpoint)
    back = converted(["to-hf", str(checkpoint), "--no-verify", "--workers", "1"], checkpoint, out)
    total = {key: round(there[key] + back[key], 2) for key in ("seconds", "cpu_seconds")}
    show("ours, from-hf and to-hf", common, {**total, "peak_mb": max(there["peak_mb"], back["peak_mb"])})
    for folder in (hf, out, scratch / "step_00000000"):
        shutil.rmtree(folder)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731 - a type for argparse
    parser.add_argument("--scratch", help="where files are made and removed; default: the system's temporary folder")
    parser.add_argument("--layers", type=numbers, default=[7, 14], help="sizes, each a number of layers")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--workers", type=numbers, default=[1, 2])
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["bf16", "fp8"])
    parser.add_argument("--verify", action="store_true", help="time the verified export as well")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for layers in options.layers:
            one_size(Path(scratch), layers, options)
        if not options.no_peer:
            peer(Path(scratch))


if __name__ == "__main__":
    main()
