"""The score stage: scores stay beside the shards, bounds drop with accounts, another bound scores nothing again."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config import load_pipeline
from data_pipeline.run import run_pipeline
from data_pipeline.score.heuristic import HeuristicScorer
from data_pipeline.score.linear import LinearScorer, save_linear, train_linear
from data_pipeline.score.stage import count_values, score_texts
from megatron_joy.data.manifest import load_manifest
from megatron_joy.data.verify import verify
from megatron_joy.errors import UserError
from tests.data_pipeline.corpora import digests, plan_inline, run_inline, texts, write_jsonl, write_pipeline
from tests.data_pipeline.test_run import documents_of

GOOD = [f"The river of town {n} has to be crossed with a boat that the people of the place have." for n in range(60)]
BAD = [f"Home | Login {n} | Buy now | Cart ({n}) | {n}% off" for n in range(60)]
# Prose to the model, but one repeats itself and the other is full of digits.
ODD = [" ".join([GOOD[0]] * 200), f"{GOOD[1]} " + "1234567890 " * 60]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", [*GOOD, *ODD, *BAD[:40], *GOOD[:5]])
    write_jsonl(folder / "b.jsonl", [*texts(60), *BAD])
    save_linear(train_linear("any", GOOD[::2], BAD[::2]), folder / "model")
    return folder


def sections(corpus: Path, least: float = 0.5) -> str:
    return (
        f'[[score]]\nname = "prose"\nscorer = "linear"\nfolder = "{corpus}/model"\n'
        f"keep = {{ prose = {{ least = {least} }} }}\n"
        '[[score]]\nname = "form"\nscorer = "heuristic"\nonly_kept = true\n'
        "keep = { form_letters = { least = 0.3 }, form_compression = { below = 20.0 } }\n"
    )


@pytest.fixture(scope="module")
def scored(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored")
    run_inline(write_pipeline(corpus, out, sections(corpus), keep_work=True))
    return out


def expected(corpus: Path) -> tuple[dict[str, Any], Counter[str]]:
    """Each text that stays with its scores, and what goes by reason, from the scorers alone."""
    weights = np.load(corpus / "model" / "weights.npy")
    bias = json.loads((corpus / "model" / "model.json").read_text())["bias"]
    scorer = LinearScorer("prose", weights, bias)
    kept, dropped = {}, Counter[str]()
    for text in {*GOOD, *ODD, *BAD, *texts(60)}:
        prose = scorer.score([text])[0]
        form = HeuristicScorer().score([text])[0]
        if not prose[0] >= 0.5:
            dropped["score_prose"] += 1
        elif not form[0] >= 0.3:
            dropped["score_form_letters"] += 1
        elif not form[4] < 20:
            dropped["score_form_compression"] += 1
        else:
            kept[text] = np.concatenate([prose, form])
    return kept, dropped


def test_what_the_bounds_keep_is_there_with_its_scores_and_the_accounts_close(corpus: Path, scored: Path) -> None:
    kept, dropped = expected(corpus)
    assert len(kept) > 60
    assert set(dropped) == {"score_prose", "score_form_letters", "score_form_compression"}
    found: dict[str, Any] = {}
    for split in ("train", "validation"):
        manifest = load_manifest(scored / split)
        assert manifest.score_columns[:2] == ["prose", "form_letters"]
        rows = [np.load(scored / split / str(entry.scores), allow_pickle=False) for entry in manifest.shards]
        found |= dict(zip(documents_of(scored / split), np.concatenate(rows), strict=True))
        assert {reason: n for reason, n in manifest.accounts.dropped.items() if reason.startswith("score")} == dropped
        assert verify(scored / split).problems == []
    assert found.keys() == kept.keys()
    for text, row in found.items():
        assert row.dtype == np.float32
        assert np.array_equal(row, kept[text])


def test_a_scorer_for_what_is_kept_does_not_look_at_the_rest(corpus: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(str(write_pipeline(corpus, tmp_path, sections(corpus))))
    scores = score_texts(pipeline, [GOOD[1], BAD[1]])
    assert np.isfinite(scores[0]).all()
    assert np.isfinite(scores[1, 0])
    assert np.isnan(scores[1, 1:]).all()
    assert count_values(scores, ("a", "b"))["b"]["nan"] == 1


def test_another_bound_scores_nothing_again_unless_a_later_scorer_looked_only_at_what_is_kept(
    corpus: Path, scored: Path
) -> None:
    pipeline = write_pipeline(corpus, scored, sections(corpus), keep_work=True)

    def left(*overrides: str) -> list[str]:
        return [stage for stage, _ in plan_inline(pipeline, *overrides).unfinished()]

    assert left() == []
    second = "score.1.keep={form_letters = {least = 0.4}}"
    assert left(second) == ["write", "finish"]
    assert left("score.0.keep={prose = {least = 0.9}}") == ["score", "write", "finish"]
    weights = np.load(corpus / "model" / "weights.npy")
    before = digests(scored)
    run_inline(pipeline, second)
    assert digests(scored) != before
    run_inline(pipeline)
    assert digests(scored) == before
    np.save(corpus / "model" / "weights.npy", weights * 2)
    assert left() == ["score", "write", "finish"]
    np.save(corpus / "model" / "weights.npy", weights)


def test_verify_notices_a_flipped_bit_of_the_scores(scored: Path) -> None:
    entry = load_manifest(scored / "train").shards[0]
    path = scored / "train" / str(entry.scores)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (problem,) = verify(scored / "train").problems
    assert (problem.file, problem.check) == (str(path), "BLAKE3")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ('scorer = "linear"', "score.0.folder: missing"),
        ('scorer = "heuristic"\nfolder = "x"', "score.0.folder: has no effect with scorer"),
        ('scorer = "heuristic"\nkeep = { s_leters = { least = 1.0 } }', "the nearest is s_letters"),
        ('scorer = "heuristic"\nkeep = { s_letters = {} }', "no effect without least or below"),
        ('scorer = "heuristic"\nkeep = { s_letters = { least = 1.0, below = 0.5 } }', "leaves nothing"),
        (
            'scorer = "heuristic"\nkeep = { s_letters = { leest = 1.0 } }',
            "score.0.keep.s_letters.least",
        ),
        ('scorer = "heuristic"\nonly_kept = true', "only_kept: has no effect"),
        ('scorer = "endpoint"\nurl = "http://x/v1"\nmodel = "m"', "score.0.columns: missing"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_its_fix(
    corpus: Path, tmp_path: Path, section: str, says: str
) -> None:
    path = write_pipeline(tmp_path, tmp_path / "out", f'[[score]]\nname = "s"\n{section}\n')
    with pytest.raises(UserError, match="pipeline") as error:
        load_pipeline(str(path))
    assert says in str(error.value)


def test_a_model_that_is_not_there_is_known_before_anything_is_read(corpus: Path, tmp_path: Path) -> None:
    extra = f'[[score]]\nname = "s"\nscorer = "linear"\nfolder = "{tmp_path}/none"\n'
    with pytest.raises(UserError, match=r"none: no linear model \(No such file or directory\); train one"):
        run_pipeline(str(write_pipeline(corpus, tmp_path / "out", extra)), workers=1)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_one_line(corpus: Path, tmp_path: Path) -> None:
    extra = f'[[score]]\nname = "s"\nscorer = "linear"\nfolder = "{tmp_path}/none"\n'
    with pytest.raises(UserError, match="no linear model"):
        run_inline(write_pipeline(corpus, tmp_path, extra))
