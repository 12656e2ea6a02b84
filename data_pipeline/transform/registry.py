"""Every kind of transform that a pipeline can name."""

import typing
from typing import Annotated

from pydantic import Field

from data_pipeline.clean.c4 import C4Section
from data_pipeline.clean.chinese import ChineseSection
from data_pipeline.clean.fineweb import FinewebSection
from data_pipeline.clean.gopher import GopherQualitySection, GopherRepetitionSection
from data_pipeline.clean.language import LanguageSection
from data_pipeline.clean.length import LengthSection
from data_pipeline.clean.noise import NoiseSection
from data_pipeline.clean.site_lines import SiteLinesSection
from data_pipeline.clean.urls import UrlBlocklistSection
from data_pipeline.code.block import CodeSection
from data_pipeline.extract.html import ExtractSection
from data_pipeline.extract.normalise import NormaliseSection
from data_pipeline.pii.block import PiiSection
from data_pipeline.transform.base import TransformSection

AnyTransform = Annotated[
    C4Section
    | ChineseSection
    | CodeSection
    | ExtractSection
    | FinewebSection
    | GopherQualitySection
    | GopherRepetitionSection
    | LanguageSection
    | LengthSection
    | NoiseSection
    | NormaliseSection
    | PiiSection
    | SiteLinesSection
    | UrlBlocklistSection,
    Field(discriminator="kind"),
]


def _kinds() -> dict[str, type[TransformSection]]:
    sections = typing.get_args(typing.get_args(AnyTransform)[0])
    return {typing.get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}


KINDS = _kinds()
