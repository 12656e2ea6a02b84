"""What each code point is to the kernels that count words: one table, made from Python's own `re` and `str`."""

import re
from functools import cache

import numpy as np
import numpy.typing as npt

POINTS = 0x110000
WORD, LETTER, SPACE, JOINER, BREAK, BULLET, HAN = (1 << bit for bit in range(7))
RUNS = {WORD: r"\w+", LETTER: r"[^\W\d_]+", SPACE: r"\s+"}
OTHERS = {JOINER: tuple(map(ord, "'’.-")), BULLET: tuple(map(ord, "•-")), HAN: range(0x3400, 0xA000)}


@cache
def classes() -> npt.NDArray[np.uint8]:
    """uint8 [POINTS], of each code point the bits of what it is; a tenth of a second, once for each process."""
    table = np.zeros(POINTS, dtype=np.uint8)
    every = np.arange(POINTS, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    for bit, pattern in RUNS.items():
        for run in re.finditer(pattern, every):
            table[run.start() : run.end()] |= np.uint8(bit)
    for bit, points in OTHERS.items():
        table[list(points)] |= np.uint8(bit)
    # Only white space ends a line.
    for point in np.flatnonzero(table & SPACE).tolist():
        if len(f"a{chr(point)}a".splitlines()) == 2:
            table[point] |= np.uint8(BREAK)
    return table


@cache
def classes_address() -> int:
    """Where the table lies; it stays there as long as the process."""
    return classes().ctypes.data
