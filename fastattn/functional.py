"""Everything the library computes, in one list. Each function lives in fastattn/ops/<op>.py beside its gradient."""

from fastattn.ops.attention import attention, attention_varlen, scaled_dot_product_attention
from fastattn.ops.layer_norm import layer_norm

__all__ = ["attention", "attention_varlen", "layer_norm", "scaled_dot_product_attention"]
