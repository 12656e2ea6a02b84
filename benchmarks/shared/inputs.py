"""Mixed inputs as a crawl and a company have them: WARC, JSONL, parquet and a source tree, made of what is installed.

Pages are the real HTML of installed packages and of the system's documentation, as responses of a WARC with a gzip
member for each record; where a machine has little HTML the WARC is small. Everything else is the Python environment's
own text.
"""

import gzip
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.environment import environment_files

HTML_ROOTS = ("/usr/share/doc", "/usr/share/gtk-doc")
SMALLEST_PAGE = 2_000  # bytes; below it is a redirect or a frame
HTML_SHARE, JSONL_SHARE, PARQUET_SHARE = 0.2, 0.2, 0.2  # of the size asked for; the rest is source code


def html_pages(folders: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """(URL, HTML) of every page in these folders, in the system's documentation and in installed packages, in order."""
    packages = Path(os.__file__).parents[1]
    for root in dict.fromkeys((*folders, *map(Path, HTML_ROOTS), packages)):  # one that is named twice is read once
        for path in sorted(root.rglob("*.html")):
            if path.is_file() and not path.is_symlink() and path.stat().st_size >= SMALLEST_PAGE:
                yield f"http://docs.example/{path.relative_to(root).as_posix()}", path.read_bytes()


def warc_record(url: str, page: bytes) -> bytes:
    """A WARC response record with one page."""
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def _texts(part: str) -> Iterator[tuple[str, bytes]]:
    """(path, UTF-8 text) of a part of the environment."""
    for file in environment_files(part):
        yield file.path, Path(file.location).read_bytes().decode("utf-8", "replace").encode()


def _up_to(megabytes: float, items: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Items until their contents reach a size; what is left stays in `items`."""
    room = megabytes * 1e6
    while room > 0 and (item := next(items, None)) is not None:
        room -= len(item[1])
        yield item


def write_inputs(folder: Path, megabytes: float, html: Iterable[Path] = ()) -> dict[str, float]:
    """Write `pages/`, `lines/`, `tables/` and `tree/`; returns megabytes of text (of HTML for pages) in each.

    Where documentation or the standard library are smaller than their share, package sources fill it.
    """
    sources = _texts("package_sources")
    sizes = dict.fromkeys(("pages", "lines", "tables", "tree"), 0.0)

    def counted(name: str, items: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        for item in items:
            sizes[name] += len(item[1]) / 1e6
            yield item

    (folder / "pages").mkdir(parents=True)
    with open(folder / "pages" / "crawl.warc.gz", "wb") as stream:
        for url, page in counted("pages", _up_to(megabytes * HTML_SHARE, html_pages(html))):
            stream.write(gzip.compress(warc_record(url, page), mtime=0))
    (folder / "lines").mkdir()
    found = counted("lines", _up_to(megabytes * JSONL_SHARE, chain(_texts("package_documentation"), sources)))
    with gzip.GzipFile(folder / "lines" / "docs.jsonl.gz", "wb", mtime=0) as lines:
        lines.writelines(orjson.dumps({"text": text.decode(), "id": path}) + b"\n" for path, text in found)
    (folder / "tables").mkdir()
    found = counted("tables", _up_to(megabytes * PARQUET_SHARE, chain(_texts("standard_library"), sources)))
    pq.write_table(pa.table({"text": [text.decode() for _, text in found]}), folder / "tables" / "library.parquet")
    for path, text in counted("tree", _up_to(megabytes - sum(sizes.values()), sources)):
        place = folder / "tree" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text)
    return sizes


def write_pipeline(folder: Path, out: Path, shard_megabytes: float) -> Path:
    """The pipeline over these inputs: extraction, cleaning, near-duplicates, scores, a tokenizer trained on them."""
    path = folder / f"{out.name}.toml"
    path.write_text(
        f"""name = "mixed"
description = "WARC, JSONL, parquet and a source tree"
[[sources]]
name = "pages"
reader = "warc"
paths = ["{folder}/pages/*.warc.gz"]
[[sources]]
name = "lines"
reader = "jsonl"
paths = ["{folder}/lines/*.jsonl.gz"]
[[sources]]
name = "tables"
reader = "parquet"
paths = ["{folder}/tables"]
[[sources]]
name = "tree"
reader = "code"
paths = ["{folder}/tree"]
[[transforms]]
kind = "extract"
sources = ["pages"]
[[transforms]]
kind = "normalise"
[[transforms]]
kind = "length"
[[transforms]]
kind = "language"
sources = ["pages", "lines"]
[near_duplicates]
enabled = true
[repeated_lines]
enabled = true
[[score]]
name = "form"
scorer = "heuristic"
keep = {{ form_letters = {{ least = 0.3 }}, form_compression = {{ below = 12.0 }} }}
[tokenizer]
vocab_size = 4096
[output]
folder = "{out}"
shard_megabytes = {shard_megabytes}
"""
    )
    return path
