"""Extraction on labelled pages: precision and recall of words, and speed; then the line filter on what is left over.

    python benchmarks/data/extraction.py [--pages 300]

The pages are made by benchmarks/shared/pages.py: real prose in made sites. Words are counted as a multiset: precision
is the share of extracted words that are the page's main text, recall the share of the main text that was extracted. The
line filter is trained on all visible lines of half of the sites (labels are known) and measured on the others' pages.
"""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.pages import Page, labelled_lines, made_pages, visible_text

from data_pipeline.clean.train_noise import count_kinds, evaluate, train
from data_pipeline.extract.child import resiliparse_text, trafilatura_text

WORDS = re.compile(r"\w+")
THRESHOLD = 0.3


def words(text: str) -> Counter[str]:
    return Counter(WORDS.findall(text.lower()))


def compare(pages: list[Page]) -> None:
    engines: dict[str, Callable[[str], str]] = {
        **{f"trafilatura, {name}": trafilatura_text(name) for name in ("precision", "balance", "recall")},
        "resiliparse": resiliparse_text(""),
        "all visible text": visible_text,
    }
    size = sum(len(page.html.encode()) for page in pages) / 1e6
    print(f"{len(pages)} pages, {size:.1f} MB of HTML")
    print("| engine | precision | recall | pages without text | MB of HTML per CPU second |\n|---|---|---|---|---|")
    for name, extract in engines.items():
        extract(pages[0].html)
        began = time.process_time()
        texts = [extract(page.html) for page in pages]
        seconds = time.process_time() - began
        right = found = wanted = 0
        for page, text in zip(pages, texts, strict=True):
            got, main = words(text), words("\n".join(page.main))
            right, found, wanted = right + (got & main).total(), found + got.total(), wanted + main.total()
        blank = sum(not text.strip() for text in texts)
        print(f"| {name} | {right / found:.3f} | {right / wanted:.3f} | {blank} | {size / seconds:.2f} |")


def line_filter(pages: list[Page]) -> None:
    sites = sorted({page.url.split("/")[2] for page in pages})
    training = set(sites[::2])
    parts: tuple[list[Page], list[Page]] = ([], [])
    for page in pages:
        parts[page.url.split("/")[2] not in training].append(page)
    used, held = ([labelled_lines(page) for page in part] for part in parts)
    result = evaluate(train(used), held, THRESHOLD)
    (text, noise), (other_text, other_noise) = count_kinds(used), count_kinds(held)
    print(f"\nline filter: trained on {text} text and {noise} noise lines of {len(training)} sites")
    print(f"held out: {other_text} and {other_noise} lines of {len(sites) - len(training)} other sites")
    print(", ".join(f"{name} {value:.4f}" for name, value in result.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=300)
    pages = list(made_pages(parser.parse_args().pages))
    compare(pages)
    line_filter(pages)


if __name__ == "__main__":
    main()
