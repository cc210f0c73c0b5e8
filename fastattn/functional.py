"""Everything the library computes, in one list. Each function lives in fastattn/ops/<op>.py beside its gradient."""

from fastattn.ops.layer_norm import layer_norm

__all__ = ["layer_norm"]
