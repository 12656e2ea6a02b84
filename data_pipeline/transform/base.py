"""What a transform is: a section of the pipeline's TOML, and the block that it makes.

A block sees one document at a time. It may change its text (and note its language), or say why the document goes. It
holds no state between documents, so the result doesn't depend on how documents were divided among workers.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from megatron_joy.recipe.schema import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


@dataclass(slots=True)
class Draft:
    """A document on its way. text: not blank at first; url: where known; path: of its input file, for people;
    language: ISO 639 code once a block found it; licence: as the record or its source states it.
    """

    text: str
    url: str | None
    path: str
    language: str | None = None
    licence: str | None = None


class Block(ABC):
    """One step of the chain."""

    @abstractmethod
    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        """Change the draft in place; returns one of its section's `reasons` when the document goes, else None.

        counts: the block's own statistics, summed over documents.
        """


class TransformSection(Section):
    """What all transforms have in common. A subclass adds `kind` (a Literal) and its settings."""

    version: ClassVar[int] = 1  # raised when the same settings give other bytes than before
    reasons: ClassVar[dict[str, str]] = {}  # why documents go, each with its meaning for people
    needs_url: ClassVar[bool] = False  # does nothing to documents without a URL
    hides: ClassVar[bool] = False  # replaces what must not be shown
    takes_html: ClassVar[bool] = False  # turns pages into text

    name: Name | None = Field(None, description="What reports call it; none: its kind.")
    sources: list[str] = Field(default_factory=list, description="Names of the sources that it is for; none: all.")
    languages: list[str] = Field(
        default_factory=list, description="Only documents that kind = language found to be in these; none: all."
    )

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.name or str(self.kind)  # type: ignore[attr-defined]

    def make(self) -> Block:
        """The block. Raises UserError for a file that cannot be used or a package that is not installed."""
        raise NotImplementedError

    def files(self) -> list[Path]:
        """Files and folders whose content the result depends on."""
        return []

    def fingerprint(self) -> str | None:
        """What the result depends on beside settings and files; it must not tell a secret."""
        return None

    def problems(self) -> Iterator[str]:
        """What is wrong with its settings together: `key: what, fix`."""
        return iter(())


def require(module: str, purpose: str) -> None:
    """Raises UserError, naming the extra that has it, when an optional package is not installed."""
    from importlib.util import find_spec

    from megatron_joy.errors import UserError

    if find_spec(module) is None:
        raise UserError(
            f"{purpose}: needs the package {module.replace('_', '-')}, which is not installed; "
            "pip install 'megatron-joy[data]'"
        )
