"""Real text that every machine has: documentation of Python's standard library."""

import argparse
import ast
import asyncio
import decimal
import heapq
import inspect
import pickletools
import typing
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

MODULES = (heapq, decimal, argparse, pickletools, ast, asyncio, typing)


def sample_text() -> str:
    """Some thousands of characters of English prose and code."""
    return "\n\n".join(inspect.getdoc(module) or "" for module in MODULES)


def sample_ids(tokenizer: Tokenizer | None, vocabulary: int, length: int) -> npt.NDArray[np.int64]:
    """The text's first tokens, [1, at most length]; without a tokenizer its bytes, wrapped into the vocabulary."""
    text = sample_text()
    ids: Any = tokenizer.encode(text, add_special_tokens=False).ids if tokenizer else list(text.encode())
    return np.asarray(ids[:length], dtype=np.int64)[None] % vocabulary
