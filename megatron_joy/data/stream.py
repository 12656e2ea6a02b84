"""Sample k of a run: a pure function of the recipe's seed, its blend, the manifests and k.

No rank, layout, batch size or restart enters, so all of them agree, and resuming takes one integer. In short
(docs/samples.md has the equations):

    k -> blend -> (source, reading) -> permutation of the epoch -> sample of the source -> range of tokens
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import orjson

from megatron_joy.data.blend import Blend, BlendSegment
from megatron_joy.data.manifest import repeated_names
from megatron_joy.data.order import SourceOrder
from megatron_joy.data.source import DocumentPiece, Source
from megatron_joy.errors import UserError
from megatron_joy.recipe.schema import DataSection, Recipe, SourceEntry

Split = Literal["train", "validation"]

ORDER_VERSION = 1  # of the way from k to tokens; part of the fingerprint that a checkpoint keeps


@dataclass(frozen=True, slots=True)
class Place:
    """Where sample k is: source, epoch of that source, sample index in it, first token in the source's text."""

    source: str
    epoch: int
    index: int
    token_offset: int


@dataclass(frozen=True, slots=True)
class Sample:
    """tokens int64 [sequence_length + 1]; where they are, as in `Place`; `eod`: the id that ends each document."""

    tokens: npt.NDArray[np.int64]
    source: str
    epoch: int
    index: int
    token_offset: int
    eod: int


class SampleStream:
    """The endless stream of one split's samples.

    Attributes: sources (name -> Source), eod_id, vocab_size and tokenizer_sha256 of the shards, sequence_length.
    Two manifests of one name are told apart by their paths. Raises UserError when the split has no source, one source
    is given twice, sources or `data.tokenizer` differ in tokenizer, and as `Source` and `cycle_counts` do.
    """

    def __init__(self, data: DataSection, seed: int, split: Split) -> None:
        entries: list[SourceEntry] = getattr(data, split)
        if not entries:
            raise UserError(f"data.{split}: no source; add [[data.{split}]] with manifest = a folder of shards")
        self.sequence_length = data.sequence_length
        opened = [Source(entry.manifest, data.sequence_length) for entry in entries]
        _check_distinct(split, entries, opened)
        _check_one_tokenizer(opened, data.tokenizer)
        names = _names(entries, opened)
        self.sources: Mapping[str, Source] = dict(zip(names, opened, strict=True))
        tokenizer = opened[0].manifest.tokenizer
        self.eod_id, self.vocab_size = tokenizer.eod_id, tokenizer.vocab_size
        self.tokenizer_sha256 = tokenizer.sha256
        self._seed = seed
        self._orders = {n: SourceOrder(seed, x.fingerprint, x.samples) for n, x in self.sources.items()}
        self._blend = Blend([BlendSegment(0, {n: entry.weight for n, entry in zip(names, entries, strict=True)})])

    def place(self, k: int) -> Place:
        """Where sample k is, without reading it."""
        name, reading = self._blend.locate(k)
        epoch, index = self._orders[name].sample_at(reading)
        return Place(name, epoch, index, self.sources[name].token_offset(index))

    def sample(self, k: int) -> Sample:
        """Sample k, read from its shards. Raises UserError for a shard that is missing, cut or damaged."""
        place = self.place(k)
        tokens = self.sources[place.source].sample(place.index)
        return Sample(tokens, place.source, place.epoch, place.index, place.token_offset, self.eod_id)

    def documents(self, k: int) -> list[DocumentPiece]:
        """The documents that sample k's tokens are of, in order."""
        place = self.place(k)
        return self.sources[place.source].documents(place.index)

    def sample_number(self, source: str, epoch: int, index: int) -> int | None:
        """The k at which sample `index` of a source is read in `epoch`: the inverse of `place`."""
        return self._blend.sample_of(source, self._orders[source].reading_of(epoch, index))

    def sources_in(self, samples: range) -> dict[str, int]:
        """How many of the consecutive samples are of each source (all sources named)."""
        before, after = self._blend.readings_before(samples.start), self._blend.readings_before(samples.stop)
        return {name: after.get(name, 0) - before.get(name, 0) for name in self.sources}

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source has been read through after so many samples of the run."""
        read = self._blend.readings_before(samples)
        return {name: read.get(name, 0) / source.samples for name, source in self.sources.items()}

    def fingerprint(self) -> str:
        """SHA-256 of all that determines the samples: two streams that have it in common give the same ones."""
        blend = [
            (start, [(self.sources[name].fingerprint, slots) for name, slots in shares])
            for start, shares in self._blend.description()
        ]
        return hashlib.sha256(orjson.dumps([ORDER_VERSION, self._seed, self.sequence_length, blend])).hexdigest()

    def check_sizes(self) -> None:
        """Holds the size of every shard file against its manifest; for one rank to do before training."""
        for source in self.sources.values():
            source.check_sizes()

    def close(self) -> None:
        """Closes open shards."""
        for source in self.sources.values():
            source.close()


def open_streams(recipe: Recipe) -> tuple[SampleStream, SampleStream | None]:
    """The training stream and, where the recipe has validation sources, the validation stream.

    Raises UserError as `SampleStream`, when both were made with different tokenizers, and when the tokenizer has more
    entries than the model.
    """
    train = SampleStream(recipe.data, recipe.seed, "train")
    validation = SampleStream(recipe.data, recipe.seed, "validation") if recipe.data.validation else None
    first = recipe.data.train[0].manifest
    if validation is not None and validation.tokenizer_sha256 != train.tokenizer_sha256:
        raise UserError(
            f"data.validation: {recipe.data.validation[0].manifest} has tokenizer {validation.tokenizer_sha256[:12]}, "
            f"expected {train.tokenizer_sha256[:12]} as {first} of data.train; make both with one tokenizer"
        )
    if train.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {recipe.model.vocab_size}, expected at least {train.vocab_size}, the tokenizer's in "
            f"{first}; set model.vocab_size={train.vocab_size} or more"
        )
    return train, validation


def _names(entries: Sequence[SourceEntry], sources: Sequence[Source]) -> list[str]:
    """What each source is called in this run: its manifest's name, with the folder where two have one name."""
    shared = set(repeated_names(source.name for source in sources))
    return [
        f"{source.name} ({entry.manifest})" if source.name in shared else source.name
        for source, entry in zip(sources, entries, strict=True)
    ]


def _check_distinct(split: Split, entries: Sequence[SourceEntry], sources: Sequence[Source]) -> None:
    """Refuses one content under two entries: both would be read in the same order, each sample twice."""
    seen: dict[str, str] = {}
    for entry, source in zip(entries, sources, strict=True):
        if source.fingerprint in seen:
            raise UserError(
                f"data.{split}: {seen[source.fingerprint]} and {entry.manifest} hold the same shards; keep one, with "
                "the sum of their weights"
            )
        seen[source.fingerprint] = entry.manifest


def _check_one_tokenizer(sources: Sequence[Source], folder: str | None) -> None:
    """Every source is of one tokenizer: the recipe's where it names one, else the first source's."""
    expected, owner = sources[0].manifest.tokenizer.sha256, str(sources[0].folder)
    if folder is not None:
        path = Path(folder) / "tokenizer.json"
        try:
            expected, owner = hashlib.sha256(path.read_bytes()).hexdigest(), str(path)
        except OSError as error:
            raise UserError(f"data.tokenizer: {path} cannot be read ({error.strerror}); name its folder") from None
    eod = sources[0].manifest.tokenizer.eod_id
    for source in sources:
        found = source.manifest.tokenizer
        if found.sha256 != expected:
            raise UserError(
                f"{source.folder}: made with tokenizer {found.sha256[:12]}, expected {expected[:12]} of {owner}; "
                "tokenize this source again with that one"
            )
        if found.eod_id != eod:
            raise UserError(
                f"{source.folder}: documents end with id {found.eod_id}, expected {eod} as in {sources[0].folder}; "
                "tokenize this source again"
            )
