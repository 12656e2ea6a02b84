"""Labelled pages: real prose (documentation of the Python environment) inside made pages of made sites.

A site has a layout, a menu, a footer and notices of its own, the same on all its pages; a page has a heading and
paragraphs of one real document, and a box of links. What is main text is known, so that extraction and line filters can
be measured. Layouts: HTML5 sections, nested divisions, tables, and bare paragraphs with line breaks.
"""

import html
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_pipeline.environment import description_of, environment_files

MENU = (
    *("Home", "About us", "Products", "Pricing", "Blog", "Contact", "Log in", "Sign up", "Support", "Careers", "Press"),
    *("Documentation", "Community", "Events", "Partners", "Search", "Downloads", "Forum", "Shop", "Newsletter", "FAQ"),
)
NOTICES = (
    "We use cookies to improve your experience. By continuing to browse you agree to our cookie policy.",
    "Subscribe to our newsletter and get 10% off your first order",
    "Please enable JavaScript to view the comments powered by our partner.",
    "Share this: Facebook Twitter LinkedIn WhatsApp E-mail",
    "Advertisement - continue reading below",
    "Click here to download our free app",
    "Was this page helpful? Yes No",
    "You must be logged in to post a comment.",
)
FOOTERS = (
    "© {year} {name}. All rights reserved. | Privacy policy | Terms of use | Imprint",
    "Powered by {name} CMS · Sitemap · Accessibility · Cookie settings",
    "{name} Inc., 12 Example Street - Phone and directions - Jobs - Press kit {year}",
)
SENTENCE = re.compile(r"[A-Z][^\n<>{}|]{60,}[.!?]$")


@dataclass(frozen=True)
class Page:
    """url; html; main: its paragraphs, heading first; noise: every other text on it."""

    url: str
    html: str
    main: list[str]
    noise: list[str]


def prose() -> list[list[str]]:
    """Paragraphs of prose, a list for each document that has four or more."""
    found = []
    for file in environment_files("package_documentation"):
        with open(file.location, encoding="utf-8", errors="replace") as stream:
            text = stream.read()
        text = description_of(text) if text.startswith("Metadata-Version:") else text
        blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
        paragraphs = [block for block in dict.fromkeys(blocks) if SENTENCE.match(block) and len(block) < 3000]
        if len(paragraphs) >= 4:
            found.append(paragraphs)
    return found


def links(texts: list[str]) -> str:
    return "\n".join(f'<li><a href="/{number}">{html.escape(text)}</a></li>' for number, text in enumerate(texts))


def in_row(texts: list[str], mark: str) -> str:
    return mark.join(f"<a href=#>{html.escape(text)}</a>" for text in texts)


def sections(main: list[str], menu: list[str], box: list[str], notices: list[str], footer: str) -> str:
    body = "\n".join(f"<p>{html.escape(text)}</p>" for text in main[1:])
    return (
        f"<header><nav><ul>{links(menu)}</ul></nav></header>"
        f"<main><article><h1>{html.escape(main[0])}</h1>{body}</article></main>"
        f"<aside><ul>{links(box)}</ul></aside><div class='notice'>{'</div><div>'.join(notices)}</div>"
        f"<footer>{footer}</footer>"
    )


def divisions(main: list[str], menu: list[str], box: list[str], notices: list[str], footer: str) -> str:
    body = "\n".join(f"<div class='para'><p>{html.escape(text)}</p></div>" for text in main[1:])
    return (
        f"<div id='top' class='menu'><ul>{links(menu)}</ul></div><div class='cookie'><p>{notices[0]}</p></div>"
        f"<div id='wrap'><div class='sidebar'><ul>{links(box)}</ul></div>"
        f"<div id='content'><h2>{html.escape(main[0])}</h2>{body}</div></div>"
        f"<div class='share'>{'<br>'.join(notices[1:])}</div><div id='footer'>{footer}</div>"
    )


def table(main: list[str], menu: list[str], box: list[str], notices: list[str], footer: str) -> str:
    body = "".join(f"<p>{html.escape(text)}" for text in main[1:])
    return (
        f"<table><tr><td colspan=2>{in_row(menu, ' | ')}</td></tr>"
        f"<tr><td><ul>{links(box)}</ul></td><td><h1>{html.escape(main[0])}</h1>{body}</td></tr>"
        f"<tr><td>{'<br>'.join(notices)}</td><td>{footer}</td></tr></table>"
    )


def bare(main: list[str], menu: list[str], box: list[str], notices: list[str], footer: str) -> str:
    body = "<br><br>\n".join(html.escape(text) for text in main[1:])
    return (
        f"<center>{in_row(menu, ' - ')}</center><h1>{html.escape(main[0])}</h1><div>{body}</div><hr>"
        f"<small>{in_row(box, ' ')}</small><p>{'</p><p>'.join(notices)}</p>{footer}"
    )


def visible_text(page: str) -> str:
    """Everything on a page that a reader sees."""
    from resiliparse.extract.html2text import extract_plain_text

    return str(extract_plain_text(page, main_content=False, list_bullets=False))


def labelled_lines(page: "Page") -> tuple[list[str], list[bool]]:
    """The visible lines of a page and whether each is main text; lines that are of both or of neither are left out."""
    main = "\n".join(" ".join(text.split()) for text in page.main)
    noise = "\n".join(page.noise)
    lines = [" ".join(line.split()) for line in visible_text(page.html).split("\n")]
    known = [(line, line in main) for line in lines if line and not (line in main and line in noise)]
    return [line for line, _ in known], [kept for _, kept in known]


Layout = Callable[[list[str], list[str], list[str], list[str], str], str]
LAYOUTS: tuple[Layout, ...] = (sections, divisions, table, bare)


def made_pages(count: int, sites: int = 12, seed: int = 0) -> Iterator[Page]:
    """Pages of made sites, in random order of the sites; the same arguments give the same pages."""
    rng = random.Random(seed)
    documents = prose()
    frames = []
    for number in range(sites):
        name = rng.choice(["North", "Blue", "Open", "Green", "Prime"]) + rng.choice(["field", "works", "data", "press"])
        footer = rng.choice(FOOTERS).format(name=name, year=rng.randint(2012, 2025))
        menu, notices = rng.sample(MENU, rng.randint(5, 12)), rng.sample(NOTICES, rng.randint(2, 4))
        frames.append((f"www.{name.lower()}{number}.example", LAYOUTS[number % len(LAYOUTS)], menu, notices, footer))
    for number in range(count):
        host, layout, menu, notices, footer = rng.choice(frames)
        document = rng.choice(documents)
        first = rng.randrange(max(1, len(document) - 3))
        paragraphs = document[first : first + rng.randint(3, 12)]
        box = [" ".join(rng.choice(documents)[0].split()[: rng.randint(3, 7)]) for _ in range(rng.randint(3, 8))]
        heading = " ".join(paragraphs[0].split()[:6]).rstrip(".,:;")
        main = [heading, *paragraphs]
        body = layout(main, menu, box, notices, footer)
        text = f"<!DOCTYPE html><html><head><title>{html.escape(heading)}</title></head><body>{body}</body></html>"
        yield Page(f"https://{host}/page/{number}", text, main, [*menu, *box, *notices, footer])
