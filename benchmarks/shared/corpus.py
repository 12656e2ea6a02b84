"""The text that the data benchmarks run on: what the Python environment itself ships, about 220 MB, no download."""

from collections.abc import Iterator
from pathlib import Path

from data_pipeline.environment import environment_files

PARTS = ("package_documentation", "standard_library", "package_sources")


def environment_texts(megabytes: float) -> Iterator[bytes]:
    """UTF-8 documents up to a size; each repetition has its number in it, so that no document is a duplicate."""
    paths = [Path(file.location) for part in PARTS for file in environment_files(part)]
    room = int(megabytes * 1e6)
    for repetition in range(1000):
        for path in paths:
            text = path.read_bytes().decode("utf-8", "replace")
            if not text.strip():
                continue
            content = f"{text}\n{repetition}".encode() if repetition else text.encode()
            yield content
            room -= len(content)
            if room <= 0:
                return
