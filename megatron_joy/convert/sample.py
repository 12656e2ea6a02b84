"""Which tensors of a large model are compared after writing: some of every kind, drawn by a seed."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blake3 import blake3

VERIFY_BYTES = 20_000_000_000  # a model of more is sampled; comparing reads and converts everything a second time
_NUMBER = re.compile(r"\d+")


def kind_of(name: str) -> str:
    """The name with a star for each number: those of layers and experts that are alike have one kind."""
    return _NUMBER.sub("*", name)


@dataclass(frozen=True)
class Sample:
    """How much is compared. at_most: bytes, None for everything, however large."""

    at_most: int | None = VERIFY_BYTES
    seed: int = 0

    def draw(self, sizes: Mapping[str, int], kind: Callable[[str], str] = kind_of) -> frozenset[str]:
        """The names to compare, of tensors or parameters with their bytes; all of them when together they are allowed.

        Else one of every kind, even where these are more bytes, then others as long as they fit. The order is that of
        BLAKE3 of seed and name, so that the same names come out on any machine and with any number of workers.
        """
        if self.at_most is None or sum(sizes.values()) <= self.at_most:
            return frozenset(sizes)
        drawn = sorted(sizes, key=lambda name: blake3(f"{self.seed} {name}".encode()).digest())
        chosen = set({kind(name): name for name in reversed(drawn)}.values())
        left = self.at_most - sum(sizes[name] for name in chosen)
        for name in drawn:
            if name not in chosen and sizes[name] <= left:
                chosen.add(name)
                left -= sizes[name]
        return frozenset(chosen)


UNSAID = Sample()
