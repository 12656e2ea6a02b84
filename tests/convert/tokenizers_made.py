"""Small tokenizers for tests."""

from pathlib import Path

from data_pipeline.tokenizer import save_tokenizer, train_tokenizer


def make_tokenizer(folder: Path, vocabulary: int) -> Path:
    """A byte-level tokenizer with `vocabulary` (more than 258) entries that transformers can load; <eod> is 0."""
    texts = [Path(__file__).with_name("worlds.py").read_text()] * 2
    special = ["<eod>", "<pad>"]
    save_tokenizer(train_tokenizer(texts, vocabulary, special), special, "<eod>", folder)
    return folder
