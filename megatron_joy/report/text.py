"""Numbers and times as a person reads them. Every function gives a dash for what is missing."""

import math
from datetime import UTC, datetime

MISSING = "–"
_COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def significant(value: float, digits: int = 3) -> str:
    """Rounded to so many significant digits, never in exponent form."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def _scaled(value: float, units: tuple[tuple[float, str], ...], gap: str) -> str | None:
    for size, unit in units:
        if abs(value) >= size * 0.9995:  # what would round to 1000 of the smaller unit belongs to the larger
            number = significant(value / size)
            return f"{number.rstrip('0').rstrip('.') if '.' in number else number}{gap}{unit}"
    return None


def count(value: float | None) -> str:
    """1.23M, 4.1k; plain below a thousand."""
    if value is None or _missing(value):
        return MISSING
    return _scaled(value, _COUNT_UNITS, "") or (f"{value:.0f}" if value == int(value) else significant(value))


def whole(value: float | None) -> str:
    """12,345."""
    return MISSING if value is None or _missing(value) else f"{value:,.0f}"


def size(value: float | None) -> str:
    """4.2 MB (decimal units)."""
    if value is None or _missing(value):
        return MISSING
    return _scaled(value, _BYTE_UNITS, " ") or f"{value:.0f} B"


def loss(value: float | None) -> str:
    """Four decimals."""
    return MISSING if value is None or _missing(value) else f"{value:.4f}"


def general(value: float | None) -> str:
    """Three significant digits, exponent form where that is shorter."""
    return MISSING if value is None or _missing(value) else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """The two largest units: 2 d 3 h, 3 h 12 min, 4 min 05 s, 9.4 s."""
    if seconds is None or _missing(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"


def moment(unix_seconds: float | None) -> str:
    """2026-03-01 14:05:09 UTC."""
    if unix_seconds is None or _missing(unix_seconds):
        return MISSING
    return f"{datetime.fromtimestamp(unix_seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def plural(number: int, noun: str, many: str = "") -> str:
    """1 step, 2 steps, 1,234 steps."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"
