"""params.yaml, validated: one frozen model per stage."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LoopSettings(Settings):
    """How long and how fast to train; shared by every training in the project."""

    seed: int = 0
    max_steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    warmup_steps: int = Field(100, ge=0)
    decay_fraction: float = Field(0.4, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "bf16"
    log_every: int = Field(10, gt=0)
    checkpoint_every: int = Field(500, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
