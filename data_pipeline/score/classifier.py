"""Any Hugging Face sequence classifier as a scorer. It needs torch, which is only imported when one is made."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipeline.score.base import Scores
from megatron_joy.errors import UserError

BATCH = 16
LONGEST = 512  # tokens of a text that are looked at


class ClassifierScorer:
    """A column for each label: its chance (softmax), or for a model with one label the number itself (regression)."""

    def __init__(self, folder: str, name: str = "classifier", longest: int = LONGEST) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
        except (OSError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise UserError(f"{folder}: no sequence classifier ({line}); give a model's folder") from None
        self._model = model.eval().requires_grad_(False)
        labels = [self._model.config.id2label[place] for place in range(self._model.config.num_labels)]
        self.columns = tuple(f"{name}_{label}".lower() for label in labels) if len(labels) > 1 else (name,)
        self._longest = longest

    def score(self, texts: Sequence[str]) -> Scores:
        """float32 [texts, labels]."""
        parts = [np.zeros((0, len(self.columns)), dtype=np.float32)]
        for start in range(0, len(texts), BATCH):
            inputs = self._tokenizer(
                list(texts[start : start + BATCH]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self._longest,
            )
            logits = self._model(**inputs).logits.float()
            parts.append((logits.softmax(-1) if logits.shape[-1] > 1 else logits).numpy())
        return np.concatenate(parts).astype(np.float32)
