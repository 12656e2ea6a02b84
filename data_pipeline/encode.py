"""Text to token ids with gigatoken, with the Hugging Face tokenizers library as the oracle.

gigatoken gives the library's ids many times faster (docs/results/text_to_shards.md). It is trusted and checked: every
so many documents one is encoded by both, and one difference is enough for the library to take over.

A special token's string inside a document is ordinary text: no web page can end its document or open a chat turn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import numpy.typing as npt
import orjson
import psutil
from tokenizers import Tokenizer

from data_pipeline.config import EncodeSection
from data_pipeline.tokenizer import TOKENIZER_FILE, load_tokenizer
from megatron_joy.data.checksum import file_sha256
from megatron_joy.data.manifest import TokenizerIdentity
from megatron_joy.errors import WorkError

Ids = npt.NDArray[np.uint32]
LARGEST_CHECK = 100_000  # bytes; the oracle needs a second per megabyte
MEGABYTE = 1_000_000


class OracleDifference(Exception):
    """gigatoken gave other ids than the Hugging Face library; what was encoded since the last check is in doubt."""


def gigatoken_of(folder: Path) -> gigatoken.Tokenizer:
    """gigatoken's form of a tokenizer, special tokens left out so that their strings are ordinary text.

    Raises whatever gigatoken does for a tokenizer that it does not support.
    """
    content = orjson.loads((folder / TOKENIZER_FILE).read_bytes())
    added = content.get("added_tokens") or []
    content["added_tokens"] = [token for token in added if not token.get("special")]
    return gigatoken.Tokenizer.from_json(orjson.dumps(content))


_oracle: dict[str, Tokenizer] = {}  # the last one, by its file's SHA-256: loading it takes as long as encoding 50 MB


def oracle_of(folder: Path) -> Tokenizer:
    """The Hugging Face library's tokenizer, which takes special tokens' strings for ordinary text.

    Raises UserError when it is missing or the library cannot load it.
    """
    path = folder / TOKENIZER_FILE
    content = file_sha256(path) if path.is_file() else ""
    if content not in _oracle:
        tokenizer = load_tokenizer(folder)
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        _oracle.clear()
        _oracle[content] = tokenizer
    return _oracle[content]


class Encoder:
    """Encodes documents one batch after another and ends each with the tokenizer's eod.

    Attributes:
        engine: "gigatoken" or "huggingface", what is really used.
        note: why it is not gigatoken though that was wanted, else None.
        checked: documents that were compared with the oracle.
    """

    def __init__(self, folder: Path, identity: TokenizerIdentity, settings: EncodeSection) -> None:
        self.engine = "huggingface"
        self.note: str | None = None
        self.checked = 0
        self._folder = folder
        self._eod = identity.eod_id
        self._check_every = settings.check_every
        self._room = settings.memory_megabytes * MEGABYTE
        self._grown = 0
        self._until_check = 0
        # Of the last batch. Fresh memory for each batch would cost as much as looking at its tokens twice.
        self._tokens: Ids = np.zeros(0, dtype=np.uint32)
        self._oracle: Tokenizer | None = None
        self._fast: Any = None
        if settings.engine != "huggingface":
            try:
                self._fast = gigatoken_of(folder).backend
                self.engine = "gigatoken"
            except Exception as error:  # gigatoken names no common class for what it cannot load
                self.note = f"gigatoken cannot load this tokenizer ({error}); the Hugging Face library is used"
                if settings.engine == "gigatoken":
                    raise WorkError(f"{folder}: {self.note.partition(';')[0]}; set encode.engine to auto") from None

    def restart(self) -> None:
        """Begin a new shard: checks fall on the same documents whatever was encoded before."""
        self.checked = 0
        self._until_check = 0

    def _reference(self, text: bytes) -> list[int]:
        self._oracle = self._oracle or oracle_of(self._folder)
        return self._oracle.encode(text.decode(), add_special_tokens=False).ids

    def _compare(self, text: bytes, ids: Ids) -> None:
        """Compare one document with the oracle when it is time, or the next one that is not too long."""
        self._until_check -= 1
        if not self._check_every or self._until_check > 0 or len(text) > LARGEST_CHECK:
            return
        self._until_check = self._check_every
        self.checked += 1
        if self._reference(text) != ids.tolist():
            raise OracleDifference(f"gigatoken and the Hugging Face library differ on {text[:80]!r}")

    def _recycle(self, before: int) -> None:
        """Drop gigatoken's cache, which grows with novel text and has no bound of its own, once it is too large."""
        self._grown += max(0, psutil.Process().memory_info().rss - before)
        if self._grown > self._room:
            self._fast = None
            self._fast = gigatoken_of(self._folder).backend
            self._grown = 0

    def _encode_fast(self, texts: Sequence[bytes]) -> list[Ids]:
        before = psutil.Process().memory_info().rss
        encode = self._fast.encode
        encoded = [encode(text) for text in texts]
        for text, ids in zip(texts, encoded, strict=True):
            self._compare(text, ids)
        self._recycle(before)
        return encoded

    def _encode_slowly(self, texts: Sequence[bytes]) -> list[Ids]:
        self._oracle = self._oracle or oracle_of(self._folder)
        encodings = self._oracle.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode(self, texts: Sequence[bytes]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """UTF-8 texts to ids [tokens] uint32, eod after each document, and lengths [documents] int64, eod included.

        The tokens lie in a buffer that the next call writes into.

        Raises OracleDifference when a check fails, WorkError when a text would contain the eod.
        """
        encoded = self._encode_fast(texts) if self._fast is not None else self._encode_slowly(texts)
        lengths = np.fromiter((len(ids) for ids in encoded), np.int64, len(encoded)) + 1
        total = int(lengths.sum())
        if total > len(self._tokens):
            self._tokens = np.empty(total + total // 4, dtype=np.uint32)
        end = np.array([self._eod], dtype=np.uint32)
        tokens = np.concatenate([part for ids in encoded for part in (ids, end)] or [end[:0]], out=self._tokens[:total])
        if np.count_nonzero(tokens == np.uint32(self._eod)) != len(encoded):
            raise WorkError(f"{self._folder}: the tokenizer gives its end-of-document id {self._eod} for ordinary text")
        return tokens, lengths
