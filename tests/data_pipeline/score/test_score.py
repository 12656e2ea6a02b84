"""Scorers give what they say, bounds drop with a reason, and a model behind an endpoint is asked with patience."""

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.score.base import Bounds, reasons
from data_pipeline.score.classifier import ClassifierScorer
from data_pipeline.score.endpoint import EndpointScorer
from data_pipeline.score.heuristic import HeuristicScorer
from data_pipeline.score.linear import LinearScorer, features, load_linear, save_linear, train_linear
from data_pipeline.score.train import run as train_command
from megatron_joy.errors import UserError, WorkError
from tests.data_pipeline.corpora import texts, write_jsonl
from tests.data_pipeline.score import slow_linear

PROSE = "The history of the town begins with the river, and that is what the people have to be grateful for.\n"
MENU = "Home | Login | Buy now!!! | $$$ | 10% | Cart (0)\n"


def test_bounds_drop_with_the_first_reason_and_a_missing_score_is_below_everything() -> None:
    scores = np.array([[0.9, 3.0], [0.1, 99.0], [0.9, 99.0], [np.nan, 3.0]], dtype=np.float32)
    bounds = {"quality": Bounds(least=0.5), "length": Bounds(below=50)}
    found = reasons(("quality", "length"), scores, bounds)
    assert found == [None, "score_quality", "score_length", "score_quality"]
    assert reasons(("quality", "length"), scores, {"length": Bounds(least=3.0, below=99.0)})[1] == "score_length"


def test_heuristics_by_hand() -> None:
    letters, mean_word, unique, stop, compression = HeuristicScorer().score(["The cat\nThe cat\nof 12"])[0]
    assert letters == pytest.approx(14 / 21)
    assert mean_word == pytest.approx(16 / 6)
    assert (unique, stop) == (pytest.approx(2 / 3), pytest.approx(3 / 6))
    assert compression > 0
    assert HeuristicScorer().score(["", "..."]).tolist() == [[0.0] * 5] * 2
    prose, menu = HeuristicScorer().score([PROSE * 3, MENU * 3])
    assert prose[0] > menu[0] and prose[3] > menu[3]
    assert HeuristicScorer().score(["大规模语言模型"])[0][3] == 1.0


def two_kinds(count: int) -> tuple[list[str], list[str]]:
    """Texts of the same words; in each kind some words come more often."""
    rng = np.random.default_rng(1)
    usual = np.full(60, 1 / 60)
    tilted = usual * np.where(np.arange(60) < 10, 2.5, 0.7)
    kinds = [tilted / tilted.sum(), usual]
    good, bad = ([" ".join(f"w{word}" for word in rng.choice(60, 80, p=p)) for _ in range(count)] for p in kinds)
    return good, bad


def test_a_trained_linear_model_tells_kinds_apart_and_survives_its_folder(tmp_path: Path) -> None:
    good, bad = two_kinds(300)
    scorer = train_linear("kind", good[:200], bad[:200], bits=14)
    save_linear(scorer, tmp_path)
    loaded = load_linear(tmp_path)
    held = loaded.score([*good[200:], *bad[200:]])[:, 0]
    assert loaded.columns == ("kind",)
    assert np.array_equal(held, scorer.score([*good[200:], *bad[200:]])[:, 0])
    assert ((held[:100] > 0.5).mean() + (held[100:] < 0.5).mean()) / 2 > 0.9
    assert scorer.weights.tolist() == train_linear("kind", good[:200], bad[:200], bits=14).weights.tolist()


WEIGHTS = {bits: np.random.default_rng(bits).normal(size=1 << bits).astype(np.float32) for bits in (0, 3, 12, 18)}
WORDS = st.sampled_from([*"aé文㌖ﷺ.½ -\u00ad😀", "word ", "Straße ", "\n", "two words, ", "１２ "])


@settings(max_examples=150, deadline=None)
@example(" ".join(map(str, range(700))))  # more words than are hashed at a time
@example("㌖" * 400)
@example("")
@given(st.one_of(st.text(max_size=80), st.lists(WORDS, max_size=60).map("".join)))
def test_features_and_scores_of_any_text_are_those_of_plain_python(text: str) -> None:
    for bits, weights in WEIGHTS.items():
        assert features(text, bits).tolist() == slow_linear.features(text, bits)
        found = LinearScorer("any", weights, -0.1).score([text, ""])
        assert found[:, 0] == pytest.approx([slow_linear.chance(one, weights, -0.1) for one in (text, "")], abs=1e-6)
        assert found.dtype == np.float32


@pytest.mark.parametrize("weights", [np.zeros(0), np.zeros((4, 4)), np.array(1.0), np.array(["a"])])
def test_weights_of_another_shape_are_one_line(weights: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"name": "a", "bias": 0.0}')
    np.save(tmp_path / "weights.npy", weights)
    with pytest.raises(UserError, match="no linear model"):
        load_linear(tmp_path)


def test_the_training_command_writes_a_model_and_says_how_good_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = two_kinds(200)
    paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", kind)) for name, kind in (("good", good), ("bad", bad))]
    assert train_command(["--positive", paths[0], "--negative", paths[1], "--out", str(tmp_path / "model")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["trained_on"] == [180, 180] and printed["held_out"] == [20, 20]
    assert printed["area_under_curve"] > 0.9
    assert load_linear(tmp_path / "model").columns == ("quality",)


def test_a_wrong_training_file_or_model_is_one_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(3))
    wrong = ["--positive", str(tmp_path / "a.jsonl"), "--negative", str(tmp_path / "none"), "--out", str(tmp_path)]
    with pytest.raises(UserError, match="none: not a JSONL file"):
        train_command(wrong)
    with pytest.raises(UserError, match="no string 'body'"):
        train_command([*wrong, "--field", "body"])
    with pytest.raises(UserError, match="no linear model"):
        load_linear(tmp_path)


def test_a_hugging_face_classifier_gives_the_chances_of_its_labels(tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = ClassifierScorer(str(tmp_path), name="kind")
    found = scorer.score(["good good bad", "bad"])
    assert scorer.columns == ("kind_label_0", "kind_label_1")
    with torch.no_grad():
        expected = model(torch.tensor([[2, 2, 3]])).logits.softmax(-1)[0]
    assert found[0] == pytest.approx(expected.numpy(), abs=1e-5)
    assert scorer.score([]).shape == (0, 2)
    with pytest.raises(UserError, match="no sequence classifier"):
        ClassifierScorer(str(tmp_path / "nothing"))


class FakeEndpoint(BaseHTTPRequestHandler):
    """Answers by what the document says; keeps the requests."""

    requests: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        FakeEndpoint.requests.append((self.headers.get("Authorization", ""), body))
        text = body["messages"][1]["content"]
        seen = sum(body == other for _, other in FakeEndpoint.requests)
        status = 401 if "forbidden" in text else 503 if "busy" in text and seen < 3 else 200
        rating = "no idea" if "unclear" in text else f'Sure: {{"depth": {len(text) % 10}, "safety": 9}}'
        content = json.dumps({"choices": [{"message": {"content": rating}}]}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[EndpointScorer]:
    FakeEndpoint.requests.clear()
    monkeypatch.setenv("FAKE_KEY", "abc")
    with HTTPServer(("127.0.0.1", 0), FakeEndpoint) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        yield EndpointScorer(url, "judge", ("depth", "safety"), "FAKE_KEY", tries=3, pause_s=0.01, threads=2)
        server.shutdown()
        thread.join()


def test_an_endpoint_scores_in_order_and_is_asked_again_when_busy(endpoint: EndpointScorer) -> None:
    documents = ["a", "bb busy", "ccc", "unclear"]
    found = endpoint.score(documents)
    expected = [len(f"<document>\n{text}\n</document>") % 10 for text in documents[:3]]
    assert found[:3].tolist() == [[float(depth), 9.0] for depth in expected]
    assert all(map(math.isnan, found[3].tolist()))
    assert {key for key, _ in FakeEndpoint.requests} == {"Bearer abc"}
    assert FakeEndpoint.requests[0][1]["model"] == "judge"


def test_an_endpoint_that_refuses_or_is_not_there_is_one_line(
    endpoint: EndpointScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WorkError, match=r"/v1: answers 401"):
        endpoint.score(["forbidden"])
    gone = EndpointScorer("http://127.0.0.1:9/v1", "judge", tries=2, pause_s=0.01)
    with pytest.raises(WorkError, match=r"cannot be reached .* after 2 tries"):
        gone.score(["text"])
    monkeypatch.delenv("FAKE_KEY")
    with pytest.raises(UserError, match="FAKE_KEY: not set"):
        endpoint.score(["text"])
