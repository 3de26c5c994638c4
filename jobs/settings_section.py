"""What every section of the settings is: frozen, and an unknown key is an error, which is told; and what two of them share."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import ErrorDetails


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lora(Section):
    """Of a section whose training may change the language model of `text`, too (udfs/lora.py)."""

    lora: bool = Field(
        False, description="train LoRA adapters in the LLM too; otherwise it is frozen and read from the cache"
    )
    lora_rank: int = Field(8, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    lora_learning_rate: float = Field(1e-4, gt=0, description="of the adapters; the papers'")
    lora_targets: Literal["attention", "all_linear"] = Field("attention", description="attention: query and value")


def told(error: ErrorDetails, settings: type[Section]) -> str:
    """Where in the settings it is, and what is wrong, for who knows YAML and not pydantic."""
    section: type[Section] | None = settings
    place: list[str] = []
    kind: Any = None
    for part in error["loc"]:
        if section is None and get_origin(kind) in (Union, UnionType):
            break  # of a value that may be this or that ("auto" or a number) pydantic names each
        place.append(str(part))
        if section is not None and part in section.model_fields:
            kind = section.model_fields[str(part)].annotation
            sections = (one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, Section))
            section = next(sections, None)
    says = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        says = "unknown key" + (f"; there are {', '.join(section.model_fields)}" if section else "")
    elif error["type"] == "tuple_type":
        says = "expected a list, such as [a, b]"
    elif error["type"] == "model_type":
        says = "expected a section: key: value below it"
    elif error["type"] == "string_type" and isinstance(error["input"], dict | list):
        says = "expected text; to YAML {...} and [...] are something else: quote it, such as '\"{title}\"'"
    return f"{'.'.join(place)}: {says}" if place else says
