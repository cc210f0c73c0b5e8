"""Ways into code that calls functions: `accelerated` and `enable` bring torch's calls of attention, norms and softmax to ours.

Two mechanisms, because each reaches what the other cannot. `accelerated` is a torch function mode: it lasts for a block, in
one thread and the backward passes started there, and sees every call however its name was bound; each torch call in the
block, of any kind, takes about a microsecond longer. `enable` puts our functions where torch keeps its own: for every thread, at no
cost to other calls, until `disable`; a name that a module had imported before (`from torch.nn.functional import softmax`)
keeps torch's function. docs/swap.md lists what neither reaches.
"""

import contextlib
import inspect
import sys
import threading
import types
import warnings

import torch
import torch.nn.functional as F
from torch._jit_internal import boolean_dispatched
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from fastattn import backend, functional
from fastattn.ops.attention import is_causal_bias

stock_attention, stock_multi_head = F.scaled_dot_product_attention, F.multi_head_attention_forward
stock_layer_norm, stock_rms_norm = F.layer_norm, F.rms_norm
stock_functional_softmax, stock_functional_log_softmax = F.softmax, F.log_softmax


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
            # TorchScript, which cannot compile ours, takes torch's: as a choice between that and the same
            choice = dict(if_true=found, if_false=found, index=sys.maxsize, default=True, arg_name="")
            boolean_dispatched.setdefault(OURS[found], choice)
        _fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)


def disable():
    """Undo enable(): torch's functions are back in their places. Does nothing where it was not on."""
    with _lock:
        if not _replaced:
            return
        for row in _replaced:
            if not _put_back(*row) and not _lent:
                owner, name = row[:2]
                warnings.warn(
                    f"disable: {owner.__name__}.{name} was replaced again; it is left", stacklevel=2
                )
        _replaced.clear()
        torch.backends.mha.set_fastpath_enabled(_fastpath)


def _put_back(owner, name, found, own):
    if getattr(owner, name) is not OURS[found]:
        return False
    if own:
        setattr(owner, name, found)
    else:
        delattr(owner, name)
    return True


def _stock(function, *args, **kwargs):
    """A call that is torch's own business. A tensor subclass may compare the function that it is told of with what torch's places
    hold, so they hold torch's until it returns; calls of other threads run on torch meanwhile.
    """
    global _lent
    if not _replaced or torch.compiler.is_compiling():
        return function(*args, **kwargs)
    with _lock:
        _lent += 1
        if _lent == 1:
            for row in _replaced:
                _put_back(*row)
    try:
        return function(*args, **kwargs)
    finally:
        with _lock:
            _lent -= 1
            if not _lent:
                for owner, name, found, _ in _replaced:
                    if getattr(owner, name) == found:
                        setattr(owner, name, OURS[found])


_lock = threading.Lock()
_lent = 0  # calls of _stock that have not returned
_replaced = []  # (owner, name, what was there, whether it was the owner's own and not inherited)
_fastpath = True


# torch's functions with torch's arguments. What a tensor subclass does with them is its own business.


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                 enable_gqa=False):  # fmt: skip
    options = dict(scale=scale, enable_gqa=enable_gqa)
    args = (query, key, value, attn_mask, dropout_p, is_causal)
    tensors = (query, key, value) if is_causal_bias(attn_mask) else args[:4]
    if _place_is_taken() or _foreign("attention", *tensors):
        return _stock(stock_attention, *args, **options)
    return functional.scaled_dot_product_attention(*args, **options)


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    if _foreign("layer_norm", input, weight, bias):
        return _stock(stock_layer_norm, input, normalized_shape, weight, bias, eps)
    return functional.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(input, normalized_shape, weight=None, eps=None):
    if _foreign("rms_norm", input, weight):
        return _stock(stock_rms_norm, input, normalized_shape, weight, eps)
    return functional.rms_norm(input, normalized_shape, weight, eps)


def torch_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return layer_norm(input, normalized_shape, weight, bias, eps)


def _for_softmax(op, stock):
    """What takes the place of `stock`, a builtin of torch's that computes `op`."""

    def function(*args, **kwargs):
        if kwargs.keys() <= {"dim", "dtype"} and 1 <= len(args) <= 3:
            options = dict(zip(("dim", "dtype"), args[1:], strict=False))
            if len(options) + len(kwargs) == len(options | kwargs):
                options |= kwargs
                if type(options.get("dim")) is int and not _foreign(op, args[0]):
                    return getattr(functional, op)(args[0], options["dim"], options.get("dtype"))
        return _stock(stock, *args, **kwargs)  # out=, named dims, numpy's names of arguments, errors

    function.__name__ = function.__qualname__ = op
    return function


torch_softmax = _for_softmax("softmax", torch.softmax)
torch_log_softmax = _for_softmax("log_softmax", torch.log_softmax)


def functional_softmax(input, dim=None, _stacklevel=3, dtype=None):
    if _foreign("softmax", input):
        return _stock(stock_functional_softmax, input, dim, _stacklevel, dtype)
    if dim is None:  # torch warns, and guesses
        dim = F._get_softmax_dim("softmax", input.dim(), _stacklevel)
    return torch_softmax(input, dim, dtype)


def functional_log_softmax(input, dim=None, _stacklevel=3, dtype=None):
    if _foreign("log_softmax", input):
        return _stock(stock_functional_log_softmax, input, dim, _stacklevel, dtype)
    if dim is None:
        dim = F._get_softmax_dim("log_softmax", input.dim(), _stacklevel)
    return torch_log_softmax(input, dim, dtype)


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
    if _place_is_taken() or any(map(_overrides, (query, key, value, *args, *kwargs.values()))):
        return _stock(stock_multi_head, query, key, value, *args, **kwargs)
    return _multi_head_in_ours(query, key, value, *args, **kwargs)


def _place_is_taken():
    """Whether attention is now another library's: torch's context_parallel puts its own there, which must get every call."""
    return F.scaled_dot_product_attention not in (stock_attention, scaled_dot_product_attention)


def _foreign(op, *tensors):
    """Whether the arguments are torch's own business; counted, unless they are an error of the caller's. The first is needed."""
    for i, t in enumerate(tensors):
        if t is None and i:
            continue
        if not isinstance(t, torch.Tensor):
            return True
        if _overrides(t):
            with torch._C.DisableTorchFunctionSubclass():  # it is not told of our look at its device
                backend.leave_to_torch(op, f"a {type(t).__name__} has torch functions of its own", t)
            return True
        if t.is_nested:
            backend.leave_to_torch(op, "nested tensors take torch's own kernels", t)
            return True
    return False


def _overrides(t):
    """Whether t is a tensor of a class with torch functions of its own."""
    return (
        isinstance(t, torch.Tensor)
        and type(t) not in (torch.Tensor, torch.nn.Parameter)
        and type(t).__torch_function__ is not torch._C._disabled_torch_function_impl
    )


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
    torch.softmax: torch_softmax,
    torch.special.softmax: _for_softmax("softmax", torch.special.softmax),
    torch.Tensor.softmax: _for_softmax("softmax", torch.Tensor.softmax),
    F.log_softmax: functional_log_softmax,
    torch.log_softmax: torch_log_softmax,
    torch.special.log_softmax: _for_softmax("log_softmax", torch.special.log_softmax),
    torch.Tensor.log_softmax: _for_softmax("log_softmax", torch.Tensor.log_softmax),
    stock_multi_head: multi_head_attention_forward,
}
for stock, ours in OURS.items():
    if isinstance(stock, types.FunctionType):
        ours.__signature__ = inspect.signature(stock)
