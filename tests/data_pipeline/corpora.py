"""Small corpora, pipelines over them, and running them inside the test's own process."""

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.config import Pipeline, load_pipeline
from data_pipeline.engine import Engine, Job, make_plan, save_plan
from data_pipeline.stages import STAGES
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.shards import ShardReader

NOBODY = 65534
# What tokenizers stumble over: marks, scripts, spaces, controls, digits, names of special tokens, odd code points.
ODD_STRINGS = [
    "plain words, and more words.",
    " leading  and   trailing   ",
    "\ttabs\t\tand\n\n\nnewlines\r\nand returns\r\r",
    "1234567890 1 22 333 4444 55555 ١٢٣٤ ½ ²³ 𝟘𝟙",
    "naïve café Ångström e\u0301 o\u0308 n\u0303",
    "İstanbul ıssız ß ſ ﬁ ﬂ Ǆ",
    "日本語のテキスト、漢字とかな。中文文本，没有空格。한국어 텍스트",
    "עברית ومرحبا بالعالم हिन्दी ไทย ქართული አማርኛ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 e️⃣ 🇫🇷",
    "zero\u200bwidth\u200d and \u2028 line \u2029 paragraph \u00a0 space \u3000 wide",
    "\ufeff bom inside, \ufffd replacement, \ufffe \uffff \U0010ffff \ue000 private",
    "\x00 nul \x01\x02\x1b[31m controls \x7f \x85",
    "<|endoftext|> <|pad|> <s> </s> [INST] <think> </think> <|im_start|>",
    "<｜begin▁of▁sentence｜><｜end▁of▁sentence｜><｜User｜>hello<｜Assistant｜>",
    "def f(x):\n    return x**2  # caf\u00e9\n\n\nclass A:\n\tpass\n",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\temp\\x",
    "a" * 1000,
    " " * 300 + "x",
    "!" * 200,
    "ab" * 500 + "\n" * 50,
    "'s 't 're 've 'm 'll 'd 'S 'T I'M YOU'LL",
    "\u0300\u0301\u0302 marks alone",
    "x",
    "\n",
]


def texts(count: int, seed: int = 0) -> list[str]:
    """Different texts of some hundred characters, with odd ones among them."""
    chance = random.Random(seed)
    words = [f"{chance.choice('bcdfgklmnprst')}{chance.choice('aeiou')}{chance.choice('lnrst')}" for _ in range(60)]
    found = [
        f"Text {number}: " + " ".join(chance.choices(words, k=chance.randint(20, 120))) + chance.choice(".!?\n")
        for number in range(count)
    ]
    return found + [text for text in ODD_STRINGS if text.strip()]


def write_jsonl(path: Path, documents: Iterable[str], **fields: Any) -> Path:
    """A JSONL file of these texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text, **fields}, ensure_ascii=False) + "\n" for text in documents)
    path.write_bytes("".join(lines).encode())
    return path


def write_pipeline(
    folder: Path, out: Path, extra: str = "", tokenizer: str = "vocab_size = 300", **output: Any
) -> Path:
    """A pipeline's TOML over `folder/*.jsonl`."""
    settings = {"validation_share": 0.1, "shard_megabytes": 0.02, **output}
    path = folder / "pipeline.toml"
    path.write_text(
        f'name = "tiny"\n{extra}\n[[sources]]\nname = "texts"\nreader = "jsonl"\npaths = ["{folder}/*.jsonl"]\n'
        f'[tokenizer]\n{tokenizer}\n[output]\nfolder = "{out}"\n'
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    )
    return path


def plan_inline(path: Path, *overrides: str) -> Engine:
    """A pipeline's engine with its plan written, in this process."""
    pipeline: Pipeline = load_pipeline(str(path), overrides)
    plan = make_plan(pipeline)
    save_plan(pipeline, plan)
    return Engine(Job(pipeline, plan), STAGES)


def run_inline(path: Path, *overrides: str) -> Engine:
    """Run a pipeline in this process, task after task."""
    engine = plan_inline(path, *overrides)
    for stage, shards in engine.unfinished():
        for shard in shards:
            engine.run_task(stage, shard)
    return engine


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the published sets and the tokenizer, by path."""
    roots = [folder / name for name in ("train", "validation", "tokenizer")]
    files = sorted(path for root in roots for path in root.rglob("*") if path.is_file())
    files.append(folder / "quarantine.jsonl")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents_of(folder: Path) -> list[str]:
    """Every document of a set, decoded, in order."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    found = []
    for entry in load_manifest(folder).shards:
        reader = ShardReader(folder / entry.name)
        rows = (reader.document(number)[:-1].tolist() for number in range(len(reader)))
        found += [tokenizer.decode(row, skip_special_tokens=False) for row in rows]
    return found


@contextmanager
def plain_user() -> Iterator[None]:
    """As somebody to whom rights apply: the superuser may read everything."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)
