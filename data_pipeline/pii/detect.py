"""Where a text has personal data: spans with a kind and a normal form that is the same for the same person's data."""

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_pipeline.pii import checksums
from data_pipeline.pii.scan import Begin, Scan
from data_pipeline.pii.secrets import find_secrets

EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+/=-])(?P<local>[A-Za-z0-9_%+](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_%+-])?)"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6}[A-Za-z]{2,24}(?![A-Za-z0-9_-])"
)
NO_PERSON = frozenset(("git", "svn", "hg"))  # user names of version control's addresses
# A run of digits with the marks that stand between them; what it is depends on its form.
DIGITS = re.compile(
    r"(?<![A-Za-z0-9_.+/=#-])(?:\+|\()?[0-9](?:[ ().\u2010-\u2012/-]{0,2}[0-9]){6,21}X?(?![A-Za-z0-9_])"
)
IPV4 = re.compile(r"(?<![A-Za-z0-9_.+/=-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![A-Za-z0-9_]|\.[0-9]|-[0-9])")
IPV6 = re.compile(r"(?<![A-Za-z0-9_:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![A-Za-z0-9_:])")
VERSION = re.compile(r"(?i)(?:version|release|v|ver\.?|build|rev\.?|firmware|section|chapter|§)\s{0,2}$")
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
# Italian, Spanish and French numbers, in one pass.
EUROPEAN = re.compile(
    r"(?<![A-Za-z0-9])(?:(?P<it>[A-Z]{6}[0-9]{2}[ABCDEHLMPRST][0-9]{2}[A-Z][0-9]{3}[A-Z])"
    r"|(?P<es>(?:[0-9]{8}|[0-9]{2}\.[0-9]{3}\.[0-9]{3}|[XYZ]-?[0-9]{7})[ -]?[A-Z])"
    r"|(?P<fr>[1-478](?: ?[0-9]{2}){2} ?(?:[0-9]{2}|2[AB])(?: ?[0-9]{3}){2} ?[0-9]{2}))(?![A-Za-z0-9])"
)
CHECKS = {"it": checksums.italian_fiscal_code, "es": checksums.spanish_dni, "fr": checksums.french_nir}
PHONE_CONTEXT = re.compile(
    r"(?i)(?:\b(?:tel|phone|telephone|telefon|teléfono|téléphone|fax|mobile|mobil|handy|cell|whatsapp|call|dial|sms)\w{0,6}"
    r"|电话|電話|手机|手機|传真|传眞|联系方式|热线)[^\S\n]{0,2}(?:no|nr|number|us|me)?[.:：=)]{0,2}[^\S\n]{0,3}$"
)
NORTH_AMERICA = re.compile(r"(?:\+?1[ .-]?)?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4}")
CHINA = re.compile(r"(?:\+?86[ -]?)?1[3-9][0-9](?:[ -]?[0-9]{4}){2}|0[1-9][0-9]{1,2}-[0-9]{7,8}")
INTERNATIONAL = re.compile(r"\+[1-9][0-9 ().\u2010-\u2012/-]{7,24}")
SOCIAL_SECURITY = re.compile(r"[0-9]{3}([- ])[0-9]{2}\1[0-9]{4}")
CPF = re.compile(r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}")
CARD_GROUPS = re.compile(r"[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,7}|[0-9]{4}([ -])[0-9]{6}\2[0-9]{5}|[0-9]{13,19}")
DATE = re.compile(r"(?:19|20)[0-9]{2}[-./ ][0-9]{1,2}[-./ ][0-9]{1,2}|[0-9]{1,2}[-./][0-9]{1,2}[-./](?:19|20)[0-9]{2}")


@dataclass(frozen=True, slots=True)
class Finding:
    """kind: EMAIL, PHONE, IP, CARD, IBAN, ID or SECRET; [start, end) in the text; normal: what identifies it."""

    kind: str
    start: int
    end: int
    normal: str


def _digits(text: str) -> str:
    return "".join(mark for mark in text if mark.isascii() and mark.isdigit())


def find_emails(scan: Scan) -> Iterator[Finding]:
    """Addresses in ASCII, as RFC 5321 allows them without quotes."""
    for found in scan.matches(EMAIL, Begin.EMAIL):
        if found["local"].lower() not in NO_PERSON and ".." not in found[0]:
            yield Finding("EMAIL", *found.span(), found[0].lower())


def find_addresses(scan: Scan) -> Iterator[Finding]:
    """Public IP addresses; private, local and reserved ranges identify nobody, and versions are no addresses."""
    for pattern, begin in ((IPV4, Begin.IPV4), (IPV6, Begin.IPV6)):
        for found in scan.matches(pattern, begin):
            try:
                address = ipaddress.ip_address(found[0])
            except ValueError:
                continue
            before = scan.text[max(0, found.start() - 12) : found.start()]
            if address.is_global and not VERSION.search(before):
                yield Finding("IP", *found.span(), str(address))


def _number_kind(text: str, before: str) -> tuple[str, str] | None:
    """What a run of digits is, with its normal form; the strictest rule first."""
    digits = _digits(text)
    if len(text) == 18 and checksums.chinese_resident(text):
        return "ID", text
    if CPF.fullmatch(text) and checksums.brazilian_cpf(digits):
        return "ID", digits
    if SOCIAL_SECURITY.fullmatch(text) and checksums.us_social_security(digits):
        return "ID", digits
    if CARD_GROUPS.fullmatch(text) and checksums.payment_card(digits):
        return "CARD", digits
    if DATE.match(text) or text.endswith("X"):
        return None
    if CHINA.fullmatch(text):
        return "PHONE", f"86{digits[-11:]}" if digits[-11] == "1" else digits
    if NORTH_AMERICA.fullmatch(text):
        return "PHONE", f"1{digits[-10:]}"
    if INTERNATIONAL.fullmatch(text) and 8 <= len(digits) <= 15:
        return "PHONE", digits
    return ("PHONE", digits) if 7 <= len(digits) <= 15 and PHONE_CONTEXT.search(before) else None


def _parts(run: str) -> Iterator[tuple[int, int]]:
    """A run of digits, then what stands between two of its blanks, longest first: numbers can stand side by side."""
    yield 0, len(run)
    cuts = [0, *(place for place, mark in enumerate(run) if mark == " "), len(run)]
    if 3 <= len(cuts) <= 8:
        for width in range(len(cuts) - 2, 0, -1):
            for number in range(len(cuts) - width):
                start = cuts[number]
                yield start + (run[start] == " "), cuts[number + width]


def find_numbers(scan: Scan) -> Iterator[Finding]:
    """Chinese, Brazilian and American ids, payment cards and telephone numbers."""
    for found in scan.matches(DIGITS, Begin.NUMBER):
        taken: list[tuple[int, int]] = []
        for start, end in _parts(found[0]):
            if any(start < other_end and end > other_start for other_start, other_end in taken):
                continue
            before = scan.text[max(0, found.start() + start - 24) : found.start() + start]
            kind = _number_kind(found[0][start:end], before)
            if kind is not None:
                taken.append((start, end))
                yield Finding(kind[0], found.start() + start, found.start() + end, kind[1])


def find_european_ids(scan: Scan) -> Iterator[Finding]:
    """Italian, Spanish and French numbers with right check characters."""
    for found in scan.matches(EUROPEAN, Begin.EUROPEAN):
        normal = re.sub(r"[ .-]", "", found[0])
        if CHECKS[str(found.lastgroup)](normal):
            yield Finding("ID", *found.span(), normal)


def find_ibans(scan: Scan) -> Iterator[Finding]:
    """Bank account numbers. Groups of another word may follow: the number ends where its country says."""
    for found in scan.matches(IBAN, Begin.IBAN):
        wanted, length = checksums.IBAN_LENGTHS.get(found[0][:2], 0), 0
        for place, mark in enumerate(found[0]):
            length += mark not in " -"
            if length == wanted:
                normal = re.sub(r"[ -]", "", found[0][: place + 1])
                if checksums.iban(normal):
                    yield Finding("IBAN", found.start(), found.start() + place + 1, normal)
                break


def _secrets(scan: Scan) -> Iterator[Finding]:
    return (Finding("SECRET", start, end, scan.text[start:end]) for start, end in find_secrets(scan))


DETECTORS: dict[str, tuple[Callable[[Scan], Iterator[Finding]], ...]] = {
    "secret": (_secrets,),
    "email": (find_emails,),
    "bank": (find_ibans,),
    "id": (find_european_ids,),
    "ip": (find_addresses,),
    "number": (find_numbers,),
}
# Which findings of the shared detector of digits belong to which kind that a pipeline names.
KIND_OF = {
    "SECRET": "secret",
    "EMAIL": "email",
    "IBAN": "bank",
    "CARD": "bank",
    "ID": "id",
    "IP": "ip",
    "PHONE": "phone",
}


def find_all(text: str, kinds: frozenset[str]) -> list[Finding]:
    """Findings of these kinds in order; where two overlap the one of the earlier detector stays."""
    taken: list[Finding] = []
    scan = Scan(text)
    for name, detectors in DETECTORS.items():
        if name in kinds or (name == "number" and kinds & {"phone", "id", "bank"}):
            taken += [one for detect in detectors for one in detect(scan) if KIND_OF[one.kind] in kinds]
    chosen: list[Finding] = []
    end = 0
    # Sorting is stable: of two that start together the earlier detector's comes first.
    for finding in sorted(taken, key=lambda one: one.start):
        if finding.start >= end:
            chosen.append(finding)
            end = finding.end
        elif chosen[-1].start == finding.start or finding.end <= end:
            continue
        else:  # overlaps partly: what reaches further is cut off with the one before
            chosen[-1] = Finding(chosen[-1].kind, chosen[-1].start, finding.end, chosen[-1].normal)
            end = finding.end
    return chosen
