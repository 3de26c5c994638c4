"""What every section of the settings is: frozen, and an unknown key is an error; and what two of them share."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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
