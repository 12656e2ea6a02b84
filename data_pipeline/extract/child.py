"""The process that parses pages, and the one that watches it.

Requests and answers are frames: 4 bytes of length and UTF-8. When the parent dies the child reads the end of its input
and leaves, or is ended by its own alarm where a page holds it up. Ctrl-C and SIGTERM are the parent's business: a child
that they ended would look like a page that crashes the parser. Run as
`python -m data_pipeline.extract.child ENGINE FAVOUR SECONDS`.
"""

import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO

LENGTH = struct.Struct("<I")
WALL_FACTOR = 10  # a page may take this many times its processor time on a busy machine before it is given up
MEMORY = 4 << 30  # bytes that a child may take; a page that needs more has no text
TICKS = os.sysconf("SC_CLK_TCK")
PAGES = 20_000  # after which the child is replaced: lxml's memory fragments


def trafilatura_text(favour: str) -> Callable[[str], str]:
    """trafilatura's main text: no comments, tables kept, no links or images."""
    import trafilatura
    from trafilatura.settings import use_config

    config = use_config()
    config.set("DEFAULT", "EXTRACTION_TIMEOUT", "0")  # ours interrupts, theirs only asks

    def extract(html: str) -> str:
        found = trafilatura.extract(
            html,
            favor_precision=favour == "precision",
            favor_recall=favour == "recall",
            include_comments=False,
            include_tables=True,
            deduplicate=False,
            config=config,
        )
        return found or ""

    return extract


def resiliparse_text(favour: str) -> Callable[[str], str]:
    """resiliparse's main content, without links, forms and comments."""
    from resiliparse.extract.html2text import extract_plain_text

    def extract(html: str) -> str:
        return str(extract_plain_text(html, main_content=True, alt_texts=False, preserve_formatting=True))

    return extract


ENGINES = {"trafilatura": trafilatura_text, "resiliparse": resiliparse_text}


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next frame, None where the stream ends."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    size: int = LENGTH.unpack(head)[0]
    content = stream.read(size)
    return content if len(content) == size else None


def write_frame(stream: IO[bytes], content: bytes) -> None:
    """Write a frame and flush."""
    stream.write(LENGTH.pack(len(content)))
    stream.write(content)
    stream.flush()


def processor_time(process: int) -> float:
    """Seconds that a process has computed. It is asked for with every page: psutil takes as long as a small page."""
    with open(f"/proc/{process}/stat", "rb") as stream:
        times = stream.read().rpartition(b")")[2].split()[11:13]  # behind the name: utime, stime
    return sum(map(int, times)) / TICKS


class Extractor:
    """Extracts pages one after another in a child process, which is started when it is needed."""

    def __init__(self, engine: str, favour: str, seconds: float) -> None:
        alarm = str(2 * WALL_FACTOR * seconds)  # later than our own patience: for orphans only
        self._command = [sys.executable, "-m", "data_pipeline.extract.child", engine, favour, alarm]
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._pages = 0

    def _child(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=-1
            )
            self._pages = 0
            assert self._process.stdout is not None
            read_frame(self._process.stdout)  # says that everything is imported
        return self._process

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                try:  # noqa: SIM105 - at the interpreter's end `suppress` may be gone before this object
                    stream.close()
                except BrokenPipeError:
                    pass
            self._process = None

    __del__ = close

    def _waits(self, child: "subprocess.Popen[bytes]", used: float) -> bool:
        """Wait for an answer; False when the page took too much. used: the child's processor time before the page."""
        assert child.stdout is not None
        deadline = time.monotonic() + WALL_FACTOR * self._seconds
        while time.monotonic() < deadline:
            if select.select([child.stdout], [], [], self._seconds / 4)[0]:
                return True
            if processor_time(child.pid) - used >= self._seconds:
                return False
        return False

    def extract(self, html: str) -> tuple[str, str]:
        """("text", the main text), or ("too_slow" or "crashed", "")."""
        child = self._child()
        assert child.stdin is not None and child.stdout is not None
        answer = None
        with suppress(BrokenPipeError, FileNotFoundError, ProcessLookupError):
            used = processor_time(child.pid)
            write_frame(child.stdin, html.encode())
            if not self._waits(child, used):
                self.close()
                return "too_slow", ""
            answer = read_frame(child.stdout)
        self._pages += 1
        if answer is None:
            self.close()
            return "crashed", ""
        if self._pages >= PAGES:
            self.close()
        return "text", answer.decode()


def serve(engine: str, favour: str, seconds: float, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer pages with their text until there are no more. A page that the parser refuses has none.

    seconds: by the clock, after which the alarm ends the process, whatever C code it is in.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    extract = ENGINES[engine](favour)
    write_frame(answers, b"ready")
    while (content := read_frame(requests)) is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            text = extract(content.decode().replace("\0", ""))
        except Exception:  # the parsers name no common class; a page without text is counted as such
            text = ""
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_frame(answers, text.encode("utf-8", "replace"))


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.stdin.buffer, sys.stdout.buffer)
