"""Fused attention, softmax, layer norm and positional encodings for GPT- and BERT-like models in PyTorch."""

from fastattn import functional, nn
from fastattn.backend import explain, use_backend
from fastattn.cuda import warmup
from fastattn.integrations import await_transformers
from fastattn.reroute import accelerated, disable, enable
from fastattn.swap import Report, patch, rerouted, unpatch

__version__ = "0.1.0"
__all__ = [
    "Report",
    "accelerated",
    "disable",
    "enable",
    "explain",
    "functional",
    "nn",
    "patch",
    "rerouted",
    "unpatch",
    "use_backend",
    "warmup",
]

await_transformers()
