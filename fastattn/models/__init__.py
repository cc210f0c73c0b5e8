"""Reference models."""

from fastattn.models.bert import BERT, BERTConfig
from fastattn.models.gpt import GPT, GPTConfig

__all__ = ["BERT", "GPT", "BERTConfig", "GPTConfig"]
