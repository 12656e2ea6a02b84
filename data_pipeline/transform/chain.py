"""The transforms of a source in order, with accounts that close and samples of what goes."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.transform.base import Block, Draft, TransformSection

SAMPLES = 5  # documents that are kept of each transform and reason, for people to judge it
SAMPLE_CHARS = 400


@dataclass
class StageAccounts:
    """What one transform did to one source's documents.

    documents_in = documents_out + dropped; bytes_in = bytes_kept + bytes_dropped, where bytes_kept is what the
    documents that stay had before and bytes_out what they have after, in UTF-8. counts: the block's own statistics.
    Documents in languages that the transform is not for pass it unseen and are counted as kept.
    """

    name: str
    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_kept: int = 0
    bytes_out: int = 0
    changed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bytes_dropped: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Gone:
    """A document that a transform dropped: `transform.reason`, and the text as the transform met it."""

    reason: str
    text: str


@lru_cache(maxsize=64)
def _cached(kind: type[TransformSection], settings: str) -> Block:
    """Models and lists are loaded once for each worker."""
    return kind.model_validate_json(settings, strict=False).make()


def block_of(section: TransformSection) -> Block:
    """The block of a section."""
    return _cached(type(section), section.model_dump_json())


class Chain:
    """The transforms of one source; `accounts` has a row for each of them."""

    def __init__(self, sections: Sequence[TransformSection]) -> None:
        self._blocks = [(block_of(section), section.languages) for section in sections]
        self._personal = [block_of(section) for section in sections if section.hides]
        self.accounts = [StageAccounts(section.label) for section in sections]

    def apply(self, draft: Draft) -> Gone | None:
        """Run a document through; None when it stays (changed in place), else why it goes."""
        size = len(draft.text.encode())
        for (block, languages), account in zip(self._blocks, self.accounts, strict=True):
            account.documents_in += 1
            account.bytes_in += size
            before = draft.text
            reason = None
            if not languages or draft.language in languages:
                reason = block.apply(draft, account.counts)
                if reason is None and not draft.text.strip():
                    reason = "nothing_left"
            if reason is not None:
                account.dropped[reason] += 1
                account.bytes_dropped[reason] += size
                return Gone(f"{account.name}.{reason}", before)
            account.documents_out += 1
            account.bytes_kept += size
            if draft.text is not before:
                account.changed += draft.text != before
                size = len(draft.text.encode())
            account.bytes_out += size
        return None

    def without_personal_data(self, text: str) -> str:
        """A text as it may be shown: samples of what is dropped early have not met the transforms behind."""
        draft = Draft(text, None, "")
        for block in self._personal:
            block.apply(draft, Counter())
        return draft.text


def sections_for(sections: Iterable[TransformSection], source: str) -> list[TransformSection]:
    """The transforms that a source's documents go through."""
    return [section for section in sections if not section.sources or source in section.sources]


class Sampler:
    """Keeps for each reason the documents with the smallest hashes: the same ones however the work was divided."""

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}
        self._number = 0

    def add(self, reason: str, text: str, place: dict[str, Any], clean: Callable[[str], str] = str) -> None:
        """Offer a document; `place` says where it is from, `clean` is applied to what is shown of it."""
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        kept = self._kept.setdefault(reason, [])
        if len(kept) == SAMPLES and -kept[0][0] <= key:
            return
        self._number += 1
        row = {
            "reason": reason,
            **place,
            "characters": len(text),
            "excerpt": clean(text[: 2 * SAMPLE_CHARS])[:SAMPLE_CHARS],
        }
        entry = (-key, -self._number, row)
        if len(kept) < SAMPLES:
            heapq.heappush(kept, entry)
        else:
            heapq.heapreplace(kept, entry)

    def rows(self) -> list[dict[str, Any]]:
        """The documents kept, with `order` to merge by: reason by reason, smallest hash first."""
        found = []
        for _, kept in sorted(self._kept.items()):
            found += [{**row, "order": -key} for key, _, row in sorted(kept, reverse=True)]
        return found


def merge_samples(parts: Iterable[Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The documents that one sampler would have kept of all parts."""
    reasons: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        for row in part:
            reasons.setdefault(row["reason"], []).append(row)
    found = []
    for _, rows in sorted(reasons.items()):
        chosen = sorted(rows, key=lambda row: row["order"])[:SAMPLES]
        found += [{key: value for key, value in row.items() if key != "order"} for row in chosen]
    return found


def account_problems(documents: int, size: int, stages: Sequence[dict[str, Any]]) -> list[str]:
    """Where the accounts of a chain don't close; `documents`, `size` (bytes): what the readers gave it."""
    found = []
    for stage in stages:
        if stage["documents_in"] != documents or stage["bytes_in"] != size:
            found.append(f"{stage['name']} received {stage['documents_in']} documents, {documents} were sent")
        if stage["documents_in"] != stage["documents_out"] + sum(stage["dropped"].values()):
            found.append(f"{stage['name']} lost documents")
        if stage["bytes_in"] != stage["bytes_kept"] + sum(stage["bytes_dropped"].values()):
            found.append(f"{stage['name']} lost bytes")
        documents, size = stage["documents_out"], stage["bytes_out"]
    return found


def content_digest(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """(path, SHA-256) of files, and of all files in folders, in order; missing ones have none."""
    found = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with open(file, "rb") as stream:
                    found.append((str(file), hashlib.file_digest(stream, "sha256").hexdigest()))
    return found
