"""Small shard sets of real text for tests: token b + 1 is byte b, 0 ends a document. Readable by hand, decodable."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_joy.data.manifest import (
    Accounts,
    Manifest,
    ShardEntry,
    TokenizerIdentity,
    Totals,
    write_manifest,
)
from megatron_joy.data.provenance import SUFFIX, DocumentOrigin, write_origins
from megatron_joy.data.shards import ShardWriter
from megatron_joy.data.steps import BatchShape, micro_batch_indices

EOD = 0
VOCABULARY = 257
TOKENIZER = hashlib.sha256(b"bytes").hexdigest()


def encode(text: str) -> npt.NDArray[np.int64]:
    """The tokens of one document, eod included."""
    return np.append(np.frombuffer(text.encode(), np.uint8).astype(np.int64) + 1, EOD)


def decode(tokens: npt.NDArray[np.int64]) -> str:
    """Text of tokens without eod."""
    return bytes((tokens - 1).astype(np.uint8)).decode()


def write_shard_set(
    folder: Path, shards: Sequence[Sequence[str]], source: str = "tiny", tokenizer: str = TOKENIZER, eod: int = EOD
) -> npt.NDArray[np.int64]:
    """Writes texts [shards][documents] as a shard set; returns all its tokens, concatenated (the naive reference)."""
    entries, everything, position = [], [], 0
    for number, texts in enumerate(shards):
        name, documents = f"shard_{number:05d}", [encode(text) for text in texts]
        with ShardWriter(folder / name, np.dtype("<u2")) as writer:
            for tokens in documents:
                writer.add(tokens, np.array([len(tokens)]))
        assert writer.summary is not None
        origins = []
        for text in texts:
            raw = text.encode()
            origins.append(
                DocumentOrigin(source, "corpus.txt", position, "CC0", hashlib.sha256(raw).hexdigest()[:32], len(raw))
            )
            position += len(raw)
        provenance = name + SUFFIX
        digest = write_origins(folder / provenance, origins)
        entries.append(ShardEntry(name=name, provenance=provenance, provenance_blake3=digest, **vars(writer.summary)))
        everything += documents
    (folder / "corpus.txt").write_bytes("".join(text for texts in shards for text in texts).encode())
    write_manifest(folder, _manifest(entries, source, tokenizer, eod))
    return np.concatenate(everything) if everything else np.zeros(0, dtype=np.int64)


def _manifest(entries: list[ShardEntry], source: str, tokenizer: str, eod: int) -> Manifest:
    documents, tokens = sum(e.documents for e in entries), sum(e.tokens for e in entries)
    return Manifest(
        source=source,
        split="train",
        tokenizer=TokenizerIdentity(sha256=tokenizer, vocab_size=VOCABULARY, eod_id=eod, eod_token="<eod>"),
        dtype="uint16",
        totals=Totals(documents=documents, tokens=tokens, bytes_text=tokens - documents),
        accounts=Accounts(documents_in=documents, documents_out=documents, dropped={}),
        shards=entries,
    )


def some_texts(shards: int, documents: int, seed: int = 0, longest: int = 40) -> list[list[str]]:
    """Texts of 1 to `longest` ASCII letters: [shards][documents]."""
    generator = np.random.default_rng(seed)

    def text() -> str:
        return bytes(generator.integers(97, 123, generator.integers(1, longest + 1), dtype=np.uint8)).decode()

    return [[text() for _ in range(documents)] for _ in range(shards)]


def dealt(shape: BatchShape, rank: int) -> Callable[[int], list[list[int]]]:
    """What a rank reads at each step when all steps have one shape."""
    return partial(micro_batch_indices, shape=shape, data_parallel_rank=rank)


def recipe_table(train: Sequence[dict[str, Any]], sequence_length: int = 16, **train_keys: Any) -> dict[str, Any]:
    """A recipe's tables around the given data.train entries, for `Recipe.model_validate`."""
    model = {
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    }
    return {
        "name": "tiny-data",
        "seed": 7,
        "model": model,
        "data": {"sequence_length": sequence_length, "train": list(train)},
        "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, **train_keys},
    }
