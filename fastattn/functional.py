"""Everything the library computes, in one list. Each function lives in fastattn/ops/<op>.py beside its gradient."""

from fastattn.ops.attention import attention, attention_varlen, scaled_dot_product_attention
from fastattn.ops.attention_decode import attention_decode
from fastattn.ops.bias_gelu import bias_gelu
from fastattn.ops.layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastattn.ops.linear_cross_entropy import linear_cross_entropy
from fastattn.ops.position import add_positional_encoding, embeddings
from fastattn.ops.softmax import log_softmax, scaled_masked_softmax, softmax

__all__ = [
    "add_layer_norm",
    "add_positional_encoding",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "attention_varlen",
    "bias_gelu",
    "embeddings",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "scaled_masked_softmax",
    "softmax",
]
