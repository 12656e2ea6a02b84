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
from tokenizers import Tokenizer

from data_pipeline.config import EncodeSection
from data_pipeline.cost import resident_bytes
from data_pipeline.tokenizer import TOKENIZER_FILE, load_tokenizer
from megatron_joy.data.checksum import file_sha256
from megatron_joy.data.manifest import TokenizerIdentity
from megatron_joy.errors import WorkError

Ids = npt.NDArray[np.uint32]
Text = bytes | memoryview  # UTF-8
LARGEST_CHECK = 100_000  # bytes; the oracle needs a second per megabyte
MEGABYTE = 1_000_000


# What documents are joined by, as a special token with the id of the tokenizer's eod: one call for a batch of them.
# Characters that Unicode keeps from text (section 23.7); a document with them goes to the library.
SEPARATOR = "\U0010fffe\ufdd0"


class OracleDifference(Exception):
    """gigatoken gave other ids than the Hugging Face library; what was encoded since the last check is in doubt."""


def _splits_alone(content: dict[str, Any]) -> bool:
    """Whether what stands before a document cannot change its ids: no prefix of a text, no form of the whole."""
    step = content.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    known = all(
        one.get("type") == "Split" or (one.get("type") == "ByteLevel" and one.get("add_prefix_space") is False)
        for one in steps
    )
    changes = content.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []})
    return known and not changes and (content.get("model") or {}).get("type") == "BPE"


def _encoded_otherwise(content: dict[str, Any]) -> str | None:
    """What gigatoken loads but reads otherwise than the library: known, so no shard waits for a sample that differs."""
    if any(token.get("single_word") and not token.get("special") for token in content.get("added_tokens") or []):
        return "added tokens with single_word are found inside words"
    step, model = content.get("pre_tokenizer"), content.get("model") or {}
    if step is None and content.get("normalizer") is None and not model.get("byte_fallback"):
        return "without a pre_tokenizer it takes bytes for characters"
    if step is not None and step.get("type") == "ByteLevel" and step.get("use_regex") is False:
        return "ByteLevel alone splits words, also with use_regex = false"
    return None


def gigatoken_of(folder: Path, eod_id: int) -> tuple[Any, bool]:
    """gigatoken's form of a tokenizer, special tokens left out so that their strings are ordinary text.

    Also whether it takes documents joined by `SEPARATOR`, which becomes `eod_id`. Raises whatever gigatoken does for a
    tokenizer that it does not support, ValueError for one that it is known to read otherwise.
    """
    content = orjson.loads((folder / TOKENIZER_FILE).read_bytes())
    added = content.get("added_tokens") or []
    if (otherwise := _encoded_otherwise(content)) is not None:
        raise ValueError(otherwise)
    joins = _splits_alone(content)
    content["added_tokens"] = [token for token in added if not token.get("special")]
    if joins:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append({"id": eod_id, "content": SEPARATOR, "special": True, **flags})
    return gigatoken.Tokenizer.from_json(orjson.dumps(content)).backend, joins


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
        self._oracle: Tokenizer | None = None
        self._fast: Any = None
        self._joins = False
        if settings.engine != "huggingface":
            try:
                self._fast, self._joins = gigatoken_of(folder, self._eod)
                self.engine = "gigatoken"
            except Exception as error:  # gigatoken names no common class for what it cannot load
                cause = str(error).partition("\n")[0]  # behind it: where in its source
                self.note = f"gigatoken cannot load this tokenizer ({cause}); the Hugging Face library is used"
                if settings.engine == "gigatoken":
                    raise WorkError(f"{folder}: {self.note.partition(';')[0]}; set encode.engine to auto") from None

    def restart(self) -> None:
        """Begin a new shard: checks fall on the same documents whatever was encoded before."""
        self.checked = 0
        self._until_check = 0

    def _library(self) -> Tokenizer:
        self._oracle = self._oracle or oracle_of(self._folder)
        return self._oracle

    def _compare(self, texts: Sequence[Text], tokens: Ids, ends: npt.NDArray[np.int64]) -> None:
        """Compare a document with the oracle when it is time, or the next one that is not too long."""
        if not self._check_every or self._until_check > len(texts):
            self._until_check -= len(texts)
            return
        for number, text in enumerate(texts):
            self._until_check -= 1
            if self._until_check > 0 or len(text) > LARGEST_CHECK:
                continue
            self._until_check = self._check_every
            self.checked += 1
            ids = tokens[ends[number - 1] + 1 if number else 0 : ends[number]]
            if self._library().encode(bytes(text).decode(), add_special_tokens=False).ids != ids.tolist():
                raise OracleDifference(f"gigatoken and the Hugging Face library differ on {bytes(text[:80])!r}")

    def _recycle(self, before: int) -> None:
        """Drop gigatoken's cache, which grows with novel text and has no bound of its own, once it is too large."""
        self._grown += max(0, resident_bytes() - before)
        if self._grown > self._room:
            self._fast = None
            self._fast, self._joins = gigatoken_of(self._folder, self._eod)
            self._grown = 0

    def _ended(self, encoded: Sequence[Ids]) -> Ids:
        end = np.array([self._eod], dtype=np.uint32)
        return np.concatenate([part for ids in encoded for part in (ids, end)] or [end[:0]])

    def _encode_fast(self, texts: Sequence[Text]) -> Ids:
        separator, encode = SEPARATOR.encode(), self._fast.encode
        if not self._joins:
            return self._ended([encode(bytes(text)) for text in texts])
        joined = separator.join([*texts, b""])
        if joined.count(separator) == len(texts):
            ids: Ids = encode(joined)
            return ids
        parts = map(bytes, texts)
        return np.concatenate(
            [self._encode_slowly([part]) if separator in part else encode(part + separator) for part in parts]
        )

    def _early_end(self, texts: Sequence[Text]) -> str:
        """What to say of the first text in which the library itself finds the end of a document."""
        plain = (bytes(text).decode() for text in texts)
        found = next(text for text in plain if self._eod in self._library().encode(text, add_special_tokens=False).ids)
        return (
            f"{self._folder}: the tokenizer gives its end-of-document id {self._eod} for ordinary text, "
            f"in the document that begins with {found[:80]!r}; take another tokenizer.eod_token or leave it out"
        )

    def _encode_slowly(self, texts: Sequence[Text]) -> Ids:
        encodings = self._library().encode_batch_fast(
            [bytes(text).decode() for text in texts], add_special_tokens=False
        )
        return self._ended([np.array(encoding.ids, dtype=np.uint32) for encoding in encodings])

    def encode(self, texts: Sequence[Text]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """UTF-8 texts to ids [tokens] uint32, eod after each document, and lengths [documents] int64, eod included.

        Raises OracleDifference when a check fails, WorkError when the library gives the eod for ordinary text.
        """
        if self._fast is None:
            tokens = self._encode_slowly(texts)
        else:
            before = resident_bytes()
            tokens = self._encode_fast(texts)
            self._recycle(before)
        ends = np.flatnonzero(tokens == np.uint32(self._eod))
        if len(ends) != len(texts):
            if self._fast is not None:  # the library shall say whether it is so
                raise OracleDifference(f"gigatoken gives {len(ends)} ends of documents for {len(texts)}")
            raise WorkError(self._early_end(texts))
        if self._fast is not None:
            self._compare(texts, tokens, ends)
        return tokens, np.diff(ends, prepend=-1)
