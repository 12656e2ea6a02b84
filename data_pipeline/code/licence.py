"""The licence of a file or a repository: what it says of itself, as an SPDX identifier.

An `SPDX-License-Identifier` tag counts first. A licence file is told by phrases that only it has; that names the
family that lawyers care about (permissive or not) without a database of texts.
"""

import re
from collections.abc import Mapping

HEAD = 3000  # characters of a file in which a tag is looked for
_TAG = re.compile(r"SPDX-License-Identifier:\s*\(?([A-Za-z0-9.+\-]+(?:\s+(?:OR|AND|WITH)\s+[A-Za-z0-9.+\-]+)*)")
LICENCE_FILE = re.compile(r"^(licen[cs]e|copying|unlicense)([.\-].*)?$", re.IGNORECASE)
# The one whose first phrase comes first, of those whose phrases are all there; of two at one place the upper.
_PHRASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("AGPL-3.0", ("gnu affero general public license", "version 3")),
    ("LGPL-3.0", ("gnu lesser general public license", "version 3")),
    ("LGPL-2.1", ("gnu lesser general public license", "version 2.1")),
    ("GPL-3.0", ("gnu general public license", "version 3")),
    ("GPL-2.0", ("gnu general public license", "version 2")),
    ("MPL-2.0", ("mozilla public license", "2.0")),
    ("EPL-2.0", ("eclipse public license", "2.0")),
    ("Apache-2.0", ("apache license", "version 2.0")),
    ("BSL-1.0", ("boost software license", "1.0")),
    ("CC0-1.0", ("cc0 1.0",)),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",)),
    ("PSF-2.0", ("python software foundation license",)),
    ("ISC", ("permission to use, copy, modify, and/or distribute this software for any purpose",)),
    (
        "BSD-3-Clause",
        ("redistribution and use in source and binary forms", "neither the name", "endorse or promote products"),
    ),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms",)),
    ("MIT", ("permission is hereby granted, free of charge", 'the software is provided "as is"')),
    ("Zlib", ("this software is provided 'as-is'", "altered source versions must be plainly marked")),
)
# What the usual code corpora keep: no duty to publish what is made from it.
PERMISSIVE = (
    *("Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "MIT", "PSF-2.0", "Unlicense", "Zlib"),
)


def tagged(text: str) -> str | None:
    """The SPDX expression that a file states of itself, None where it states none."""
    found = _TAG.search(text[:HEAD])
    return " ".join(found.group(1).split()) if found else None


def recognised(text: str) -> str | None:
    """The licence whose text this is, None where it is none that is known."""
    stated = tagged(text)
    if stated:
        return stated
    plain = " ".join(text.lower().replace("“", '"').replace("”", '"').split())
    # A licence names itself before it speaks of others, as the MPL does of the GPL.
    found = [
        (plain.index(phrases[0]), name) for name, phrases in _PHRASES if all(phrase in plain for phrase in phrases)
    ]
    return min(found, key=lambda place: place[0], default=(0, None))[1]


def of_repository(files: Mapping[str, str]) -> str | None:
    """The licence of a repository by its licence files at the root (path -> text); several are joined by AND."""
    found = {recognised(text) for path, text in files.items() if "/" not in path and LICENCE_FILE.match(path)}
    names = sorted(name for name in found if name)
    return " AND ".join(names) or None


def is_allowed(licence: str | None, allowed: tuple[str, ...]) -> bool:
    """Whether an SPDX expression can be met with allowed licences: any side of OR, every side of AND."""
    if licence is None:
        return False
    known = {name.lower() for name in allowed}

    def one(name: str) -> bool:
        return name.split(" WITH ")[0].strip(" ()").removesuffix("-only").removesuffix("-or-later").lower() in known

    return any(all(one(part) for part in side.split(" AND ")) for side in licence.split(" OR "))
