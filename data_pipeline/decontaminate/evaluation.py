"""Evaluation sets as n-grams: a folder of JSONL files, one for each benchmark, one item a line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from data_pipeline.dedup.minhash import Hashes, MinHash, Numbers
from megatron_joy.errors import UserError

GRAM = 13  # words, or characters of Chinese; see dedup/words.py
SHORTEST = 8  # words of the shortest item that is looked for; shorter ones are everyday language
TABLE_BITS = 20


@dataclass(frozen=True)
class Item:
    """One item: its benchmark (the file's name), its line from 1, how many n-grams it has (0: too short)."""

    benchmark: str
    line: int
    grams: int


def _texts(value: Any, fields: Sequence[str]) -> Iterator[str]:
    """The strings of an item: of these fields, or of all, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, ())
    elif isinstance(value, dict):
        for name, part in value.items():
            if not fields or name in fields:
                yield from _texts(part, ())


def item_files(folder: Path) -> list[Path]:
    """The files of the evaluation sets, in order. Raises UserError when there is none."""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise UserError(f"{folder}: no .jsonl file; give a folder with one JSONL file for each benchmark")
    return paths


def read_items(folder: Path, fields: Sequence[str] = ()) -> Iterator[tuple[str, int, str]]:
    """(benchmark, line, text) of every item. Raises UserError for a folder without items or a line that is none."""
    for path in item_files(folder):
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    text = "\n".join(_texts(orjson.loads(line), fields))
                except orjson.JSONDecodeError as error:
                    raise UserError(f"{path}: line {number} is not JSON ({error}); mend or remove it") from None
                if not text.strip():
                    wanted = f"a string in {', '.join(fields)}" if fields else "a string"
                    raise UserError(f"{path}: line {number} has no text, expected {wanted}; mend or remove it")
                yield path.stem, number, text


@dataclass(frozen=True)
class EvaluationIndex:
    """Which n-gram is in which items.

    hashes: uint64 [n], ascending; the items of n-gram i are owners[starts[i]:starts[i + 1]], numbers in `items`;
    lengths: how many words the n-grams are long: 13, and those of shorter items.
    """

    items: list[Item]
    hashes: Hashes
    starts: Numbers
    owners: Numbers
    lengths: tuple[int, ...]

    @cached_property
    def _table(self) -> npt.NDArray[np.bool_]:
        """Whether any n-gram begins with these bits: nearly all of a text's are ruled out by one look."""
        table = np.zeros(1 << TABLE_BITS, dtype=bool)
        table[self.hashes >> np.uint64(64 - TABLE_BITS)] = True
        return table

    @cached_property
    def _methods(self) -> list[MinHash]:
        return [MinHash(gram=length) for length in self.lengths]

    def grams_in(self, text: bytes) -> Numbers:
        """The evaluation n-grams (indices into `hashes`, ascending, each once) that a UTF-8 text holds."""
        found = [np.zeros(0, dtype=np.int64)]
        for method in self._methods:
            hashes = method.all_shingles(text)
            hashes = hashes[self._table[hashes >> np.uint64(64 - TABLE_BITS)]]
            if len(hashes):
                places = np.searchsorted(self.hashes, hashes)
                inside = places < len(self.hashes)
                places = places[inside]
                found.append(places[self.hashes[places] == hashes[inside]])
        return np.unique(np.concatenate(found))

    def hits(self, grams: Numbers) -> dict[int, Numbers]:
        """For each item that has some of these n-grams: their places in `owners`."""
        found: dict[int, list[int]] = {}
        for gram in grams.tolist():
            for place in range(self.starts[gram], self.starts[gram + 1]):
                found.setdefault(int(self.owners[place]), []).append(place)
        return {item: np.array(places, dtype=np.int64) for item, places in found.items()}


def index_items(texts: Iterator[tuple[str, int, str]], gram: int = GRAM, shortest: int = SHORTEST) -> EvaluationIndex:
    """Make the index. Items of fewer than `gram` words are one n-gram of their own length, down to `shortest` words."""
    items: list[Item] = []
    pairs: list[tuple[Hashes, int]] = []
    lengths = {gram}
    words = MinHash(gram=1)
    whole = MinHash(gram=gram)
    for number, (benchmark, line, text) in enumerate(texts):
        content = text.encode()
        count = len(words.all_shingles(content))
        hashes = whole.shingles(content) if count >= shortest else np.zeros(0, np.uint64)
        if shortest <= count < gram:
            lengths.add(count)
        items.append(Item(benchmark, line, len(hashes)))
        pairs.append((hashes, number))
    hashes = np.concatenate([np.zeros(0, np.uint64), *(own for own, _ in pairs)])
    owners = np.concatenate([np.zeros(0, np.int64), *(np.full(len(own), number) for own, number in pairs)])
    order = np.lexsort((owners, hashes))
    unique, starts = np.unique(hashes[order], return_index=True)
    ends = np.append(starts, len(hashes)).astype(np.int64)
    return EvaluationIndex(items, unique, ends, owners[order], tuple(sorted(lengths)))
