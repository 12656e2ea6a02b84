"""Boilerplate of a site: lines that stand, but for numbers and case, on many of its pages.

CCNet (Wenzek et al. 2020) removes lines that recur anywhere; by site, short lines that are boilerplate on one site and
text on another are told apart. The lines of each site are found once over a corpus (find_site_lines.py) and kept as
sorted 64-bit hashes of site and line, so this block looks at one document at a time.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import Field

from data_pipeline.transform.base import Block, Draft, TransformSection
from megatron_joy.errors import UserError

HASHES, DESCRIPTION = "site_lines.npy", "site_lines.json"
LONGEST = 300  # characters; longer lines are text, whatever page they are on
DIGITS = re.compile(r"\d+")


def site_of(url: str | None) -> str | None:
    """The host of a URL without `www.`, None where there is none."""
    try:
        host = urlsplit(url.lower()).hostname if url else None
    except ValueError:
        return None
    return host.removeprefix("www.") if host else None


def line_hash(site: str, line: str) -> int | None:
    """The hash of a site's line, case, numbers and white space aside; None for lines that are never boilerplate."""
    normal = DIGITS.sub("0", " ".join(line.split()).casefold())
    if not normal or len(normal) > LONGEST:
        return None
    return xxhash.xxh3_64_intdigest(f"{site}\0{normal}".encode("utf-8", "replace"))


def hashes_of(site: str, lines: list[str]) -> Iterator[int]:
    """The hashes of a page's different lines."""
    return iter({found for line in lines if (found := line_hash(site, line)) is not None})


class SiteLinesSection(TransformSection):
    """Removes lines that recur on the pages of their site; statistics: lines removed."""

    needs_url: ClassVar[bool] = True
    kind: Literal["site_lines"]
    lines: str = Field(description="Folder that find_site_lines wrote.")

    def files(self) -> list[Path]:
        """The list."""
        return [Path(self.lines) / HASHES]

    def make(self) -> Block:
        """The block. Raises UserError when the folder holds no list."""
        try:
            hashes = np.load(Path(self.lines) / HASHES, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            cause = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"{self.lines}: no list of lines ({cause}); make one: python -m data_pipeline.clean.find_site_lines"
            ) from None
        return _SiteLines(hashes)


class _SiteLines(Block):
    def __init__(self, hashes: npt.NDArray[np.uint64]) -> None:
        self._hashes: Any = hashes

    def _listed(self, found: int | None) -> bool:
        if found is None:
            return False
        place = int(np.searchsorted(self._hashes, np.uint64(found)))
        return place < len(self._hashes) and int(self._hashes[place]) == found

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        site = site_of(draft.url)
        if site is None:
            return None
        lines = draft.text.split("\n")
        kept = [line for line in lines if not self._listed(line_hash(site, line))]
        if len(kept) < len(lines):
            counts["lines"] += len(lines) - len(kept)
            draft.text = "\n".join(kept).strip("\n")
        return None
