"""Keys and tokens: by the prefixes that their issuers document, by form, and by entropy where code names them so."""

import math
import re
from collections import Counter
from collections.abc import Iterator

from data_pipeline.pii.scan import Begin, Scan

# What makes scanning worth while: one of these strings is in every text with such a token.
PREFIXES = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"(?:AKIA|ASIA|AGPA|AROA|AIDA)[A-Z2-7]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{60,250}"  # GitHub
    r"|glpat-[A-Za-z0-9_-]{20,64}"  # GitLab
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,250}"  # Slack
    r"|[rs]k_(?:live|test)_[A-Za-z0-9]{16,250}"  # Stripe
    r"|AIza[A-Za-z0-9_-]{35}"  # Google
    r"|sk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,250}"  # OpenAI, Anthropic
    r"|hf_[A-Za-z]{30,40}"  # Hugging Face
    r"|npm_[A-Za-z0-9]{36}|pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,1000}"  # npm, PyPI
    r"|SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"  # SendGrid
    r"|eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,1000}"  # JSON web tokens
    r")(?![A-Za-z0-9])"
)
# A key ends before another begins: a text of beginnings is looked at once, not 20,000 characters from each.
PRIVATE_KEYS = re.compile(
    r"-----BEGIN (?P<kind>(?:[A-Z]{2,10} ){0,2}PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:(?!-----BEGIN )[\s\S]){40,20000}?-----END (?P=kind)-----"
)
# A quoted value behind a colon or an equals sign; whether it is a secret, the name in front of it says.
VALUES = re.compile(r"[:=>]\s{0,3}[\"'`](?P<value>[^\s\"'`]{12,200})[\"'`]")
NAMES = re.compile(
    r"(?i)(?:passw(?:or)?d|secret|token|api_?-?key|access_?-?key|auth|credential)[a-z0-9_-]{0,20}[\"']?\s{0,3}[:=]?$"
)
LONGEST_NAME = 48
LEAST_ENTROPY = 3.4  # bits per character; words are below, random base64 of 20 characters at about 4
PLACEHOLDERS = re.compile(r"(?i)[<{$%(]|example|your|xxx|change.?me|placeholder|dummy|sample|test|\.\.\.|://")


def entropy(text: str) -> float:
    """Bits per character of a string's own character frequencies."""
    counts = Counter(text)
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts.values())


def looks_random(value: str) -> bool:
    """Whether a value is a secret rather than a word, a path or a placeholder."""
    kinds = sum(bool(re.search(pattern, value)) for pattern in ("[a-z]", "[A-Z]", "[0-9]", "[^A-Za-z0-9]"))
    return kinds >= 2 and entropy(value) >= LEAST_ENTROPY and not PLACEHOLDERS.search(value)


def find_secrets(scan: Scan) -> Iterator[tuple[int, int]]:
    """Start and end of keys and tokens."""
    text = scan.text
    if "PRIVATE KEY" in text:
        yield from (found.span() for found in PRIVATE_KEYS.finditer(text))
    yield from (found.span() for found in scan.matches(PREFIXES, Begin.TOKEN))
    for found in scan.matches(VALUES, Begin.VALUE):
        named = NAMES.search(text[max(0, found.start() - LONGEST_NAME) : found.start()])
        if named and looks_random(found["value"]):
            yield found.span("value")
