"""Reference models."""

from fastattn.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
