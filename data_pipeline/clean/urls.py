"""Block lists of hosts and URLs in the format of Toulouse University's UT1: a line each, in files `domains` and `urls`.

A host is blocked with all below it (`example.org` blocks `www.example.org`), a URL with all paths below it. A list of
millions is kept as sorted 64-bit hashes, 8 bytes an entry; a chance hit has a probability below 1e-12.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import Field

from data_pipeline.transform.base import Block, Draft, TransformSection
from megatron_joy.errors import UserError

LISTS = ("domains", "urls")


class UrlBlocklistSection(TransformSection):
    """Drops documents whose host or URL is on a block list (UT1 folders or plain files); counts unreadable URLs."""

    reasons: ClassVar[dict[str, str]] = {"host": "its host or one above it is listed", "url": "its URL is listed"}
    needs_url: ClassVar[bool] = True
    kind: Literal["url_blocklist"]
    paths: list[str] = Field(min_length=1, description="Files with a host or URL a line, or folders as UT1's.")
    categories: list[str] = Field(default_factory=list, description="Folders: which of their folders; none: all.")

    def files(self) -> list[Path]:
        """Every list, in order."""
        return list(self._lists())

    def _lists(self) -> Iterator[Path]:
        for text in self.paths:
            path = Path(text)
            if not path.is_dir():
                yield path
                continue
            folders = [path / name for name in self.categories] or [path, *sorted(path.iterdir())]
            yield from (folder / name for folder in folders for name in LISTS if (folder / name).is_file())

    def make(self) -> Block:
        """The block. Raises UserError for lists that are missing or empty."""
        return _Blocklist(self)


def _normal(line: str) -> str:
    """A host or URL of a list: lower case, without scheme, `www.`, and a slash at its end."""
    text = line.strip().lower()
    text = text.partition("://")[2] or text
    return text.removeprefix("www.").rstrip("/")


def read_list(path: Path) -> Iterator[str]:
    """The entries of a list; blank lines and comments (#) are passed over. Raises UserError where it isn't there."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                entry = _normal(line.partition("#")[0])
                if entry:
                    yield entry
    except OSError as error:
        raise UserError(f"url_blocklist: {path}: cannot be read ({error.strerror}); give a list that exists") from None


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "replace"))


class _Blocklist(Block):
    def __init__(self, section: UrlBlocklistSection) -> None:
        hashes = [_hash(entry) for path in section.files() for entry in read_list(path)]
        if not hashes:
            raise UserError(
                f"url_blocklist: {', '.join(section.paths)}: no entry; give lists with a host or URL a line"
            )
        self._hashes: npt.NDArray[np.uint64] = np.unique(np.array(hashes, dtype=np.uint64))

    def _has(self, candidates: list[str]) -> bool:
        wanted = np.array([_hash(text) for text in candidates], dtype=np.uint64)
        places = np.searchsorted(self._hashes, wanted)
        places[places == len(self._hashes)] = 0
        return bool((self._hashes[places] == wanted).any())

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        if draft.url is None:
            return None
        try:
            parts = urlsplit(draft.url.lower())
            host = (parts.hostname or "").removeprefix("www.").rstrip(".")
        except ValueError:
            host = ""
        if not host:
            counts["unreadable_urls"] += 1
            return None
        labels = host.split(".")
        if self._has([".".join(labels[start:]) for start in range(len(labels))]):
            return "host"
        steps = parts.path.rstrip("/").split("/")
        paths = [host + "/".join(steps[:end]) for end in range(2, len(steps) + 1)]
        whole = [f"{paths[-1] if paths else host}?{parts.query}"] if parts.query else []
        return "url" if (paths or whole) and self._has([*paths, *whole]) else None
