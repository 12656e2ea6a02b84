"""A labelled set of texts with invented personal data, and with things that look like it and are none.

Values are drawn at random and made valid by code of its own (check digits are found by trying, not by the formulas that
the detector uses); each stands in a sentence in the wild's many spellings. A share of the entities is written as the
detector is known not to read them (obfuscated addresses, local telephone numbers without a word for it), because people
do so. Traps are numbers and strings of the same shapes: versions, dates, sizes, hashes, ISBNs, tables, coordinates.
"""

import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_pipeline.pii import checksums as valid

NAMES = ("anna", "j.miller", "li_wei", "o.garcia+news", "m-schmidt", "dupont", "kenji.sato", "r2d2", "x", "first.last")
HOSTS = (
    "mail.example-company.com",
    "uni-stadt.de",
    "gmail.com",
    "qq.com",
    "dept.state.gov",
    "sub.a.b.co.uk",
    "firma.io",
)


@dataclass(frozen=True)
class Labelled:
    """A text and its entities: (kind, start, end)."""

    text: str
    entities: list[tuple[str, int, int]]


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def hexadecimal(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789abcdef", k=count))


def until(check: Callable[[str], bool], draw: Callable[[], str]) -> str:
    """The first of many draws that a check accepts."""
    return next(value for value in iter(draw, None) if check(value))


def email(rng: random.Random) -> str:
    return f"{rng.choice(NAMES)}{rng.choice(['', '1', '77'])}@{rng.choice(HOSTS)}"


def hidden_email(rng: random.Random) -> str:
    name, host = email(rng).split("@")
    return f"{name} {rng.choice(['(at)', '[at]', 'AT'])} {host.replace('.', ' dot ')}"


def american(rng: random.Random) -> str:
    area, exchange, line = rng.randint(200, 989), rng.randint(200, 999), digits(rng, 4)
    form = rng.choice(["({}) {}-{}", "{}-{}-{}", "{}.{}.{}", "+1 {} {} {}", "1-{}-{}-{}", "+1 ({}) {}-{}"])
    return form.format(area, exchange, line)


def chinese_phone(rng: random.Random) -> str:
    start, rest = f"1{rng.randint(3, 9)}{digits(rng, 1)}", digits(rng, 8)
    return rng.choice(["{}{}{}", "+86 {}{}{}", "{}-{}-{}", "{} {} {}"]).format(start, rest[:4], rest[4:])


def european_phone(rng: random.Random) -> str:
    code = rng.choice(["49", "33", "34", "44", "39", "31", "46"])
    body = digits(rng, 9).replace("0", "1")
    return rng.choice(["+{} {} {} {}", "+{}-{}-{}-{}", "+{} ({}) {} {}"]).format(code, body[:3], body[3:6], body[6:])


def local_phone(rng: random.Random) -> str:
    return f"{rng.randint(200, 999)} {digits(rng, 2)} {digits(rng, 2)}"


def public_address(rng: random.Random) -> str:
    first = rng.choice([5, 23, 34, 52, 81, 93, 103, 142, 178, 185, 212])
    return f"{first}.{rng.randint(1, 254)}.{rng.randint(0, 254)}.{rng.randint(1, 254)}"


def card(rng: random.Random) -> str:
    start = rng.choice(["4", "51", "55", "2221", "6011"])
    number = until(valid.payment_card, lambda: start + digits(rng, 16 - len(start)))
    mark = rng.choice(["", " ", "-"])
    return mark.join(number[place : place + 4] for place in range(0, 16, 4))


def bank_account(rng: random.Random) -> str:
    country = rng.choice(["DE", "FR", "ES", "GB", "NL", "IT", "CH"])
    letters = {"GB": "WEST", "NL": "ABNA", "IT": "X"}.get(country, "")

    def draw() -> str:
        return country + digits(rng, 2) + letters + digits(rng, valid.IBAN_LENGTHS[country] - 4 - len(letters))

    number = until(valid.iban, draw)
    spaced = rng.random() < 0.6
    return " ".join(number[place : place + 4] for place in range(0, len(number), 4)) if spaced else number


def identity(rng: random.Random) -> str:
    birth = f"{rng.randint(1940, 2009)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}"
    kind = rng.randrange(6)
    if kind == 0:
        return until(
            valid.chinese_resident,
            lambda: f"{rng.randint(110101, 659004)}{birth}{digits(rng, 3)}{rng.choice('0123456789X')}",
        )
    if kind == 1:
        number = until(valid.spanish_dni, lambda: digits(rng, 8) + rng.choice(string.ascii_uppercase))
        return rng.choice([number, f"{number[:8]}-{number[8]}"])
    if kind == 2:
        start = f"{rng.choice('12')}{birth[2:4]}{birth[4:6]}"
        number = until(valid.french_nir, lambda: start + f"{rng.randint(1, 95):02d}" + digits(rng, 8))
        return rng.choice(
            [
                number,
                " ".join([number[0], number[1:3], number[3:5], number[5:7], number[7:10], number[10:13], number[13:]]),
            ]
        )
    if kind == 3:
        number = until(valid.us_social_security, lambda: digits(rng, 9))
        return f"{number[:3]}-{number[3:5]}-{number[5:]}"
    if kind == 4:
        number = until(valid.brazilian_cpf, lambda: digits(rng, 11))
        return f"{number[:3]}.{number[3:6]}.{number[6:9]}-{number[9:]}"
    letters = "".join(rng.choices("BCDFGLMNPRSTVZ", k=6))
    day, town = f"{rng.choice('ABCDEHLMPRST')}{rng.randint(1, 31):02d}", f"{rng.choice('ABCDEFGHIL')}{digits(rng, 3)}"
    code = f"{letters}{birth[2:4]}{day}{town}"
    return until(valid.italian_fiscal_code, lambda: code + rng.choice(string.ascii_uppercase))


def token(rng: random.Random) -> str:
    def some(alphabet: str, count: int) -> str:
        return "".join(rng.choices(alphabet, k=count))

    words = string.ascii_letters + string.digits
    return rng.choice(
        [
            "AKIA" + some("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16),
            "ghp_" + some(words, 36),
            "hf_" + some(string.ascii_letters, 34),
            "xoxb-" + some(string.digits, 12) + "-" + some(words, 24),
            "sk_live_" + some(words, 24),
            "AIza" + some(words + "_-", 35),
            "glpat-" + some(words, 20),
        ]
    )


def bare_secret(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits + "+/", k=40))


SENTENCES: dict[str, tuple[tuple[Callable[[random.Random], str], tuple[str, ...]], ...]] = {
    "EMAIL": (
        (email, ("Write to {} for details.", "<{}>", "邮箱：{}，欢迎。", "Author: A. B. <{}>", "mailto:{}")),
        (hidden_email, ("Reach me: {}",)),
    ),
    "PHONE": (
        (american, ("Call us at {} today.", "Phone: {}", "{} is the office line.", "(fax {})")),
        (chinese_phone, ("联系电话{}，请在工作时间拨打。", "手机：{}", "my number {} in Beijing")),
        (european_phone, ("Tel.: {}", "Ruf {} an.", "reachable under {}, mornings only")),
        (local_phone, ("Tel. {}", "Ring {} after six.")),
    ),
    "IP": ((public_address, ("Connection from {} was refused.", "host {}:8080", "[{}] logged in", "封禁地址{}。")),),
    "CARD": ((card, ("Card number {}.", "paid with {} yesterday", "卡号：{}")),),
    "IBAN": ((bank_account, ("IBAN: {}", "Please transfer to {} by Friday.", "Konto {}, danke")),),
    "ID": ((identity, ("ID {}.", "number {} on the form", "身份证号码：{}")),),
    "SECRET": (
        (token, ('key = "{}"', "export TOKEN={}", "Authorization: Bearer {}")),
        (bare_secret, ('aws_secret_access_key = "{}"', "the key is {}")),
    ),
}  # fmt: skip
TRAPS: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: (
        f"version {rng.randint(1, 20)}.{rng.randint(0, 20)}.{rng.randint(0, 20)}.{rng.randint(0, 250)} was released"
    ),
    lambda rng: (
        f"on {rng.randint(1990, 2025)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d} at 12:30:{rng.randint(10, 59)}"
    ),
    lambda rng: f"ISBN 978-3-{digits(rng, 2)}-{digits(rng, 6)}-{digits(rng, 1)}",
    lambda rng: f"sha256 {''.join(rng.choices('0123456789abcdef', k=64))}",
    lambda rng: f"{digits(rng, 8)}-{hexadecimal(rng, 4)}-4abc-9def-{hexadecimal(rng, 12)}",
    lambda rng: " ".join(str(rng.randint(1, 99_999)) for _ in range(12)),
    lambda rng: " ".join(f"{rng.random() * 1000:.3f}" for _ in range(8)),
    lambda rng: f"pi is 3.{digits(rng, 30)}",
    lambda rng: f"latitude {rng.random() * 90:.6f}, longitude {rng.random() * 180:.6f}",
    lambda rng: f"{rng.randint(10**12, 10**13)} bytes of {rng.randint(10**9, 10**10)}",
    lambda rng: f"the router at 192.168.{rng.randint(0, 255)}.{rng.randint(0, 255)} and 127.0.0.1, mask 255.255.255.0",
    lambda rng: f"order no. {digits(rng, 10)}, article {digits(rng, 7)}",
    lambda rng: (
        f"timestamp {rng.randint(1_500_000_000, 1_800_000_000)} or {rng.randint(1_500_000_000_000, 1_800_000_000_000)}"
    ),
    lambda rng: "@decorator\ndef f(self): return a @ b",
    lambda rng: "git clone git@github.com:user/project.git",
    lambda rng: "see https://example.com/a/12345678/b?id=9876543210",
    lambda rng: 'password = "<your password here>" and token = os.environ["API_TOKEN"]',
    lambda rng: f"pages {rng.randint(100, 400)}-{rng.randint(401, 800)}, years 1998-2003, 2010 2011 2012",
    lambda rng: (
        f"section {rng.randint(1, 9)}.{rng.randint(1, 9)}.{rng.randint(1, 9)}.{rng.randint(1, 9)} of the standard"
    ),
    lambda rng: f"{rng.randint(1, 9)},{digits(rng, 3)},{digits(rng, 3)}.{digits(rng, 2)} dollars",
    lambda rng: f"人口{digits(rng, 8)}人，面积{digits(rng, 5)}平方公里",
    lambda rng: f"0x{''.join(rng.choices('0123456789ABCDEF', k=16))} + 1e{rng.randint(10, 99)}",
)


def labelled_texts(count: int, seed: int = 0) -> Iterator[Labelled]:
    """Texts of six sentences each: entities and traps in random order."""
    rng = random.Random(seed)
    for _ in range(count):
        text, entities = "", []
        for _ in range(6):
            if rng.random() < 0.5:
                kind = rng.choice(sorted(SENTENCES))
                forms = SENTENCES[kind]
                # Of the forms that a kind has, the last is rarer.
                make, sentences = rng.choices(forms, weights=[3] * (len(forms) - 1) + [1])[0]
                before, after = rng.choice(sentences).split("{}")
                value = make(rng)
                start = len(text) + len(before)
                entities.append((kind, start, start + len(value)))
                text += before + value + after + "\n"
            else:
                text += rng.choice(TRAPS)(rng) + ".\n"
        yield Labelled(text, entities)
