"""Pages to text in a child process: the main text stays, the rest goes, and no page can hold up or end a run."""

import os
import signal
import struct
import subprocess
import sys
import time

import pytest

from data_pipeline.extract.child import Extractor
from data_pipeline.extract.html import ExtractSection
from data_pipeline.transform.base import Draft
from data_pipeline.transform.chain import Chain

PARAGRAPHS = [
    f"Paragraph {number} of the article says something at some length, so that it is taken for what it is: a part of "
    "the main text of the page, with commas, full stops and several clauses, as people write them."
    for number in range(6)
]
NAVIGATION = [f"Menu entry {number}" for number in range(12)]
PAGE = (
    "<html><head><title>Title</title><script>var a = 'script text';</script></head><body><nav><ul>"
    + "".join(f'<li><a href="/{number}">{text}</a></li>' for number, text in enumerate(NAVIGATION))
    + "</ul></nav><article><h1>The heading</h1>"
    + "".join(f"<p>{text}</p>" for text in PARAGRAPHS)
    + "</article><footer><a href='/imprint'>Imprint and privacy notice</a></footer></body></html>"
)


@pytest.mark.parametrize("engine", ["trafilatura", "resiliparse"])
def test_the_main_text_stays_and_the_frame_goes(engine: str) -> None:
    chain = Chain([ExtractSection.model_validate({"kind": "extract", "engine": engine})])
    draft = Draft(PAGE, None, "a")
    assert chain.apply(draft) is None
    assert all(text in draft.text for text in PARAGRAPHS)
    assert not any(text in draft.text for text in (*NAVIGATION, "script text", "Imprint", "<p>"))


@pytest.mark.parametrize("engine", ["trafilatura", "resiliparse"])
@pytest.mark.parametrize(
    ("html", "reason"),
    [
        ("<html><body></body></html>", "no_text"),
        ("no markup at all", None),
        ("\0\0\0<p", "no_text"),
        ("<html><body><p>One short sentence, and no more than that.</p></body></html>", "short"),
        ("<div>" * 5000 + "deep" + "</div>" * 5000, None),
    ],
)
def test_pages_without_a_text_go_with_a_reason_and_never_raise(engine: str, html: str, reason: str | None) -> None:
    section = ExtractSection.model_validate({"kind": "extract", "engine": engine})
    gone = Chain([section]).apply(Draft(html, None, "a"))
    assert gone is not None
    if reason is not None and engine == "trafilatura":
        assert gone.reason == f"extract.{reason}"
    assert gone.reason.removeprefix("extract.") in section.reasons


def slow_child(body: str) -> list[str]:
    """A child that reads frames and then does something else."""
    program = (
        "import sys, time\nfrom data_pipeline.extract.child import read_frame, write_frame\n"
        "write_frame(sys.stdout.buffer, b'ready')\n"
        "while (page := read_frame(sys.stdin.buffer)) is not None:\n"
        "    if page == b'good':\n        write_frame(sys.stdout.buffer, b'fine')\n        continue\n"
        f"    {body}\n"
    )
    return [sys.executable, "-c", program]


def test_a_page_that_computes_without_end_is_stopped_and_the_next_one_is_fine() -> None:
    extractor = Extractor("trafilatura", "precision", 0.4)
    extractor._command = slow_child("while True: pass")
    began = time.monotonic()
    assert extractor.extract("bad") == ("too_slow", "")
    assert time.monotonic() - began < 8
    assert extractor.extract("good") == ("text", "fine")
    extractor.close()


def test_a_page_that_ends_the_extractor_is_counted_and_the_next_one_is_fine() -> None:
    extractor = Extractor("trafilatura", "precision", 5.0)
    extractor._command = slow_child("import os; os.abort()")
    assert extractor.extract("bad") == ("crashed", "")
    assert extractor.extract("good") == ("text", "fine")
    extractor.close()


def test_an_interrupt_of_the_run_is_not_taken_for_a_page_that_crashes() -> None:
    extractor = Extractor("resiliparse", "precision", 30.0)
    assert extractor.extract(PAGE)[0] == "text"
    assert extractor._process is not None
    child = extractor._process.pid
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child, number)
    outcome, text = extractor.extract(PAGE)
    assert (outcome, PARAGRAPHS[0] in text, extractor._process.pid) == ("text", True, child)
    extractor.close()


def test_a_child_whose_parent_is_gone_ends_by_its_own_alarm() -> None:
    program = (
        "import sys\nfrom data_pipeline.extract import child\n"
        "def slow(favour):\n    def extract(html):\n        while True: pass\n    return extract\n"
        "child.ENGINES['slow'] = slow\nchild.serve('slow', '', 0.3, sys.stdin.buffer, sys.stdout.buffer)\n"
    )
    request = struct.pack("<I", 4) + b"page"
    done = subprocess.run([sys.executable, "-c", program], input=request, capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGALRM
