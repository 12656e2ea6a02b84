"""How a source's text is cut into samples when a run reads it at more than one sequence length.

The text is cut into blocks that hold whole samples of every length (the least common multiple of the lengths), and the
blocks are dealt out, in a random order, to the lengths: each has its share of the text for ever, in proportion to what
the run's plan reads at it. So no token is read at two lengths, whatever stages or blends come between, and a long
sample is one piece of text. With one length a block is a sample and all of them are its share.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_joy.data.order import Permutation, round_keys


@dataclass(frozen=True)
class Share:
    """The blocks of one sequence length: places first .. first + count - 1 of `order`, which names blocks."""

    sequence_length: int
    block: int  # tokens
    first: int
    count: int
    order: range | Permutation

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return self.count * (self.block // self.sequence_length)

    def offset(self, index: int) -> int:
        """The first token of a sample in the source's text; index from 0 to samples - 1."""
        place, within = divmod(index, self.block // self.sequence_length)
        return self.order[self.first + place] * self.block + within * self.sequence_length


def block_of(lengths: Sequence[int]) -> int:
    """Tokens of a block."""
    return math.lcm(*lengths)


def shares(tokens: int, planned: Mapping[int, Fraction], seed: int, fingerprint: str) -> dict[int, Share] | None:
    """Each length's share of a text of so many tokens; None where there isn't a block for each.

    planned: tokens by length, of which only the proportion counts. The last token of the text is a label only. Each
    length gets one block and of the others what its part of the plan is, added up in the order of lengths and rounded
    down, so that every block belongs to one.
    """
    lengths = sorted(planned)
    block = block_of(lengths)
    blocks = (tokens - 1) // block
    if blocks < len(lengths):
        return None
    order: range | Permutation = range(blocks)
    if len(lengths) > 1:
        order = Permutation(blocks, round_keys(seed, fingerprint, "blocks", blocks, block))
    total, done, found, first = sum(planned.values()), Fraction(0), {}, 0
    for number, length in enumerate(lengths, start=1):
        done += planned[length]
        end = number + int((blocks - len(lengths)) * done / total)
        found[length] = Share(length, block, first, end - first, order)
        first = end
    return found
