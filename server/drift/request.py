"""What `graft drift` was asked for, as values.

Owns these shapes. Knows nothing about flags, tensors or files.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.ground.config import Settings

ALL = "all"  # in place of names: every adapter that there is


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the file: a text, or the messages of a conversation; the other is None."""

    line: int  # counted from 1
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The prompts of one file, and what a receipt needs to name it."""

    path: Path
    sha256: str
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What makes the command fail; None is no limit. They hold for the base and for every adapter measured."""

    max_kl: float | None = None  # nats, of the mean
    min_agreement: float | None = None  # share


@dataclass(frozen=True, slots=True)
class DriftRequest:
    """One measurement. `settings` are those of the served base, as `graft serve` would have them."""

    settings: Settings
    prompts: PromptFile
    adapters: tuple[str, ...]  # names, or (ALL,)
    reference: str
    reference_dtype: str
    reference_device: str
    max_tokens_per_prompt: int | None
    limits: Limits
    json_path: Path | None
