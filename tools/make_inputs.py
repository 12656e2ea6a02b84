"""Make inputs of every kind for the pipeline `web`, from what is on this machine: no network.

    python tools/make_inputs.py [--out data/inputs] [--megabytes 20] [--html FOLDER ...]

Half of the size is WARC files (gzip, zstd and plain) of HTML: pages that installed packages ship, from the folders that
--html names (usual ones are looked through when it is not given), and made pages of made sites around real prose
(benchmarks/shared/pages.py). The rest is text and sources of the Python environment as JSONL, parquet, Markdown, parsed
PDF pages and a source tree. A block list names some of the made sites, two evaluation sets hold
passages of the texts and questions of their own, and a line filter is trained on made pages of other sites. Everything
is a function of the arguments and of what is installed.
"""

import argparse
import gzip
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from shared.corpus import environment_texts
from shared.pages import labelled_lines, made_pages

from data_pipeline.clean import train_noise
from data_pipeline.environment import environment_files

USUAL_FOLDERS = ("/usr/share/doc", "/usr/share/gtk-doc", "/usr/share/javadoc", "/usr/local/share/doc")
LARGEST_PAGE = 2_000_000  # bytes
BLOCKED = 3  # made sites that the block list names


def record(kind: str, content: bytes, url: str | None = None) -> bytes:
    """A WARC record."""
    target = f"WARC-Target-URI: {url}\r\n" if url else ""
    form = "application/http; msgtype=response" if kind == "response" else "application/warc-fields"
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Type: {form}\r\n{target}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content + b"\r\n\r\n"


def response(url: str, page: bytes, status: str = "200 OK", kind: str = "text/html") -> bytes:
    """A record with an HTTP response."""
    return record("response", f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n\r\n".encode() + page, url)


def shipped_pages(folders: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """(URL, content) of HTML files below folders, in order; links are not followed."""
    for folder in folders:
        for path in sorted(folder.rglob("*.htm*")):
            if path.is_file() and not path.is_symlink() and path.stat().st_size <= LARGEST_PAGE:
                yield f"https://docs.example/{path.relative_to(folder.parent).as_posix()}", path.read_bytes()


def pages(folders: list[Path], room: int) -> Iterator[tuple[str, bytes]]:
    """Shipped and made pages in turn, up to a size; made ones alone when the shipped ones are used up."""
    shipped = shipped_pages(folders)
    for page in made_pages(10**9, seed=1):
        for url, content in ((page.url, page.html.encode()), *islice(shipped, 1)):
            yield url, content
            room -= len(content)
        if room <= 0:
            return


def write_crawl(folder: Path, folders: list[Path], room: int) -> set[str]:
    """Three WARC files; returns the hosts in them."""
    folder.mkdir(parents=True)
    hosts: set[str] = set()
    compressor = zstandard.ZstdCompressor()
    with (
        open(folder / "crawl-0.warc.gz", "wb") as packed,
        open(folder / "crawl-1.warc.zst", "wb") as zstd,
        open(folder / "crawl-2.warc", "wb") as plain,
    ):
        for number, (url, page) in enumerate(pages(folders, room)):
            hosts.add(url.split("/")[2])
            records = [record("request", b"GET / HTTP/1.1\r\n\r\n", url), response(url, page)]
            if number % 50 == 0:
                records.append(response(url + ".png", b"\x89PNG", kind="image/png"))
                records.append(response(url + "?gone", b"", "404 Not Found"))
            for one in records:
                if number % 4 < 2:
                    packed.write(gzip.compress(one, mtime=0))
                elif number % 4 == 2:
                    zstd.write(compressor.compress(one))
                else:
                    plain.write(one)
    return hosts


def write_texts(folder: Path, room: int) -> None:
    """Documents as JSONL, parquet, pages and Markdown, in turn."""
    for name in ("texts", "tables", "pdf", "notes"):
        (folder / name).mkdir(parents=True)
    rows: list[dict[str, str]] = []
    texts = [text.decode() for text in environment_texts(room / 1e6)]
    with (
        open(folder / "texts" / "texts.jsonl.zst", "wb") as raw,
        zstandard.ZstdCompressor().stream_writer(raw) as lines,
        open(folder / "pdf" / "pages.jsonl", "w", encoding="utf-8") as parsed,
    ):
        for number, text in enumerate(texts):
            row = {"text": text, "url": f"https://texts.example/{number}", "licence": "unknown"}
            if number % 5 < 2:
                lines.write(json.dumps(row).encode() + b"\n")
            elif number % 5 < 4:
                rows.append(row)
            elif number % 10 == 4:
                cut = [text[start : start + 3000] for start in range(0, len(text), 3000)]
                parsed.write(json.dumps({"pages": cut, "url": row["url"]}) + "\n")
            else:
                note = f"---\ntitle: note {number}\n---\n\n{text}"
                (folder / "notes" / f"{number:05d}.md").write_text(note, encoding="utf-8")
    # What crawls hold twice: a text with a line that was added since.
    rows += [{**row, "text": row["text"] + "\nSeen again.\n"} for row in rows[::40]]
    pq.write_table(pa.Table.from_pylist(rows), folder / "tables" / "texts.parquet", row_group_size=200)
    write_evaluation(folder / "evaluation", texts)


def write_evaluation(folder: Path, texts: list[str]) -> None:
    """Two evaluation sets: passages of some of the texts, which leaked, and questions that stand in none."""
    folder.mkdir(parents=True)
    leaked = [" ".join(text.split()[20:60]) for text in texts[::50] if len(text.split()) >= 60]
    asked = "What is {} times {} if every third apple of the other basket is sold before noon?"
    questions = [asked.format(number, number + 3) for number in range(20)]
    for name, items in (("leaked", leaked), ("arithmetic", questions)):
        lines = "".join(json.dumps({"question": item}) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_sources(folder: Path, room: int) -> None:
    """A source tree."""
    for file in environment_files("package_sources"):
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.location, target)
        room -= target.stat().st_size
        if room <= 0:
            return


def write_model(folder: Path) -> None:
    """A line filter trained on made pages of other sites than the crawl's."""
    labelled = folder / "labelled.jsonl"
    folder.mkdir(parents=True)
    with open(labelled, "w", encoding="utf-8") as stream:
        for page in made_pages(150, sites=10, seed=2):
            lines, keep = labelled_lines(page)
            stream.write(json.dumps({"lines": lines, "keep": keep}) + "\n")
    train_noise.run(["--documents", str(labelled), "--out", str(folder / "lines")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/inputs"))
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--html", type=Path, nargs="*", default=None, help="folders with HTML files")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; remove it or give another --out")
    folders = [Path(name) for name in USUAL_FOLDERS] if options.html is None else options.html
    size = int(options.megabytes * 1e6)
    hosts = write_crawl(options.out / "crawl", [folder for folder in folders if folder.is_dir()], size // 2)
    write_texts(options.out, size // 4)
    write_sources(options.out / "sources", size // 4)
    blocked = sorted(host for host in hosts if host.startswith("www."))[:BLOCKED]
    (options.out / "lists" / "blocked").mkdir(parents=True)
    (options.out / "lists" / "blocked" / "domains").write_text("".join(f"{host}\n" for host in blocked))
    write_model(options.out / "models")
    total = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {total / 1e6:.1f} MB in files; run: joy data run web")


if __name__ == "__main__":
    main()
