"""Personal data: issuers' own examples are valid and their neighbours are not; placeholders are consistent."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.data.personal_data import KINDS, score
from benchmarks.shared.personal_data import labelled_texts
from data_pipeline.pii import checksums
from data_pipeline.pii.block import PiiSection
from data_pipeline.pii.detect import find_all
from data_pipeline.pii.secrets import entropy, looks_random
from data_pipeline.transform.base import Draft
from megatron_joy.errors import UserError
from tests.data_pipeline.corpora import plan_inline, run_inline, write_jsonl, write_pipeline

# Published examples: ISO 13616 registry, card schemes' test numbers, GB 11643's own, ministries' pages.
VALID: list[tuple[Callable[[str], bool], list[str]]] = [
    (checksums.iban, ["GB82WEST12345698765432", "DE89370400440532013000", "FR1420041010050500013M02606"]),
    (checksums.payment_card, ["4111111111111111", "378282246310005", "5555555555554444", "6011111111111117"]),
    (checksums.spanish_dni, ["12345678Z", "X1234567L", "00000000T"]),
    (checksums.french_nir, ["255081416802538"]),
    (checksums.brazilian_cpf, ["52998224725", "11144477735"]),
    (checksums.italian_fiscal_code, ["RSSMRA85T10A562S", "MRTMTT91D08F205J"]),
]  # fmt: skip


@pytest.mark.parametrize(("check", "numbers"), VALID, ids=lambda value: getattr(value, "__name__", ""))
def test_published_examples_are_valid_and_most_single_changes_are_not(
    check: Callable[[str], bool], numbers: list[str]
) -> None:
    for number in numbers:
        assert check(number), number
        changed = [
            number[:place] + new + number[place + 1 :]
            for place, old in enumerate(number)
            for new in ("0123456789" if old.isdigit() else "")
            if new != old
        ]
        # Luhn, mod 11 and mod 97 detect every single wrong digit; CPF and the mod 23 letter nearly every one.
        accepted = sum(map(check, changed)) / len(changed)
        assert accepted <= (0.0 if check is not checksums.spanish_dni else 0.04), number


def test_the_chinese_standards_example_is_valid_and_every_changed_digit_is_not() -> None:
    number = "11010519491231002X"
    assert checksums.chinese_resident(number)
    for place in range(17):
        for new in set("0123456789") - {number[place]}:
            assert not checksums.chinese_resident(number[:place] + new + number[place + 1 :])
    assert not checksums.chinese_resident("110105194913310021")


@pytest.mark.parametrize(
    ("digits", "valid"),
    [("123456789", True), ("000123456", False), ("666123456", False), ("912345678", False), ("123006789", False)],
)
def test_rules_of_american_numbers(digits: str, valid: bool) -> None:
    assert checksums.us_social_security(digits) is valid


CASES = {
    "write to a.b+c@mail.example.co.uk.": ["EMAIL"],
    "邮箱abc@qq.com电话13812345678。": ["EMAIL", "PHONE"],
    "(415) 555-2671 or +1 415-555-2671": ["PHONE", "PHONE"],
    "Tel.: 030 1234567": ["PHONE"],
    "+49 30 901820": ["PHONE"],
    "2010-05-12 and 12.05.2010": [],
    "from 8.8.8.8, not 10.0.0.1, not version 1.2.3.4, not 1.2.3.4.5": ["IP"],
    "2001:4860:4860::8888 and ::1 and 12:30:45": ["IP"],
    "4111 1111 1111 1111 but 4111 1111 1111 1112": ["CARD"],
    "DE89 3704 0044 0532 0130 00 and DE88 3704 0044 0532 0130 00": ["IBAN"],
    "身份证11010519491231002X": ["ID"],
    "123-45-6789, 52998224725, 529.982.247-25": ["ID", "ID"],
    "AKIAIOSFODNN7EXAMPLE": ["SECRET"],
    'password = "hunter2hunter2"': [],
    'api_key: "q9Zr7LmP2xVt8KwN4sDf"': ["SECRET"],
    "git@github.com:a/b.git": [],
    "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA\n" * 9 + "-----END RSA PRIVATE KEY-----": ["SECRET"],
}


@pytest.mark.parametrize(("text", "kinds"), CASES.items())
def test_what_is_found_in_hand_worked_cases(text: str, kinds: list[str]) -> None:
    assert [finding.kind for finding in find_all(text, KINDS)] == kinds


def test_precision_and_recall_on_the_labelled_set_stay_where_the_card_says() -> None:
    totals = score(list(labelled_texts(400, seed=7)))
    whole = sum(totals.values(), Counter())
    assert whole["entities"] > 1000
    assert whole["found"] / whole["entities"] > 0.9
    assert whole["right"] / whole["findings"] > 0.97


def replaced(text: str, **more: object) -> str:
    draft = Draft(text, None, "a")
    assert PiiSection.model_validate({"kind": "pii", **more}).make().apply(draft, Counter()) is None
    return draft.text


def test_placeholders_are_the_same_for_the_same_entity_and_depend_on_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "A@b.org wrote to c@b.org, then a@b.org; +86 13812345678 is 13812345678 and 138-1234-5678."
    assert replaced(text) == "<EMAIL> wrote to <EMAIL>, then <EMAIL>; <PHONE> is <PHONE> and <PHONE>."
    monkeypatch.setenv("KEY", "a key of sixteen bytes")
    first = replaced(text, key_variable="KEY")
    names = first.replace(",", "").replace(";", "").replace(".", "").split()
    assert names[0] == names[5] != names[3]
    assert names[6] == names[8] == names[10]
    assert names[0].startswith("<EMAIL_") and len(names[0]) == len("<EMAIL_>") + 12
    monkeypatch.setenv("KEY", "another key of sixteen")
    assert replaced(text, key_variable="KEY") != first


def test_a_missing_or_short_key_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "tooshort")
    with pytest.raises(UserError, match=r"KEY holds 8 bytes, expected 16 or more") as error:
        replaced("x", key_variable="KEY")
    assert "tooshort" not in str(error.value)


def test_only_the_kinds_asked_for_are_replaced() -> None:
    text = "a@b.org 4111111111111111 13812345678 123-45-6789"
    assert replaced(text, kinds=["email"]) == "<EMAIL> 4111111111111111 13812345678 123-45-6789"
    assert replaced(text, kinds=["bank"]) == "a@b.org <CARD> 13812345678 123-45-6789"
    assert replaced(text, kinds=["phone", "id"]) == "a@b.org 4111111111111111 <PHONE> <ID>"


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet='0123456789+-.() @abcX:/=#"\n电话', max_size=300))
def test_findings_lie_in_order_inside_the_text_whatever_it_is(text: str) -> None:
    end = 0
    for finding in find_all(text, KINDS):
        assert end <= finding.start < finding.end <= len(text)
        end = finding.end


@pytest.mark.parametrize("unit", ["1 ", "a.", "a@", "12-", "::", "eyJ", 'token="', "AB12 ", "x" * 63 + "."])
def test_time_grows_with_the_length_and_not_with_its_square(unit: str) -> None:
    import time

    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        began = time.process_time()
        find_all(text, KINDS)
        return time.process_time() - began

    seconds(1000)
    assert seconds(400_000) < 30 * seconds(40_000) + 0.2


def test_entropy_tells_secrets_from_words() -> None:
    rng = random.Random(1)
    assert entropy("aaaa") == 0.0
    assert entropy("abcd") == pytest.approx(2.0)
    assert looks_random("".join(rng.choices("abcdefghijABCDEFGHIJ0123456789", k=32)))
    assert not looks_random("correcthorsebattery")
    assert not looks_random("https://example.org/Path1")


def test_a_pipeline_hides_personal_data_in_shards_and_in_samples_of_what_it_drops(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("pii")
    long = [f"number {number}: write to person{number}@firm.example for the rest of it" for number in range(40)]
    write_jsonl(folder / "a.jsonl", [*long, "short: a@b.org"])
    transforms = '[[transforms]]\nkind = "length"\nleast = 20\n[[transforms]]\nkind = "pii"\nkey_variable = "PII_KEY"\n'
    path = write_pipeline(folder, folder / "out", extra=transforms, keep_work=True)
    monkeypatch.setenv("PII_KEY", "a key of sixteen bytes")
    run_inline(path)
    written = b"".join(file.read_bytes() for file in (folder / "out").rglob("*") if file.is_file())
    assert b"@firm.example" not in written
    assert b"a@b.org" not in written
    assert b"a key of sixteen bytes" not in written
    assert (folder / "out" / "dropped_samples.jsonl").read_bytes().count(b"short: <EMAIL_") == 1
    monkeypatch.setenv("PII_KEY", "another key of sixteen")
    assert plan_inline(path).unfinished()[0][0] == "read"
