"""Where each document of a shard is from: `shard_XXXXX.documents.jsonl.zst`, one JSON object per document, in order."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import zstandard
from blake3 import blake3 as hash_of

from megatron_joy.data.atomic import write_atomically
from megatron_joy.data.zstd import open_zstd
from megatron_joy.errors import UserError

SUFFIX = ".documents.jsonl.zst"


@dataclass(slots=True)  # making a frozen one takes three times as long
class DocumentOrigin:
    """One document's origin.

    source: name of the source in the pipeline; file: path inside that source; offset: first byte of its record in the
    (decompressed) file, 0 where the file is one document; licence: where known; blake3: of the text, the first 32
    hexadecimal digits; bytes_text: length of the text in UTF-8; url, language (ISO 639): where known;
    part: which part of its record it is, where the pipeline cuts records.
    """

    source: str
    file: str
    offset: int
    licence: str | None
    blake3: str
    bytes_text: int
    url: str | None = None
    language: str | None = None
    part: int = 0


def write_origins(path: Path, origins: Iterable[DocumentOrigin]) -> str:
    """Write the file atomically; returns its BLAKE3. The same origins give the same bytes."""
    lines = b"".join(orjson.dumps(origin) + b"\n" for origin in origins)
    content = zstandard.ZstdCompressor(level=3, write_checksum=True, threads=0).compress(lines)
    write_atomically(path, content)
    return hash_of(content).hexdigest()


def read_origins(path: Path) -> Iterator[DocumentOrigin]:
    """The origins of a shard's documents, in the shard's order. Raises UserError when the file is missing or torn."""
    try:
        with open(path, "rb") as raw:
            for line in open_zstd(raw):
                yield DocumentOrigin(**orjson.loads(line))
    except FileNotFoundError:
        raise UserError(f"{path}: not there; it says where the shard's documents are from") from None
    except (EOFError, zstandard.ZstdError, orjson.JSONDecodeError, TypeError) as error:
        raise UserError(f"{path}: torn or not a list of document origins ({error})") from None
