"""Dependencies stand before their users; networkx says independently what a cycle and a component is."""

import random

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.code.imports import imports_of
from data_pipeline.code.order import components, cycles, is_ordered, shuffled, topological
from data_pipeline.code.repository import documents

NAMES = [f"f{i:02d}.py" for i in range(12)]
GRAPHS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=40)


def graph_of(edges: list[tuple[str, str]]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {name: set() for name in NAMES}
    for path, target in edges:
        if path != target:
            found[path].add(target)
    return {path: frozenset(targets) for path, targets in found.items()}


@settings(deadline=None)
@given(GRAPHS)
def test_components_and_cycles_are_those_of_an_independent_library(edges: list[tuple[str, str]]) -> None:
    imports = graph_of(edges)
    directed = networkx.DiGraph((path, target) for path in imports for target in imports[path])
    directed.add_nodes_from(imports)
    expected = networkx.weakly_connected_components(directed)
    found = components(imports)
    assert sorted(map(sorted, expected)) == sorted(found)
    assert found == sorted(found, key=lambda members: (-len(members), members[0]))
    strong = sorted(map(sorted, networkx.strongly_connected_components(directed)))
    assert sorted(cycles(imports)) == strong


@settings(deadline=None)
@given(GRAPHS)
def test_every_import_outside_a_cycle_points_backwards(edges: list[tuple[str, str]]) -> None:
    imports = graph_of(edges)
    together = {path: number for number, group in enumerate(cycles(imports)) for path in group}
    for members in components(imports):
        order = topological(members, imports)
        assert sorted(order) == members
        place = {path: number for number, path in enumerate(order)}
        for path in members:
            for target in imports[path]:
                assert place[target] < place[path] or together[target] == together[path]
        # The files of a cycle stand together, in the order of their paths.
        for group in cycles({path: imports[path] for path in members}):
            assert order[place[group[0]] : place[group[0]] + len(group)] == group


REPOSITORIES = {
    "python": (
        {
            "pkg/__init__.py": "",
            "pkg/base.py": "import json\nX = 1\n",
            "pkg/sub/__init__.py": "from ..base import X\n",
            "pkg/sub/deep.py": "from . import sibling\nfrom ..base import (X,\n    Y)\nimport pkg.other as o\n",
            "pkg/sub/sibling.py": "def f():\n    from pkg import other\n",
            "pkg/other.py": "from pkg import base\n",
            "pkg/json.py": "",
            "scripts/run.py": "import helper\nfrom pkg.sub.deep import x\n",
            "scripts/helper.py": "",
        },
        {
            "pkg/sub/__init__.py": {"pkg/base.py"},
            "pkg/sub/deep.py": {"pkg/sub/sibling.py", "pkg/base.py", "pkg/other.py"},
            "pkg/other.py": {"pkg/__init__.py", "pkg/base.py"},
            "scripts/run.py": {"scripts/helper.py", "pkg/sub/deep.py"},
        },
    ),
    "c": (
        {
            "src/a.c": '#include "a.h"\n#include <lib/b.h>\n#include <stdio.h>\n',
            "src/a.h": '  #  include "../include/lib/b.h"\n',
            "include/lib/b.h": "",
            "other/a.h": "",
        },
        {"src/a.c": {"src/a.h", "include/lib/b.h"}, "src/a.h": {"include/lib/b.h"}},
    ),
    "java": (
        {
            "src/org/x/A.java": "import org.x.y.B;\nimport static org.x.C.max;\nimport java.util.List;\n",
            "src/org/x/y/B.java": "import org.x.C.Inner;\n",
            "src/org/x/C.java": "",
        },
        {"src/org/x/A.java": {"src/org/x/y/B.java", "src/org/x/C.java"}, "src/org/x/y/B.java": {"src/org/x/C.java"}},
    ),
    "scripts": (
        {
            "web/app.ts": 'import { a } from "./lib/a.js";\nimport React from "react";\nconst b = require("../b");\n',
            "web/lib/a.ts": 'export * from "..";\n',
            "web/index.ts": "",
            "b/index.js": "",
        },
        {"web/app.ts": {"web/lib/a.ts", "b/index.js"}},
    ),
    "go": (
        {
            "main.go": 'package main\nimport (\n\t"fmt"\n\tu "example.org/repo/internal/util"\n)\n',
            "internal/util/a.go": "package util\n",
            "internal/util/a_test.go": "package util\n",
        },
        {"main.go": {"internal/util/a.go"}},
    ),
    "rust": (
        {
            "src/main.rs": "mod net;\nuse crate::net::tcp::Stream;\nuse std::fs;\n",
            "src/net/mod.rs": "pub mod tcp;\n",
            "src/net/tcp.rs": "use super::Thing;\nuse crate::util::{a, b};\n",
            "src/util.rs": "",
        },
        {
            "src/main.rs": {"src/net/mod.rs", "src/net/tcp.rs"},
            "src/net/mod.rs": {"src/net/tcp.rs"},
            "src/net/tcp.rs": {"src/util.rs"},
        },
    ),
}


@pytest.mark.parametrize("language", REPOSITORIES)
def test_imports_inside_the_repository_are_found_and_no_others(language: str) -> None:
    files, expected = REPOSITORIES[language]
    found = imports_of("repo", files)
    assert {path: set(targets) for path, targets in found.items() if targets} == expected


def test_a_repository_that_is_itself_a_package_knows_its_own_name() -> None:
    files = {"__init__.py": "", "core/a.py": "from tool.core.b import x\n", "core/b.py": ""}
    assert imports_of("tool", files)["core/a.py"] == {"core/b.py"}
    assert imports_of("another", files)["core/a.py"] == frozenset()


def chain_of(length: int) -> dict[str, str]:
    files = {f"m{i:03d}.py": f"import m{i + 1:03d}\nvalue_{i} = 1\n" for i in range(length - 1)}
    return files | {f"m{length - 1:03d}.py": "value = 0\n"}


def test_a_document_has_dependencies_first_and_each_file_under_its_path() -> None:
    (document,) = documents("repo", chain_of(4), longest=10_000, ordered_share=1.0)
    assert document.files == ("m003.py", "m002.py", "m001.py", "m000.py") and document.ordered
    assert document.text.startswith("# m003.py\nvalue = 0\n\n# m002.py\nimport m003\n")


def test_every_file_is_in_one_document_and_none_is_too_long() -> None:
    files = chain_of(40) | {f"alone/x{i}.c": f"int a{i};\n" for i in range(30)} | {"big.c": "int b;\n" * 500}
    found = list(documents("repo", files, longest=600))
    assert sorted(path for document in found for path in document.files) == sorted(files)
    assert all(len(document.text) <= 600 for document in found if document.files != ("big.c",))
    shuffled_files = dict(random.Random(1).sample(sorted(files.items()), len(files)))
    assert list(documents("repo", shuffled_files, longest=600)) == found


def test_half_of_the_components_are_ordered_by_imports() -> None:
    drawn = [is_ordered(f"repo{i}", "a.py", 0.5) for i in range(2000)]
    assert abs(sum(drawn) - 1000) < 110  # five standard deviations of a fair coin
    assert all(is_ordered(f"repo{i}", "a.py", 1.0) for i in range(50))
    assert not any(is_ordered(f"repo{i}", "a.py", 0.0) for i in range(50))


def test_random_order_depends_on_the_repository_alone() -> None:
    members = [f"{i}.py" for i in range(50)]
    assert shuffled(members, "a") == shuffled(members[::-1], "a") != shuffled(members, "b")
    assert sorted(shuffled(members, "a")) == sorted(members)
