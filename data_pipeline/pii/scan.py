"""A text with the places where each of the expressions may match, so that none looks at every character."""

import re
from collections.abc import Iterator
from enum import IntFlag

import numpy as np

from data_pipeline.native.library import kernels


class Begin(IntFlag):
    """What may begin at a place, as native/pii.c numbers it."""

    EMAIL = 1
    NUMBER = 2
    IPV4 = 4
    IPV6 = 8
    IBAN = 16
    EUROPEAN = 32
    TOKEN = 64
    VALUE = 128


class Scan:
    """One look of the kernel at a text; all detectors share it."""

    def __init__(self, text: str) -> None:
        self.text = text
        content = text.encode("ascii", "replace")  # one byte for each character: places stay what they are
        places = np.empty(len(content), dtype=np.uint64)
        self._places: list[int] = places[: kernels().joy_pii_places(content, len(content), places)].tolist()

    def matches(self, pattern: re.Pattern[str], begin: Begin) -> Iterator[re.Match[str]]:
        """What pattern.finditer(text) gives, when it matches at no other place than those of this kind."""
        end, kind = 0, int(begin)
        for place in self._places:
            if place & kind and place >> 8 >= end:
                found = pattern.match(self.text, place >> 8)
                if found:
                    end = found.end()
                    yield found
