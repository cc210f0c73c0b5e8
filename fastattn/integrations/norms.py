"""transformers' own norms, one class for each of its models (LlamaRMSNorm, Qwen2RMSNorm ...), on functional.rms_norm and layer_norm.

There are some two hundred such classes and a handful of formulas. Which one a class computes is read off the class itself: the
names its forward uses must be those of a formula and no others, and a trial on small numbers must then agree with it. A class
that passes one and not the other is left to itself, and listed.
"""

import functools
import inspect
import types

import torch
import torch.nn.functional as F

from fastattn import backend
from fastattn import functional as ours

PACKAGES = ("transformers.", "transformers_modules.")  # the second: code that comes with a checkpoint
FORWARD = frozenset("dtype to torch float32 pow mean rsqrt variance_epsilon weight".split())
# Gemma's and those written after it, which may have a flag for the weight and a power in place of the root.
WIDENED = frozenset("_norm float weight type_as".split())
ROOTS = frozenset("torch rsqrt pow mean eps".split()), frozenset("torch pow mean eps".split())


def rms_norm(self, hidden_states):
    """weight * x / sqrt(mean(x^2) + eps), as Llama, T5 and OLMo have it. Left to transformers: a weight of another dtype than x,
    beside which some of them return the wider one, or of more dims.
    """
    if reason := _why_not(self.weight, hidden_states):
        return _leave(self, reason, hidden_states)
    return ours.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon, out_dtype="input")  # fmt: skip


def layer_norm(self, hidden_states):
    """weight * (x - mean) / sqrt(var + eps), without a bias, as Cohere has it. Left to transformers: what rms_norm leaves."""
    if reason := _why_not(self.weight, hidden_states):
        return _leave(self, reason, hidden_states)
    return ours.layer_norm(hidden_states, self.weight.shape, self.weight, None, self.variance_epsilon, out_dtype="input")  # fmt: skip


def shifted_rms_norm(self, x):
    """(1 + weight) * x / sqrt(mean(x^2) + eps), as Gemma has it: the sum in fp32, the result in x's dtype."""
    if self.weight.dim() != 1:
        return _leave(self, f"the weight is {tuple(self.weight.shape)}, not one row", x)
    return ours.rms_norm(x, self.weight.shape, 1.0 + self.weight.float(), self.eps, out_dtype="input")


def widened_rms_norm(self, x):
    """weight * x / sqrt(mean(x^2) + eps), as Gemma 4 and Moshi have it: all in fp32, the result in x's dtype. Gemma's may be without weight."""
    weight = self.weight.float() if getattr(self, "with_scale", True) else None
    if weight is not None and weight.dim() != 1:
        return _leave(self, f"the weight is {tuple(weight.shape)}, not one row", x)
    return ours.rms_norm(x, x.shape[-1:], weight, self.eps, out_dtype="input")


def _why_not(weight, x):
    if weight.dim() != 1:
        return f"the weight is {tuple(weight.shape)}, not one row"
    return None if weight.dtype == x.dtype else f"the weight is {weight.dtype} beside an x of {x.dtype}"


def _leave(module, reason, x):
    cls = type(module).made_of[0]
    backend.leave_to_torch(cls.__name__, reason, x)
    return cls.forward(module, x)


FORMULAS = {
    rms_norm: lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 0.3),
    layer_norm: lambda x, weight: F.layer_norm(x, x.shape[-1:], weight, None, 0.3),
    shifted_rms_norm: lambda x, weight: F.rms_norm(x, x.shape[-1:], 1.0 + weight, 0.3),
    widened_rms_norm: lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 0.3),
}


@functools.cache
def formula(cls):
    """Which of the four functions above computes what cls.forward does, or None."""
    if not cls.__module__.startswith(PACKAGES) or not isinstance(cls.forward, types.FunctionType):
        return None
    names = _names(cls.forward)
    if names - {"float16", "bfloat16"} == FORWARD:  # T5's asks for these two
        candidates = (rms_norm, layer_norm)
    elif names - {"with_scale"} == WIDENED and _names(getattr(cls, "_norm", None)) in ROOTS:
        candidates = (shifted_rms_norm, widened_rms_norm)
    else:
        return None
    generator = torch.Generator().manual_seed(0)
    x, weight = 1.0 + torch.randn(5, 8, generator=generator), torch.randn(8, generator=generator)
    module = types.SimpleNamespace(weight=weight, variance_epsilon=0.3, eps=0.3, with_scale=True)
    if hasattr(cls, "_norm"):
        module._norm = types.MethodType(cls._norm, module)
    try:
        with torch.no_grad():
            y = cls.forward(module, x)
            module.with_scale = False
            unscaled = cls.forward(module, x) if "with_scale" in names else None
    except Exception:  # it needs more than the names told
        return None
    agree = [f for f in candidates if _alike(y, FORMULAS[f](x, weight))]
    if unscaled is not None and not (agree == [widened_rms_norm] and _alike(unscaled, FORMULAS[widened_rms_norm](x, None))):  # fmt: skip
        return None
    return agree[0] if agree else None


def _alike(y, expected):
    return y.shape == expected.shape and torch.allclose(y, expected, 1e-4, 1e-5)


def _names(function):
    """The names that a method of (self, x) uses, or none of any formula's if it has other arguments or cells."""
    code = getattr(inspect.unwrap(function), "__code__", None) if function else None
    if (
        code is None
        or code.co_argcount != 2
        or code.co_kwonlyargcount
        or code.co_freevars
        or code.co_flags & 12
    ):
        return frozenset()
    return frozenset(code.co_names)
