"""MinHash in plain Python, straight from its description: what the kernels must equal bit for bit."""

import hashlib
import unicodedata
from collections.abc import Iterator

UNSPACED = (
    *(range(0x0E00, 0x10A0), range(0x1780, 0x1800), range(0x3040, 0x3100), range(0x31F0, 0x3200)),
    *(range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0xF900, 0xFB00), range(0x1AFF0, 0x1B170)),
    range(0x20000, 0x40000),
)
HAN = (range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0x20000, 0x2F800), range(0x30000, 0x40000))
M32, M64 = 2**32 - 1, 2**64 - 1
ROLL = 0x9E3779B97F4A7C15


def folded(text: str) -> Iterator[tuple[str, str]]:
    """(kind, character) of what a text is folded to."""
    for character in text:
        for part in unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold()):
            category, point = unicodedata.category(part), ord(part)
            unspaced = any(point in points for points in UNSPACED)
            if category == "Cf" or 0xFE00 <= point <= 0xFE0F or 0xE0000 <= point <= 0xE0FFF:
                continue
            if any(point in points for points in HAN):
                yield "alone", part
            elif category[0] in "LMN" or part == "_":
                yield ("alone" if unspaced else "word"), part
            else:
                yield "separator", part


def words(text: str) -> list[str]:
    """The words of a text."""
    found = [""]
    for kind, character in folded(text):
        if kind == "word":
            found[-1] += character
        else:
            found += [character, ""] if kind == "alone" else [""]
    return [word for word in found if word]


def mix(x: int) -> int:
    """MurmurHash3's finaliser."""
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & M64
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 & M64
    return x ^ x >> 33


def word_hash(word: str) -> int:
    """FNV-1a over code points, mixed."""
    value = 0xCBF29CE484222325
    for character in word:
        value = (value ^ ord(character)) * 0x100000001B3 & M64
    return mix(value)


def shingles(text: str, gram: int) -> list[int]:
    """Hashes of all runs of `gram` words; of all words where there are fewer."""
    hashes = [word_hash(word) for word in words(text)]
    runs = [hashes[start : start + gram] for start in range(max(1, len(hashes) - gram + 1))] if hashes else []
    return [mix(sum(h * pow(ROLL, len(run) - 1 - i, 2**64) for i, h in enumerate(run)) & M64) for run in runs]


def signature(text: str, gram: int, permutations: int, seed: int) -> list[int]:
    """The least a x + b for each permutation."""
    stream = hashlib.shake_256(f"MinHash permutations, seed {seed}".encode()).digest(8 * permutations)
    numbers = [int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(2 * permutations)]
    a, b = [number | 1 for number in numbers[:permutations]], numbers[permutations:]
    values = [value >> 32 for value in shingles(text, gram)]
    return [min([M32, *((a[k] * x + b[k]) & M32 for x in values)]) for k in range(permutations)]
