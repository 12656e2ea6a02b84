"""Licences are told by what files say: tags, and phrases of the texts that distributions here really ship."""

import importlib.metadata
from pathlib import Path

import pytest

from data_pipeline.code.licence import PERMISSIVE, is_allowed, of_repository, recognised, tagged


def licence_text(distribution: str) -> str:
    files = importlib.metadata.files(distribution) or []
    path = next(file for file in files if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")))
    return Path(str(path.locate())).read_text()


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        ("transformers", "Apache-2.0"),
        ("pydantic", "MIT"),
        ("rich", "MIT"),
        ("xxhash", "BSD-2-Clause"),
        ("httpx", "BSD-3-Clause"),
        ("typing_extensions", "PSF-2.0"),
        ("hypothesis", "MPL-2.0"),
    ],
)
def test_real_licence_texts_are_recognised(distribution: str, expected: str) -> None:
    assert recognised(licence_text(distribution)) == expected


def test_a_text_that_is_no_licence_is_none() -> None:
    assert recognised("This file explains how licences are told.") is None


def test_a_tag_counts_near_the_top_only() -> None:
    assert tagged("/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */") == "GPL-2.0-only OR MIT"
    assert tagged("x" * 3000 + "SPDX-License-Identifier: MIT") is None


def test_a_repository_has_the_licences_of_its_root() -> None:
    apache, mit = licence_text("transformers"), licence_text("rich")
    assert of_repository({"LICENSE": apache, "vendor/LICENSE": mit, "a.py": ""}) == "Apache-2.0"
    assert of_repository({"LICENSE-APACHE": apache, "LICENSE.MIT": mit}) == "Apache-2.0 AND MIT"
    assert of_repository({"a.py": ""}) is None


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("GPL-3.0 OR MIT", True),
        ("GPL-3.0 AND MIT", False),
        ("Apache-2.0 AND MIT", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        (None, False),
    ],
)
def test_an_expression_is_met_by_any_side_of_or_and_every_side_of_and(expression: str | None, allowed: bool) -> None:
    assert is_allowed(expression, PERMISSIVE) is allowed
