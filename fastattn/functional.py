"""Everything the library computes, in one list. Each function lives in fastattn/ops/<op>.py beside its gradient."""

from fastattn.ops.attention import attention, attention_varlen, scaled_dot_product_attention
from fastattn.ops.attention_decode import attention_decode
from fastattn.ops.layer_norm import layer_norm
from fastattn.ops.position import add_positional_encoding, embeddings

__all__ = [
    "add_positional_encoding",
    "attention",
    "attention_decode",
    "attention_varlen",
    "embeddings",
    "layer_norm",
    "scaled_dot_product_attention",
]
