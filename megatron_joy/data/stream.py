"""Sample k of a run: a pure function of the recipe's seed, its blend, the manifests and k.

No rank, layout, batch size or restart enters, so all of them agree, and resuming takes one integer. In short
(docs/samples.md has the equations):

    k -> blend -> (source at a length, reading) -> permutation of the epoch -> sample -> range of tokens
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import orjson

from megatron_joy.data.blend import Blend, BlendSegment
from megatron_joy.data.manifest import load_manifest, repeated_names
from megatron_joy.data.order import SourceOrder
from megatron_joy.data.source import DocumentPiece, Source
from megatron_joy.errors import UserError
from megatron_joy.recipe.ledger import Entry, Ledger, Stretch, begin, in_force, planned_tokens
from megatron_joy.recipe.schema import DataSection, Recipe, SourceEntry

Split = Literal["train", "validation"]

ORDER_VERSION = 2  # of the way from k to tokens; part of the fingerprint that a checkpoint keeps


@dataclass(frozen=True, slots=True)
class Place:
    """Where sample k is: source, epoch of that source, sample index in it, first token in the source's text.

    Epoch and index are those of the source at this sequence length.
    """

    source: str
    epoch: int
    index: int
    token_offset: int
    sequence_length: int


@dataclass(frozen=True, slots=True)
class Sample:
    """tokens int64 [sequence_length + 1]; where they are, as in `Place`; `eod`: the id that ends each document."""

    tokens: npt.NDArray[np.int64]
    source: str
    epoch: int
    index: int
    token_offset: int
    eod: int


Lane = tuple[str, int]  # a source as the recipe labels it, at one sequence length: read in an order of its own


class SampleStream:
    """The endless stream of one split's samples.

    ledger: the run's blends and lengths, where it has more than those of `data` (`recipe.ledger`). A source of the
    ledger that `data` no longer names counts on, but its samples can't be read.

    Attributes: sources (name -> Source), eod_id, vocab_size and tokenizer_sha256 of the shards, labels (source's label
    in the recipe -> fingerprint of its shards). Two manifests of one name are told apart by their paths. Raises
    UserError when the split has no source, one source is given twice, sources or `data.tokenizer` differ in tokenizer,
    a source is to be read at a length that the run's plan gave none of its text, and as `Source` and `cycle_counts` do.
    """

    def __init__(self, data: DataSection, seed: int, split: Split, ledger: Ledger | None = None) -> None:
        entries: list[SourceEntry] = getattr(data, split)
        if not entries:
            raise UserError(f"data.{split}: no source; add [[data.{split}]] with manifest = a folder of shards")
        ledger = ledger or _plain(entries, data.sequence_length)
        self._lanes = _open_lanes(entries, planned_tokens(ledger), seed, data.sequence_length)
        opened = [next(s for (label, _), s in self._lanes.items() if label == entry.label) for entry in entries]
        _check_distinct(split, entries, opened)
        _check_one_tokenizer(opened, data.tokenizer)
        self._names = {entry.label: name for entry, name in zip(entries, _names(entries, opened), strict=True)}
        self.sources: Mapping[str, Source] = dict(zip(self._names.values(), opened, strict=True))
        self.labels = {entry.label: source.fingerprint for entry, source in zip(entries, opened, strict=True)}
        tokenizer = opened[0].manifest.tokenizer
        self.eod_id, self.vocab_size = tokenizer.eod_id, tokenizer.vocab_size
        self.tokenizer_sha256 = tokenizer.sha256
        self._seed = seed
        self._orders = {lane: SourceOrder(seed, x.fingerprint, x.samples) for lane, x in self._lanes.items()}
        self.follow(ledger)

    def follow(self, ledger: Ledger) -> None:
        """Goes by this ledger from now on: the one so far, or what a guard made of it. No sample may be being read.

        Raises UserError for a source at a length that the run's plan gave none of its text.
        """
        self._blend = Blend(
            [
                BlendSegment(x.start, {(label, x.sequence_length): weight for label, weight in x.blend})
                for x in in_force(ledger)
            ]
        )
        self._check_lanes(ledger)

    def _check_lanes(self, ledger: Ledger) -> None:
        """What the newest entry reads must have been planned when the run, or the source in it, began."""
        for stretch in ledger[-1].stretches:
            for label, _ in stretch.blend:
                if label in self._names and (label, stretch.sequence_length) not in self._lanes:
                    planned = [length for name, length in self._lanes if name == label]
                    raise UserError(
                        f"source {label}: its text is shared out to sequence lengths of {planned} since it came into "
                        f"the run, and the recipe now reads it at {stretch.sequence_length}; give that stage a source "
                        "of its own"
                    )

    def _lane(self, lane: Lane) -> Source:
        if lane not in self._lanes:
            raise UserError(f"source {lane[0]}: is in the run's ledger and not in data.train now; add it to look at it")
        return self._lanes[lane]

    def place(self, k: int) -> Place:
        """Where sample k is, without reading it."""
        lane, reading = self._blend.locate(k)
        source = self._lane(lane)
        epoch, index = self._orders[lane].sample_at(reading)
        return Place(self._names[lane[0]], epoch, index, source.token_offset(index), lane[1])

    def sample(self, k: int) -> Sample:
        """Sample k, read from its shards. Raises UserError for a shard that is missing, cut or damaged."""
        lane, reading = self._blend.locate(k)
        source = self._lane(lane)
        epoch, index = self._orders[lane].sample_at(reading)
        name, offset = self._names[lane[0]], source.token_offset(index)
        return Sample(source.sample(index), name, epoch, index, offset, self.eod_id)

    def documents(self, k: int) -> list[DocumentPiece]:
        """The documents that sample k's tokens are of, in order."""
        lane, reading = self._blend.locate(k)
        return self._lane(lane).documents(self._orders[lane].sample_at(reading)[1])

    def sample_number(self, source: str, epoch: int, index: int, sequence_length: int | None = None) -> int | None:
        """The k at which sample `index` of a source is read in `epoch`: the inverse of `place`.

        sequence_length: where the source is read at more than one.
        """
        label = next(label for label, name in self._names.items() if name == source)
        lane = (label, sequence_length or next(length for known, length in self._lanes if known == label))
        return self._blend.sample_of(lane, self._orders[lane].reading_of(epoch, index))

    def sources_in(self, samples: range) -> dict[str, int]:
        """How many of the consecutive samples are of each source (all sources named)."""
        before, after = self._blend.readings_before(samples.start), self._blend.readings_before(samples.stop)
        counts = dict.fromkeys(self.sources, 0)
        for lane, count in after.items():
            name = self._names.get(lane[0], lane[0])
            counts[name] = counts.get(name, 0) + count - before.get(lane, 0)
        return counts

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source's tokens have been read after so many samples of the run, on average."""
        read = self._blend.readings_before(samples)
        found: dict[str, float] = {}
        for label, name in self._names.items():
            lanes = [lane for lane in self._lanes if lane[0] == label]
            total = sum(self._lanes[lane].samples * lane[1] for lane in lanes)
            found[name] = sum(read.get(lane, 0) * lane[1] for lane in lanes) / total
        return found

    def fingerprint(self) -> str:
        """SHA-256 of all that determines the samples: two streams that have it in common give the same ones."""
        blend = [
            (start, [(self.labels.get(label, label), length, slots) for (label, length), slots in shares])
            for start, shares in self._blend.description()
        ]
        sizes = [(self.labels[label], length, lane.samples) for (label, length), lane in self._lanes.items()]
        return hashlib.sha256(orjson.dumps([ORDER_VERSION, self._seed, blend, sorted(sizes)])).hexdigest()

    def check_sizes(self) -> None:
        """Holds the size of every shard file against its manifest; for one rank to do before training."""
        for source in self.sources.values():
            source.check_sizes()

    def check_documents(self, wanted: Sequence[tuple[str, str, int]]) -> None:
        """Refuses a stage whose source has no document long enough; reads indices until it meets one that is.

        wanted: (key of the recipe, label of a source, tokens).
        """
        for key, label, tokens in wanted:
            source = self.sources[self._names[label]]
            if (longest := source.longest_document(tokens)) < tokens:
                raise UserError(
                    f"{key} = {tokens}: the longest document of {label} ({source.folder}) has {longest} tokens; give "
                    f"the stage a source with longer ones or set {key} = {max(longest, 2)}"
                )

    def close(self) -> None:
        """Closes open shards."""
        for source in self._lanes.values():
            source.close()


def _plain(entries: Sequence[SourceEntry], sequence_length: int) -> Ledger:
    """One blend at one length for ever."""
    blend = tuple((entry.label, entry.weight) for entry in entries)
    return (Entry(0, 0, (Stretch(0, 1, sequence_length, blend),)),)


def _open_lanes(
    entries: Sequence[SourceEntry], planned: Mapping[str, Mapping[int, Fraction]], seed: int, plain: int
) -> dict[Lane, Source]:
    """Each source at each of its lengths; one that nothing reads (any more) is opened at the plain length."""
    lanes: dict[Lane, Source] = {}
    for entry in entries:
        lengths = planned.get(entry.label) or {plain: Fraction(1)}
        manifest = load_manifest(entry.manifest)
        for length in sorted(lengths):
            lanes[entry.label, length] = Source(entry.manifest, length, seed, lengths, manifest)
    return lanes


def open_streams(recipe: Recipe, ledger: Ledger | None = None) -> tuple[SampleStream, SampleStream | None]:
    """The training stream and, where the recipe has validation sources, the validation stream.

    ledger: the run's; none: that of a run that begins now.

    Raises UserError as `SampleStream`, when both were made with different tokenizers, and when the tokenizer has more
    entries than the model.
    """
    train = SampleStream(recipe.data, recipe.seed, "train", ledger or begin(recipe))
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
