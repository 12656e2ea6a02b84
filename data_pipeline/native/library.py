"""The compiled kernels and their signatures."""

import ctypes
import importlib.util
from functools import cache

import numpy as np
from numpy.ctypeslib import ndpointer

from megatron_joy.errors import UserError

BYTES, U32 = ndpointer(np.uint8), ndpointer(np.uint32)
U64, I64 = ndpointer(np.uint64), ndpointer(np.int64)
SIZE, POINTS, NUMBER = ctypes.c_int64, ctypes.c_uint32, ctypes.c_int
# What a kernel gets a document at a time is not checked at each call: ndpointer takes 2 microseconds for an array.
TEXT, ARRAY, SCORE = ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_float)
COUNTS, KEY, SUM = ctypes.POINTER(ctypes.c_int64), ctypes.c_uint64, ctypes.POINTER(ctypes.c_double)
GRAMS = (ARRAY, ARRAY, ARRAY, SIZE, NUMBER, KEY)  # numbers, ends, recurring, words, n, key
FOLDING = (U32, POINTS, U32)  # table, its length, pool
WHERE = (ARRAY, POINTS, ARRAY)  # the same, unchecked
FUNCTIONS = {
    "joy_sign": (None, (BYTES, I64, SIZE, *FOLDING, U32, U32, NUMBER, NUMBER, U32, U64, I64, U64)),
    "joy_shingles": (SIZE, (BYTES, SIZE, *FOLDING, NUMBER, U64)),
    "joy_shared": (None, (U64, I64, I64, I64, SIZE, I64)),
    "joy_line_hashes": (SIZE, (TEXT, SIZE, ARRAY, ARRAY, ARRAY)),
    "joy_spans": (SIZE, (ARRAY, ARRAY, SIZE, SIZE, SIZE, KEY, ARRAY)),
    "joy_sort_rows": (None, (U64, U64, SIZE)),
    "joy_union": (None, (I64, I64, I64, SIZE)),
    "joy_flatten": (None, (I64, SIZE)),
    "joy_places": (SIZE, (TEXT, SIZE, *WHERE, NUMBER, ARRAY)),
    "joy_linear": (SIZE, (TEXT, SIZE, *WHERE, NUMBER, ARRAY, SUM)),
    "joy_line_sums": (SIZE, (TEXT, SIZE, *WHERE, ARRAY, NUMBER, ARRAY, SIZE, ARRAY)),
    "joy_line_places": (SIZE, (TEXT, SIZE, *WHERE, ARRAY, NUMBER, ARRAY, ARRAY)),
    "joy_c4_lines": (SIZE, (TEXT, SIZE, NUMBER, SIZE, ARRAY, ARRAY)),
    "joy_count": (SIZE, (U32, SIZE, I64, SIZE)),
    "joy_capitals": (NUMBER, (TEXT, SIZE)),
    "joy_language": (
        NUMBER,
        (TEXT, SIZE, ARRAY, ARRAY, ARRAY, POINTS, POINTS, ARRAY, ARRAY, ARRAY, ARRAY, NUMBER, SCORE),
    ),
    "joy_pii_places": (SIZE, (TEXT, SIZE, U64)),
    "joy_survey": (NUMBER, (TEXT, SIZE, ARRAY)),
    "joy_json_lines": (SIZE, (BYTES, SIZE, BYTES, I64, NUMBER, BYTES, I64, SIZE)),
    "joy_count_words": (None, (TEXT, SIZE, ARRAY, ARRAY, NUMBER, COUNTS)),
    "joy_count_runs": (None, (TEXT, SIZE, ARRAY, ARRAY, NUMBER, COUNTS)),
    "joy_number_words": (SIZE, (TEXT, SIZE, ARRAY, KEY, ARRAY, ARRAY)),
    "joy_repeated_parts": (SIZE, (TEXT, SIZE, ARRAY, KEY, COUNTS)),
    "joy_top_gram": (SIZE, (ARRAY, SIZE, NUMBER, KEY, COUNTS)),
    "joy_count_pairs": (SIZE, (ARRAY, ARRAY, SIZE, KEY, ARRAY, COUNTS)),
    "joy_covered_characters": (SIZE, GRAMS),
    "joy_repeated_characters": (SIZE, GRAMS),
}


@cache
def kernels() -> ctypes.CDLL:
    """The library, loaded once. Raises UserError when it was not built, or from sources of another day."""
    found = importlib.util.find_spec("data_pipeline.native._kernels")
    if found is None or found.origin is None:
        raise UserError(
            "data_pipeline.native._kernels: not built, expected a compiled library beside kernels.c; run `make setup` "
            "(or pip install -e .), which needs a C compiler"
        )
    library = ctypes.CDLL(found.origin)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name, None)  # kept by the library, unlike library[name]
        if function is None:
            raise UserError(f"{found.origin}: built from other sources, it has no {name}; run `make setup`")
        function.restype = result
        function.argtypes = arguments
    return library
