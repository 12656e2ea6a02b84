"""The page: its numbers are the run's, nothing comes from elsewhere, nothing in a run's files can act in it."""

import base64
import hashlib
import json
import math
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_joy.report import heat
from megatron_joy.report.html import write_report
from megatron_joy.report.payload import ROWS
from megatron_joy.report.png import palette_png
from tests.report.synthetic import START_TIME, Plan, write_run

LATER = START_TIME + 1e7
EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&amp; \u2028'


class Page(HTMLParser):
    """Elements with their attributes, and the text inside each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source, self.elements, self.inside, self.texts = text, [], [], {}  # type: ignore[var-annotated]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop()[0] != tag:  # elements without an end lie on top
            pass

    def handle_data(self, data: str) -> None:
        if self.inside:
            tag, attributes = self.inside[-1]
            self.texts.setdefault((tag, attributes.get("id")), []).append(data)

    def text(self, tag: str, id: str | None = None) -> str:
        return "".join(self.texts.get((tag, id), []))

    def attributes(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.text("script", "data"))


def page_of(folder: Path, plan: Plan) -> tuple[Page, Any]:
    truth = write_run(folder, plan)
    return Page(write_report(folder, now=LATER).read_text("utf-8")), truth


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Any]:
    return page_of(tmp_path_factory.mktemp("demo") / "run", Plan(kills=((137, 100),), dead=((1, 4),), nan_steps=(20,)))


def test_the_curves_carry_the_runs_own_numbers(demo: tuple[Page, Any]) -> None:
    page, truth = demo
    rows = page.data["axes"]["rows"]
    assert rows["step"] == sorted(truth.rows)
    for name in ("loss", "mtp_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "backward_seconds"):
        expected = [truth.rows[step][name] for step in rows["step"]]
        assert page.data["series"][name]["mean"] == [None if math.isnan(v) else v for v in expected]
    assert rows["tokens"] == [truth.rows[step]["tokens"] for step in rows["step"]]
    assert rows["attempt"] == [truth.rows[step]["attempt"] for step in rows["step"]]
    assert page.data["nonfinite"] == [20]
    validation = {step: row["validation_loss"] for step, row in truth.rows.items() if "validation_loss" in row}
    assert page.data["axes"]["validation"]["step"] == list(validation)
    assert page.data["series"]["validation_loss"]["mean"] == list(validation.values())


def test_the_headline_is_in_the_html_itself(demo: tuple[Page, Any]) -> None:
    page, truth = demo
    last = truth.rows[300]
    for number in (f"{last['loss']:.4f}", f"{last['validation_loss']:.4f}", f"{last['mtp_loss']:.4f}", "1.23M", "300"):
        assert f">{number}</p>" in page.source
    assert "all 300 planned steps" in page.source
    assert "37 steps had to be run again" in page.source
    assert "layer 2 expert 4" in page.source
    static = [attributes for attributes in page.attributes("svg") if attributes.get("class") == "static"]
    assert {one["aria-label"] for one in static} >= {"Loss", "Learning rate", "Gradient norm", "Throughput"}


def test_every_panel_of_the_report_is_there(demo: tuple[Page, Any]) -> None:
    page, _ = demo
    ids = {attributes.get("id") for attributes in page.attributes("section")}
    assert ids == {
        *(
            "loss",
            "timeline",
            "lr",
            "grad_norm",
            "throughput",
            "mfu",
            "phases",
            "acceptance",
            "composition",
            "experts",
            "balance",
            "experts-history",
        ),
        *("attempts", "events", "checkpoints", "numbers", "reproduce", "recipe", "environment"),
    }


def test_the_page_asks_the_network_for_nothing(demo: tuple[Page, Any]) -> None:
    page, _ = demo
    assert not re.search(r"https?://", page.source)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert str(attributes.get(name, "data:")).startswith("data:"), (tag, attributes)
    style = page.text("style")
    assert "url(" not in style
    assert "@import" not in style


def test_only_the_pages_own_script_and_style_may_run(demo: tuple[Page, Any]) -> None:
    page, _ = demo
    (policy,) = [a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        hashed = base64.b64encode(hashlib.sha256(page.text(tag).encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{hashed}'" in policy
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.elements for name in attributes)


def test_what_a_runs_files_say_stays_text(tmp_path: Path) -> None:
    plan = Plan(steps=30, sources={EVIL: 0.5, "b": 0.5}, checkpoint_interval=10)
    write_run(tmp_path, plan)
    recipe = (tmp_path / "recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text(
        recipe.replace('"synthetic"', json.dumps(EVIL)).replace('"A run that never was."', json.dumps(EVIL))
        + f"\n# {EVIL}\n"
    )
    (tmp_path / "environment.json").write_text(json.dumps({EVIL: {"x": EVIL}, "command": EVIL}))
    with (tmp_path / "events.jsonl").open("a") as file:
        event = {"time": START_TIME, "step": 30, "attempt": 0, "kind": EVIL, "message": EVIL, "layout": EVIL}
        file.write(json.dumps(event) + "\n")
    page = Page(write_report(tmp_path, now=LATER).read_text("utf-8"))
    assert len(page.attributes("script")) == 2
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.attributes("img"))
    assert page.data["summary"]["name"] == EVIL
    assert page.data["events"][-1]["message"] == EVIL
    assert EVIL not in page.source


def test_the_pictures_of_the_load_show_the_runs_load(demo: tuple[Page, Any]) -> None:
    page, truth = demo
    every = np.array([truth.rows[s]["expert_load"] for s in range(1, 301)]) * 8  # [steps, layers, experts]
    pictures = [decode_png(str(a["src"])) for a in page.attributes("img")]
    overview, history = (
        pictures[0] if pictures[0].shape == (3, 8) else pictures[1],
        [p for p in pictures if p.shape == (8, 300)],
    )
    np.testing.assert_allclose(heat.decode(overview), every[280:].mean(axis=0), rtol=0.01, atol=0.01)
    assert heat.decode(overview)[1, 4] == 0
    assert len(history) == 3
    for layer, picture in enumerate(history):
        expected = np.where(every[:, layer] < 0.01, 0, np.clip(every[:, layer], 0.25, 4))
        np.testing.assert_allclose(heat.decode(picture), expected.T, rtol=0.01)


def decode_png(address: str) -> np.ndarray:
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    place = data.index(b"IDAT")
    rows = zlib.decompress(data[place + 4 : place + 4 + int.from_bytes(data[place - 4 : place], "big")])
    return np.frombuffer(rows, np.uint8).reshape(height, width + 1)[:, 1:]


def test_colours_give_their_codes_back() -> None:
    assert len({tuple(colour) for colour in heat.palette().tolist()}) == 256
    codes = np.arange(256, dtype=np.uint8)[None, :]
    assert (
        decode_png("data:image/png;base64," + base64.b64encode(palette_png(codes, heat.palette())).decode()).tolist()
        == codes.tolist()
    )


def test_the_unigram_entropy_is_drawn_when_the_manifest_has_it(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "manifest.json").write_text('{"unigram_entropy": 6.25}')
    page, _ = page_of(tmp_path / "runs" / "a", Plan(steps=60, validation="validation"))
    assert page.data["summary"]["unigram_entropy"] == 6.25
    assert "unigram entropy 6.25" in page.source
    without, _ = page_of(tmp_path / "runs" / "b", Plan(steps=60, validation="elsewhere"))
    assert without.data["summary"]["unigram_entropy"] is None


@pytest.mark.parametrize("broken", [False, True])
def test_an_mtp_layer_that_knows_less_than_frequencies_is_found_and_drafts_are_told(
    tmp_path: Path, broken: bool
) -> None:
    """The model's loss is below the entropy; so is the layer's, or it is above."""
    (tmp_path / "validation").mkdir()
    run = tmp_path / "runs" / "a"
    truth = write_run(run, Plan(steps=60, validation="validation", validation_interval=20))
    losses = truth.rows[60]["validation_loss"], truth.rows[60]["validation_mtp_loss"]
    entropy = sum(losses) / 2 if broken else max(losses) + 1
    (tmp_path / "validation" / "manifest.json").write_text(json.dumps({"unigram_entropy": entropy}))
    page = write_report(run).read_text()
    assert f"a pass gives <b>{truth.rows[60]['mtp_acceptance_length']:.2f} tokens</b>" in page
    assert ("the layer is young, or broken" in page) is broken


@pytest.mark.parametrize(
    "plan",
    [
        Plan(steps=1, checkpoint_interval=0, validation_interval=0),
        Plan(steps=40, with_load=False, sources={"one": 1.0}),
        Plan(steps=40, nan_steps=tuple(range(1, 41))),
        Plan(steps=60, layers=20, experts=4, sources={f"source {i}": 1.0 for i in range(12)}),
    ],
    ids=["one step", "no experts", "never a loss", "many layers and sources"],
)
def test_odd_runs_get_a_page_too(tmp_path: Path, plan: Plan) -> None:
    page, _ = page_of(tmp_path, plan)
    assert page.data["rows"] == plan.steps


def test_an_empty_run_gets_a_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    assert "has <b>not started</b>" in write_report(tmp_path, now=LATER).read_text()


def test_a_long_run_is_thinned_without_losing_its_extremes(tmp_path: Path) -> None:
    page, truth = page_of(tmp_path, Plan(steps=10_000, with_load=False, nan_steps=(5000,)))
    loss = page.data["series"]["loss"]
    assert len(loss["mean"]) == ROWS
    every = np.array([truth.rows[s]["loss"] for s in range(1, 10_001)])
    assert min(loss["low"]) == pytest.approx(np.nanmin(every), rel=1e-6)
    assert max(loss["high"]) == pytest.approx(np.nanmax(every), rel=1e-6)
    starts = (np.arange(ROWS) * 2.5).astype(int)
    expected = [np.nanmean(part) for part in np.split(every, starts[1:])]
    np.testing.assert_allclose(loss["mean"], expected, rtol=1e-6)
    assert page.data["axes"]["rows"]["step"][-1] == 10_000


def test_a_hundred_thousand_steps_make_a_small_page(tmp_path: Path) -> None:
    page, _ = page_of(
        tmp_path, Plan(steps=100_000, layers=1, experts=4, kills=((60_050, 60_000),), checkpoint_interval=500)
    )
    assert len(page.source.encode()) < 2_000_000
    assert page.data["rows"] == 100_000
    assert len(page.data["checkpoints"]) == 200


@pytest.mark.slow
def test_a_million_steps_make_a_page_under_five_megabytes(tmp_path: Path) -> None:
    rows = (
        b'{"step":%d,"attempt":0,"time":%d.5,"loss":%d.25,"mtp_loss":3.5,"lr":0.001,"grad_norm":0.5,"tokens":%d,'
        b'"tokens_per_second":1000.5,"expert_load":[[0.5,0.5],[0.25,0.75]],"sources":{"a":8,"b":8}}\n'
    )
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        for step in range(1, 1_000_001):
            file.write(rows % (step, 1_770_000_000 + step, step % 7, step * 4096))
    page = Page(write_report(tmp_path, now=LATER).read_text("utf-8"))
    assert len(page.source.encode()) < 5_000_000
    assert page.data["rows"] == 1_000_000
    assert max(page.data["series"]["loss"]["high"]) == 6.25


def test_a_guard_s_decisions_and_each_layer_s_statistics_are_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, Plan(steps=60, last_word="none"))
    event = {"time": START_TIME + 90, "step": 60, "attempt": 0, "kind": "rollback", "message": "back", "back_to": 40}
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    with (tmp_path / "statistics.jsonl").open("w") as file:
        for step, norm in ((20, 1.0), (30, 3.0), (40, 2.0), (50, 8.0)):
            values = {"gradient_norm": norm, "rms": 0.75, "largest": 4.5}
            row = {"step": step, "attempt": 0, "layers": {"decoder.layers.0": values, "<b>": {"gradient_norm": 1.25}}}
            file.write(json.dumps(row) + "\n")
    page = write_report(tmp_path, now=LATER).read_text()
    data = json.loads(re.search(r"<script[^>]*application/json[^>]*>(.*?)</script>", page, re.DOTALL)[1])  # type: ignore[index]
    assert [(one["kind"], one["step"]) for one in data["events"] if one["kind"] == "rollback"] == [("rollback", 60)]
    table = page[page.index('id="layers"') :]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table[: table.index("</section>")])
    assert cells == ["decoder.layers.0", "8", "4.00×", "0.75", "4.5", "&lt;b&gt;", "1.25", "1.00×", "–", "–"]
