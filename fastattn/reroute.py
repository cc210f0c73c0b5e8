"""Ways into code that calls functions: `accelerated` and `enable` bring torch's calls of attention, norms and softmax to ours.

Two mechanisms, because each reaches what the other cannot. `accelerated` is a torch function mode: it lasts for a block, in
one thread and the backward passes started there, and sees every call however its name was bound; each torch call in the
block, of any kind, takes about a microsecond longer. `enable` puts our functions where torch keeps its own: for every thread, at no
cost to other calls, until `disable`; a name that a module had imported before (`from torch.nn.functional import softmax`)
keeps torch's function. docs/swap.md lists what neither reaches.
"""

import contextlib
import sys
import threading
import types
import warnings

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from fastattn import backend, functional

stock_attention, stock_multi_head = F.scaled_dot_product_attention, F.multi_head_attention_forward
stock_layer_norm, stock_rms_norm = F.layer_norm, F.rms_norm
stock_softmax, stock_log_softmax = torch.softmax, torch.log_softmax


def accelerated():
    """A context in which this thread's calls of torch's attention, norms and softmax run on fastattn; nests, and is compiled along.

    >>> with fastattn.accelerated():
    ...     loss = model(x).sum()
    ...     loss.backward()
    """
    if any(isinstance(mode, Accelerated) for mode in _get_current_function_mode_stack()):
        return contextlib.nullcontext()
    return Accelerated()


class Accelerated(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Here the mode is off. A backward pass needs it on: checkpointing computes a forward pass in it once more.
        if func in BACKWARD and set(types) <= {torch.Tensor}:
            with self:
                return BACKWARD[func](*args, **(kwargs or {}))
        return OURS.get(func, func)(*args, **(kwargs or {}))


def enable():
    """Put fastattn's functions in the place of torch's, for the whole process, until disable(). Twice is as once.

    A place where another library has put a function of its own is left to it, with a warning. nn.MultiheadAttention and
    nn.TransformerEncoderLayer keep to their functions meanwhile: the native inference path of torch is off.
    """
    global _fastpath
    with _lock:
        if _replaced:
            return
        # Dynamo looks torch's functions up by name, once, and must find torch's.
        from torch._dynamo import trace_rules  # which takes a second, and so is not imported with this file

        trace_rules.get_torch_obj_rule_map()
        for owner, name in PLACES:
            found = getattr(owner, name)
            if found not in OURS:
                warnings.warn(
                    f"enable: {owner.__name__}.{name} is {found!r}, not torch's; it is left", stacklevel=2
                )
                continue
            _replaced.append((owner, name, found, name in vars(owner)))
            setattr(owner, name, OURS[found])
        _fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)


def disable():
    """Undo enable(): torch's functions are back in their places. Does nothing where it was not on."""
    with _lock:
        if not _replaced:
            return
        for owner, name, found, own in _replaced:
            if getattr(owner, name) is not OURS[found]:
                warnings.warn(
                    f"disable: {owner.__name__}.{name} was replaced again; it is left", stacklevel=2
                )
            elif own:
                setattr(owner, name, found)
            else:
                delattr(owner, name)
        _replaced.clear()
        torch.backends.mha.set_fastpath_enabled(_fastpath)


_lock = threading.Lock()
_replaced = []  # (owner, name, what was there, whether it was the owner's own and not inherited)
_fastpath = True


# torch's functions with torch's arguments. What a tensor subclass does with them is its own business.


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                 enable_gqa=False):  # fmt: skip
    options = dict(scale=scale, enable_gqa=enable_gqa)
    args = (query, key, value, attn_mask, dropout_p, is_causal)
    if _place_is_taken() or _foreign("attention", query, key, value, attn_mask):
        return stock_attention(*args, **options)
    return functional.scaled_dot_product_attention(*args, **options)


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    function = stock_layer_norm if _foreign("layer_norm", input, weight, bias) else functional.layer_norm
    return function(input, normalized_shape, weight, bias, eps)


def rms_norm(input, normalized_shape, weight=None, eps=None):
    function = stock_rms_norm if _foreign("rms_norm", input, weight) else functional.rms_norm
    return function(input, normalized_shape, weight, eps)


def torch_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return layer_norm(input, normalized_shape, weight, bias, eps)


def softmax(input, dim, dtype=None, *, out=None):
    if not isinstance(dim, int) or out is not None or _foreign("softmax", input):
        return stock_softmax(input, dim, dtype=dtype, **({} if out is None else {"out": out}))
    return functional.softmax(input, dim, dtype)


def log_softmax(input, dim, dtype=None, *, out=None):
    if not isinstance(dim, int) or out is not None or _foreign("log_softmax", input):
        return stock_log_softmax(input, dim, dtype=dtype, **({} if out is None else {"out": out}))
    return functional.log_softmax(input, dim, dtype)


def functional_softmax(input, dim=None, _stacklevel=3, dtype=None):
    if dim is None:  # torch warns, and guesses
        dim = F._get_softmax_dim("softmax", input.dim(), _stacklevel)
    return softmax(input, dim, dtype)


def functional_log_softmax(input, dim=None, _stacklevel=3, dtype=None):
    if dim is None:
        dim = F._get_softmax_dim("log_softmax", input.dim(), _stacklevel)
    return log_softmax(input, dim, dtype)


def _never(tensors):
    return False


def _rebound(function, **names):
    """torch's own code, seeing other things under these names of its module."""
    names = vars(sys.modules[function.__module__]) | names
    del names["__name__"]  # by which Dynamo would look the names up in torch's module
    rebound = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    rebound.__kwdefaults__ = function.__kwdefaults__
    return rebound


# In a torch function mode the calls inside one of torch's functions are not seen, and this one has some worth seeing.
_multi_head_in_ours = _rebound(
    stock_multi_head,
    scaled_dot_product_attention=scaled_dot_product_attention,
    softmax=functional_softmax,
    has_torch_function=_never,
)


def multi_head_attention_forward(query, key, value, *args, **kwargs):
    function = stock_multi_head if _place_is_taken() else _multi_head_in_ours
    return function(query, key, value, *args, **kwargs)


def _place_is_taken():
    """Whether attention is now another library's: torch's context_parallel puts its own there, which must get every call."""
    return F.scaled_dot_product_attention not in (stock_attention, scaled_dot_product_attention)


def _foreign(op, *tensors):
    """Whether the arguments are torch's own business; counted, unless they are an error of the caller's."""
    for t in tensors:
        if t is None:
            continue
        if not isinstance(t, torch.Tensor):
            return True
        if t.is_nested:
            backend.leave_to_torch(op, "nested tensors take torch's own kernels", t)
            return True
        if type(t) not in (torch.Tensor, torch.nn.Parameter) and (
            type(t).__torch_function__ is not torch._C._disabled_torch_function_impl
        ):
            backend.leave_to_torch(op, f"a {type(t).__name__} has torch functions of its own", t)
            return True
    return False


# torch's entries to a backward pass, as they are with no mode on.
BACKWARD = {
    torch.Tensor.backward: _rebound(torch.Tensor.backward, has_torch_function_unary=_never),
    torch.autograd.backward: _rebound(torch.autograd.backward, has_torch_function=_never),
    torch.autograd.grad: _rebound(torch.autograd.grad, has_torch_function=_never),
}
# Not torch.layer_norm and torch.rms_norm: F's functions, on which ours may fall back, call them there.
PLACES = [
    (F, "scaled_dot_product_attention"),
    (F, "layer_norm"),
    (F, "rms_norm"),
    (F, "softmax"),
    (torch, "softmax"),
    (torch.special, "softmax"),
    (torch.Tensor, "softmax"),
    (F, "log_softmax"),
    (torch, "log_softmax"),
    (torch.special, "log_softmax"),
    (torch.Tensor, "log_softmax"),
    (F, "multi_head_attention_forward"),
]
OURS = {
    stock_attention: scaled_dot_product_attention,
    stock_layer_norm: layer_norm,
    torch.layer_norm: torch_layer_norm,
    stock_rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.softmax: functional_softmax,
    torch.softmax: softmax,
    torch.special.softmax: softmax,
    torch.Tensor.softmax: softmax,
    F.log_softmax: functional_log_softmax,
    torch.log_softmax: log_softmax,
    torch.special.log_softmax: log_softmax,
    torch.Tensor.log_softmax: log_softmax,
    stock_multi_head: multi_head_attention_forward,
}
