"""docs/results/README.md: every card is listed once, with its figure and the command that the card itself gives."""

import re
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "docs" / "results"
ROW = re.compile(r"^\| \[(\w+)\]\((\w+)\.md\) \| (.+) \| `(.+)` \|$", re.MULTILINE)


def test_every_card_is_listed_once_with_its_command() -> None:
    rows = ROW.findall((RESULTS / "README.md").read_text(encoding="utf-8"))
    cards = sorted(path.stem for path in RESULTS.glob("*.md") if path.name != "README.md")
    assert sorted(name for name, _, _, _ in rows) == cards, "docs/results/README.md lists every card: add a row"
    for name, target, figure, command in rows:
        assert name == target
        assert len(figure) > 10
        words = command.removesuffix(" ...")
        assert words in (RESULTS / f"{name}.md").read_text(encoding="utf-8"), f"{name}.md has no `{words}`"
