"""What it costs to start reading 20 trillion tokens: time and memory from process start to the first micro-batch.

Two shard sets of 40,000 shards are laid out with sparse files, 20 billion and 20 trillion tokens. A process that opens
the stream, checks the size of all 80,000 files and makes its first micro-batch is held against one that only imports
the same modules. Nothing but the manifest is read, so both sizes should cost the same: under 5 seconds and 300 MB.

For comparison, Megatron-core's GPTDataset builds its indices for two small sizes on the same machine; what it would
need for 20 trillion tokens is extrapolated from the two in a straight line, and marked so.

    python benchmarks/startup.py [--shards 40000] [--repeats 3] [--scratch FOLDER] [--no-peer]

prints one JSON object a line.
"""

import argparse
import hashlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

SEQUENCE_LENGTH = 4096
MICRO_BATCH = 8
TOKENS_PER_DOCUMENT = 1000
VOCABULARY = 129_280
TOKEN_TOTALS = (20_000_000_000, 20_000_000_000_000)
PEER_TOKENS = (500_000_000, 2_000_000_000)
PROMISED_SECONDS, PROMISED_MB = 5.0, 300.0
HEADER_BYTES, DOCUMENT_BYTES = 42, 20  # of an .idx: fixed part, and length, pointer and document index of each


def lay_out(folder: Path, shards: int, tokens: int) -> None:
    """A shard set of that many tokens: the manifest in full, files that are holes of the right sizes."""
    from megatron_joy.data import manifest as m

    each = tokens // shards
    documents = each // TOKENS_PER_DOCUMENT
    sizes = {".bin": 4 * each, ".idx": HEADER_BYTES + DOCUMENT_BYTES * documents}
    entries = []
    for number in range(shards):
        name = f"shard_{number:05d}"
        for suffix, size in sizes.items():
            with open(folder / (name + suffix), "ab") as stream:
                os.truncate(stream.fileno(), size)
        digest = hashlib.sha256(f"{tokens} {number}".encode()).hexdigest()
        entries.append(
            m.ShardEntry(
                name=name,
                documents=documents,
                tokens=each,
                bin_bytes=sizes[".bin"],
                bin_blake3=digest,
                idx_bytes=sizes[".idx"],
                idx_blake3=digest[::-1],
                provenance=f"{name}.documents.jsonl.zst",
                provenance_blake3=digest,
            )
        )
    total = documents * shards
    manifest = m.Manifest(
        source="startup",
        split="train",
        tokenizer=m.TokenizerIdentity(sha256="0" * 64, vocab_size=VOCABULARY, eod_id=1, eod_token="<eod>"),
        dtype="int32",
        totals=m.Totals(documents=total, tokens=each * shards, bytes_text=4 * each * shards),
        accounts=m.Accounts(documents_in=total, documents_out=total, dropped={}),
        shards=entries,
    )
    m.write_manifest(folder, manifest)


def peak_megabytes() -> float:
    """The most memory this process ever had, in MB (10^6 bytes); VmHWM starts anew with each program."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("no VmHWM in /proc/self/status")


def child_bare() -> dict[str, float]:
    """Imports what a training process imports to read data."""
    for name in ("megatron_joy.recipe", "megatron_joy.data.batch"):
        importlib.import_module(name)
    return {}


def child_start(folder: str) -> dict[str, float]:
    """The same imports, then up to the first micro-batch. Seconds (of the clock and of the CPU) count after them."""
    child_bare()
    from megatron_joy.data.batch import BatchLoader
    from megatron_joy.data.steps import BatchShape, micro_batch_indices
    from megatron_joy.data.stream import SampleStream
    from megatron_joy.recipe.schema import DataSection, SourceEntry

    cpu, marks = time.process_time(), [time.perf_counter()]
    data = DataSection(sequence_length=SEQUENCE_LENGTH, train=[SourceEntry(manifest=folder)])
    stream = SampleStream(data, 1234, "train")
    marks.append(time.perf_counter())
    stream.check_sizes()
    marks.append(time.perf_counter())
    deal = partial(micro_batch_indices, shape=BatchShape(8 * MICRO_BATCH, MICRO_BATCH, 8), data_parallel_rank=3)
    with BatchLoader(stream, deal, True, first_step=10_000) as loader:
        assert next(loader)[0].tokens.shape == (MICRO_BATCH, SEQUENCE_LENGTH)
        marks.append(time.perf_counter())
    names = ("open_seconds", "check_sizes_seconds", "first_batch_seconds")
    phases = {name: b - a for name, a, b in zip(names, marks, marks[1:], strict=False)}
    return {**phases, "seconds_beyond_imports": marks[-1] - marks[0], "cpu_seconds": time.process_time() - cpu}


def child_peer(folder: str) -> dict[str, float]:
    """Megatron-core's own index building for the one prefix in the folder, its imports not counted."""
    import numpy as np
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = VOCABULARY, 1, 0, {}

    before, cpu, start = peak_megabytes(), time.process_time(), time.perf_counter()
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQUENCE_LENGTH,
        blend=([f"{folder}/shard"], None),
        split="1,0,0",
        path_to_cache=f"{folder}/cache",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(f"{folder}/shard")
    dataset = GPTDataset(indexed, f"{folder}/shard", np.arange(len(indexed), dtype=np.int32), None, Split.train, config)
    assert len(dataset[0]["tokens"]) == SEQUENCE_LENGTH
    seconds = time.perf_counter() - start
    index = sum(path.stat().st_size for path in Path(folder, "cache").iterdir())
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "megabytes": peak_megabytes() - before,
        "index_megabytes": index / 1e6,
    }


CHILDREN = {"bare": child_bare, "start": child_start, "peer": child_peer}


def measure(*arguments: str) -> dict[str, Any]:
    """Runs a child; adds the seconds from its start to its report, and its peak of memory."""
    start = time.time()
    command = [sys.executable, "-W", "ignore", __file__, "--child", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    report["total_seconds"] = report.pop("finished") - start
    return report


def median_of(repeats: int, *arguments: str) -> dict[str, float]:
    """The median of each number over some runs."""
    reports = [measure(*arguments) for _ in range(repeats)]
    return {name: statistics.median(report[name] for report in reports) for name in reports[0]}


def ours(scratch: Path, shards: int, repeats: int) -> None:
    """Both sizes against bare imports."""
    bare = median_of(repeats, "bare")
    print(json.dumps({"case": "bare imports", **rounded(bare)}), flush=True)
    for tokens in TOKEN_TOTALS:
        lay_out(scratch, shards, tokens)
        started = median_of(repeats, "start", str(scratch))
        started["megabytes_beyond_imports"] = started["peak_megabytes"] - bare["peak_megabytes"]
        kept = (
            started["seconds_beyond_imports"] < PROMISED_SECONDS and started["megabytes_beyond_imports"] < PROMISED_MB
        )
        row = {"case": "start", "tokens": tokens, "shards": shards, **rounded(started), "promise_kept": kept}
        print(json.dumps(row), flush=True)


def peer(scratch: Path) -> None:
    """Megatron-core at two small sizes, and the straight line through them to the full one."""
    import numpy as np

    from megatron_joy.data.shards import index_bytes

    rows = []
    for tokens in PEER_TOKENS:
        lengths = np.full(tokens // TOKENS_PER_DOCUMENT, TOKENS_PER_DOCUMENT, dtype=np.int32)
        folder = scratch / f"peer_{tokens}"
        folder.mkdir()
        (folder / "shard.idx").write_bytes(index_bytes(lengths, np.dtype("<i4")))
        with open(folder / "shard.bin", "wb") as stream:
            os.truncate(stream.fileno(), 4 * tokens)
        row = measure("peer", str(folder))
        rows.append(row)
        case = "megatron-core GPTDataset, first start"
        print(json.dumps({"case": case, "tokens": tokens, **rounded(row)}), flush=True)
    (small, large), full = rows, TOKEN_TOTALS[-1]
    line = {
        name: small[name] + (large[name] - small[name]) * (full - PEER_TOKENS[0]) / (PEER_TOKENS[1] - PEER_TOKENS[0])
        for name in ("cpu_seconds", "megabytes", "index_megabytes")
    }
    note = "extrapolated in a straight line, not measured; later starts read the cached index instead"
    print(json.dumps({"case": "megatron-core GPTDataset", "tokens": full, **rounded(line), "note": note}))


def rounded(numbers: dict[str, float]) -> dict[str, float]:
    """Three digits after the point are more than such measurements carry."""
    return {name: round(value, 3) for name, value in numbers.items()}


def main() -> None:
    """Parses the command line; `--child` is how this file starts itself."""
    if sys.argv[1:2] == ["--child"]:
        report = CHILDREN[sys.argv[2]](*sys.argv[3:])
        print(json.dumps({**report, "finished": time.time(), "peak_megabytes": peak_megabytes()}))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", help="where the sparse files are made; default: the system's temporary folder")
    parser.add_argument("--no-peer", action="store_true", help="leave Megatron-core out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        ours(Path(scratch), options.shards, options.repeats)
        if not options.no_peer:
            peer(Path(scratch))


if __name__ == "__main__":
    main()
