"""Languages are told apart without a network; block lists block hosts, what is below them, and URLs."""

from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.clean.language import LanguageSection
from data_pipeline.clean.length import LengthSection
from data_pipeline.clean.urls import UrlBlocklistSection
from data_pipeline.transform.base import Draft
from data_pipeline.transform.chain import Chain, content_digest
from megatron_joy.errors import UserError
from tests.data_pipeline.corpora import plan_inline, write_jsonl, write_pipeline

SENTENCES = {
    "en": "The committee met on Tuesday and decided to postpone the vote until the report was finished.",
    "zh": "委员会在星期二开会，决定推迟投票，直到报告完成为止。",
    "de": "Der Ausschuss tagte am Dienstag und beschloss, die Abstimmung bis zum Ende des Berichts zu verschieben.",
    "fr": "Le comité s'est réuni mardi et a décidé de reporter le vote jusqu'à ce que le rapport soit terminé.",
    "es": "El comité se reunió el martes y decidió aplazar la votación hasta que el informe estuviera terminado.",
    "ru": "Комитет собрался во вторник и решил отложить голосование до завершения доклада.",
    "ja": "委員会は火曜日に開かれ、報告書が完成するまで投票を延期することを決めました。",
    "ar": "اجتمعت اللجنة يوم الثلاثاء وقررت تأجيل التصويت حتى الانتهاء من التقرير.",
}


def test_english_and_chinese_stay_and_others_go(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    chain = Chain([LanguageSection(kind="language", keep=["en", "zh"])])
    drafts = {language: Draft(text, None, "a") for language, text in SENTENCES.items()}
    gone = {language: chain.apply(draft) for language, draft in drafts.items()}
    assert [language for language, one in gone.items() if one is None] == ["en", "zh"]
    assert {language: draft.language for language, draft in drafts.items() if draft.language} == {
        "en": "en",
        "zh": "zh",
    }
    assert chain.accounts[0].dropped == {"other": 6}
    assert chain.accounts[0].counts == {f"language_{language}": 1 for language in SENTENCES}


def test_what_the_model_doubts_goes_and_empty_keep_means_all() -> None:
    mixed = "x = 3; y(42) // 0x1f qwrt"
    chain = Chain([LanguageSection(kind="language", keep=[], threshold=0.95)])
    assert chain.apply(Draft(SENTENCES["de"], None, "a")) is None
    gone = chain.apply(Draft(mixed, None, "a"))
    assert gone is not None and gone.reason == "language.doubtful"


def test_a_transform_for_some_languages_passes_the_others_unseen() -> None:
    chain = Chain([LanguageSection(kind="language"), LengthSection(kind="length", least=10**6, languages=["zh"])])
    assert chain.apply(Draft(SENTENCES["en"], None, "a")) is None
    gone = chain.apply(Draft(SENTENCES["zh"], None, "a"))
    assert gone is not None and gone.reason == "length.short"
    assert chain.accounts[1].documents_out == 1


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    (tmp_path / "ut1" / "adult").mkdir(parents=True)
    (tmp_path / "ut1" / "games").mkdir()
    (tmp_path / "ut1" / "adult" / "domains").write_text("bad.example\n# a comment\nwww.Worse.Example\n\n192.0.2.7\n")
    (tmp_path / "ut1" / "adult" / "urls").write_text("mixed.example/bad/part\nhttps://query.example/page?id=3\n")
    (tmp_path / "ut1" / "games" / "domains").write_text("games.example\n")
    return tmp_path / "ut1"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://bad.example/", "host"),
        ("http://a.b.BAD.example:8080/x?y#z", "host"),
        ("https://worse.example", "host"),
        ("https://user:pass@bad.example/", "host"),
        ("http://192.0.2.7/x", "host"),
        ("https://notbad.example/", None),
        ("https://bad.example.org/", None),
        ("https://mixed.example/bad/part", "url"),
        ("https://www.mixed.example/bad/part/below/", "url"),
        ("https://mixed.example/bad/partial", None),
        ("https://mixed.example/", None),
        ("https://query.example/page?id=3", "url"),
        ("https://query.example/page?id=4", None),
        ("https://games.example/", "host"),
        ("http://[broken", None),
        (None, None),
    ],
)
def test_hosts_and_urls_are_blocked_with_what_is_below_them(lists: Path, url: str | None, reason: str | None) -> None:
    block = UrlBlocklistSection(kind="url_blocklist", paths=[str(lists)]).make()
    assert block.apply(Draft("text", url, "a"), Counter()) == reason


def test_categories_choose_folders_and_a_changed_list_is_another_input(lists: Path) -> None:
    section = UrlBlocklistSection(kind="url_blocklist", paths=[str(lists)], categories=["games"])
    assert section.make().apply(Draft("text", "https://bad.example/", "a"), Counter()) is None
    assert section.make().apply(Draft("text", "https://games.example/", "a"), Counter()) == "host"
    before = content_digest(section.files())
    (lists / "games" / "domains").write_text("other.example\n")
    assert content_digest(section.files()) != before


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'language\.keep: "english" is no language of the model; give ISO 639 codes'):
        LanguageSection(kind="language", keep=["en", "english"]).make()
    with pytest.raises(UserError, match="nowhere: cannot be read"):
        UrlBlocklistSection(kind="url_blocklist", paths=["nowhere"]).make()
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="no entry; give lists"):
        UrlBlocklistSection(kind="url_blocklist", paths=[str(tmp_path / "empty")]).make()
    write_jsonl(tmp_path / "a.jsonl", ["text"])
    transforms = f'[[transforms]]\nkind = "url_blocklist"\npaths = ["{tmp_path}/empty"]\n'
    with pytest.raises(UserError, match=r"transforms\.0: has no effect on sources without URLs; set url_field"):
        plan_inline(write_pipeline(tmp_path, tmp_path / "out", extra=transforms))
    transforms = '[[transforms]]\nkind = "c4"\nlanguages = ["en"]\n'
    with pytest.raises(UserError, match=r"transforms\.0\.languages: has no effect without"):
        plan_inline(write_pipeline(tmp_path, tmp_path / "out", extra=transforms))
