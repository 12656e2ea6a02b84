"""The text that a Python environment itself holds: a real corpus of tens of megabytes without a download.

The files are the standard library's and those that installed distributions list in their RECORD, so the result is a
function of what is installed, not of what else lies in the folders.
"""

import csv
import email
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, distributions

LARGEST = 400_000  # bytes; larger sources are generated tables
SOURCE_SUFFIXES = (".py", ".pyi")
PROSE_SUFFIXES = (".md", ".rst", ".txt")
PROSE_NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS", "README", "CHANGELOG", "METADATA")
LISTS = {"RECORD", "WHEEL", "INSTALLER", "REQUESTED", "entry_points.txt", "top_level.txt"}
SKIPPED_PARTS = {"__pycache__", "site-packages", "test"}


@dataclass(frozen=True)
class EnvironmentFile:
    """One file: what reports call it, where it lies, the licence that its distribution states."""

    path: str
    location: str
    licence: str | None


def _standard_library() -> Iterator[EnvironmentFile]:
    root = sysconfig.get_paths()["stdlib"]
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_PARTS)
        for name in sorted(files):
            path = os.path.join(parent, name)
            if name.endswith((*SOURCE_SUFFIXES, ".txt")) and _is_usable(path):
                yield EnvironmentFile(os.path.relpath(path, os.path.dirname(root)), path, None)


def _licence(distribution: Distribution) -> str | None:
    """The licence that a distribution states, when it states it in a few words."""
    for field in ("License-Expression", "License"):
        stated = (distribution.metadata.get(field) or "").strip()
        if stated and len(stated) <= 60 and "\n" not in stated and stated.upper() != "UNKNOWN":
            return stated
    return None


def _is_source(path: str) -> bool:
    return path.endswith(SOURCE_SUFFIXES)


def _is_prose(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name not in LISTS and (name.endswith(PROSE_SUFFIXES) or name.startswith(PROSE_NAMES))


@cache
def _installed() -> dict[str, EnvironmentFile]:
    """Every text file that an installed distribution lists, by path; of two with one path the first found counts."""
    found: dict[str, EnvironmentFile] = {}
    for distribution in distributions():
        licence = _licence(distribution)
        root = str(distribution.locate_file(""))
        for path, *_ in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
            foreign = {"..", *SKIPPED_PARTS} & set(path.split("/"))
            if not foreign and not os.path.isabs(path) and (_is_source(path) or _is_prose(path)):
                found.setdefault(path, EnvironmentFile(path, os.path.join(root, path), licence))
    return dict(sorted(found.items()))


def _is_usable(path: str) -> bool:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST


def _of_distributions(wanted: Callable[[str], bool]) -> Iterator[EnvironmentFile]:
    return (file for path, file in _installed().items() if wanted(path) and _is_usable(file.location))


PARTS: dict[str, Callable[[], Iterator[EnvironmentFile]]] = {
    "standard_library": _standard_library,
    "package_documentation": lambda: _of_distributions(_is_prose),
    "package_sources": lambda: _of_distributions(_is_source),
}


def environment_files(part: str) -> list[EnvironmentFile]:
    """The files of one part of the running environment's text, sorted by path."""
    return list(PARTS[part]())


def description_of(metadata: str) -> str:
    """The long description in a distribution's METADATA: its body, or the header of that name in old ones."""
    message = email.message_from_string(metadata)
    body = message.get_payload()
    return body if isinstance(body, str) and body.strip() else str(message.get("Description", ""))
