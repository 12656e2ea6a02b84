"""Personal data replaced by typed placeholders: <EMAIL_3f09ab12c4de>, the same for the same address in a corpus.

The number is a keyed hash (BLAKE2b) of the kind and the normal form: documents can still be about the same person, and
nobody without the key can test a guess. The key comes from an environment variable and is written nowhere. Without a
key placeholders have no number. JoyAI-LLM Flash's report anonymises "a wider set of global identity markers" (2.3.1).
"""

import hashlib
import os
from collections import Counter
from typing import Any, ClassVar, Literal

from pydantic import Field

from data_pipeline.pii.detect import Finding, find_all
from data_pipeline.transform.base import Block, Draft, TransformSection
from megatron_joy.errors import UserError

Kind = Literal["email", "phone", "ip", "id", "bank", "secret"]
LEAST_KEY = 16  # bytes
DIGEST = 6  # bytes of a placeholder's number: below 1e-3 that any two of 700,000 entities share one


class PiiSection(TransformSection):
    """Replaces personal data and secrets by typed placeholders; statistics: replacements by kind. Drops nothing."""

    hides: ClassVar[bool] = True
    kind: Literal["pii"]
    kinds: list[Kind] = Field(
        default=["email", "phone", "ip", "id", "bank", "secret"], min_length=1, description="What is replaced."
    )
    key_variable: str | None = Field(
        None, description="Environment variable with the secret key of the pseudonyms; none: placeholders unnumbered."
    )

    def make(self) -> Block:
        """The block. Raises UserError when the key is wanted and missing or short."""
        return _Pii(self)

    def fingerprint(self) -> str | None:
        """What tells one key from another: other pseudonyms are other documents."""
        return hashlib.blake2b(b"which key", key=_key(self)).hexdigest() if self.key_variable else None


def _key(section: PiiSection) -> bytes:
    """The key, 16 to 64 bytes. Raises UserError."""
    content = os.environ.get(section.key_variable or "", "").encode()
    if len(content) < LEAST_KEY:
        raise UserError(
            f"pii.key_variable: environment variable {section.key_variable} holds {len(content)} bytes, expected "
            f"{LEAST_KEY} or more of a secret key; export it on every machine that runs workers"
        )
    return hashlib.blake2b(content, digest_size=64).digest()


class _Pii(Block):
    def __init__(self, section: PiiSection) -> None:
        self._kinds = frozenset[str](section.kinds)
        self._key = _key(section) if section.key_variable else None

    def _placeholder(self, finding: Finding) -> str:
        if self._key is None:
            return f"<{finding.kind}>"
        content = f"{finding.kind}\0{finding.normal}".encode()
        return f"<{finding.kind}_{hashlib.blake2b(content, key=self._key, digest_size=DIGEST).hexdigest()}>"

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        findings: Any = find_all(draft.text, self._kinds)
        if findings:
            parts, place = [], 0
            for finding in findings:
                parts += [draft.text[place : finding.start], self._placeholder(finding)]
                place = finding.end
                counts[finding.kind.lower()] += 1
            draft.text = "".join([*parts, draft.text[place:]])
        return None
