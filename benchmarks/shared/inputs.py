"""Mixed inputs as a crawl and a company have them: WARC, JSONL, parquet and a source tree, made of what is installed.

Pages are the real HTML of installed packages and of the system's documentation, as responses of a WARC with a gzip
member for each record; where a machine has little HTML the WARC is small. Everything else is the Python environment's
own text.
"""

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.environment import environment_files

HTML_ROOTS = ("/usr/share/doc", "/usr/share/gtk-doc")
SMALLEST_PAGE = 2_000  # bytes; below it is a redirect or a frame
HTML_SHARE, JSONL_SHARE, PARQUET_SHARE = 0.15, 0.25, 0.25  # of the size asked for; the rest is source code


def html_pages() -> Iterator[tuple[str, bytes]]:
    """(URL, HTML) of every page that is installed, in order."""
    packages = Path(os.__file__).parents[1]
    for root in (*map(Path, HTML_ROOTS), packages):
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


def _texts(part: str, megabytes: float) -> Iterator[tuple[str, bytes]]:
    """(path, UTF-8 text) of a part of the environment, up to a size."""
    room = megabytes * 1e6
    for file in environment_files(part):
        content = Path(file.location).read_bytes()
        if room <= 0:
            return
        room -= len(content)
        yield file.path, content.decode("utf-8", "replace").encode()


def write_inputs(folder: Path, megabytes: float) -> dict[str, float]:
    """Write `pages/`, `lines/`, `tables/` and `tree/`; returns megabytes of text (of HTML for pages) in each."""
    sizes = {}
    (folder / "pages").mkdir(parents=True)
    room = written = megabytes * HTML_SHARE * 1e6
    with open(folder / "pages" / "crawl.warc.gz", "wb") as stream:
        for url, page in html_pages():
            if room <= 0:
                break
            room -= len(page)
            stream.write(gzip.compress(warc_record(url, page), mtime=0))
    sizes["pages"] = (written - room) / 1e6
    (folder / "lines").mkdir()
    with gzip.GzipFile(folder / "lines" / "docs.jsonl.gz", "wb", mtime=0) as lines:
        found = list(_texts("package_documentation", megabytes * JSONL_SHARE))
        lines.writelines(orjson.dumps({"text": text.decode(), "id": path}) + b"\n" for path, text in found)
    sizes["lines"] = sum(len(text) for _, text in found) / 1e6
    (folder / "tables").mkdir()
    found = list(_texts("standard_library", megabytes * PARQUET_SHARE))
    pq.write_table(pa.table({"text": [text.decode() for _, text in found]}), folder / "tables" / "library.parquet")
    sizes["tables"] = sum(len(text) for _, text in found) / 1e6
    sizes["tree"] = 0.0
    for path, text in _texts("package_sources", megabytes - sum(sizes.values())):
        place = folder / "tree" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text)
        sizes["tree"] += len(text) / 1e6
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
