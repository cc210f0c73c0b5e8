"""Hugging Face transformers >= 5: attn_implementation="fastattn" (importing this module registers it).

Two functions go together: `mask` says which pairs may attend, in the smallest form that says it, and `attention` serves
what `mask` or a caller hands it. A causal pattern, with or without padding, never becomes an (S_q, S_k) tensor: causality
is a flag of the kernels, and padding stays (B, S_k). Every other pattern is transformers' own bool (B, 1, S_q, S_k).

Letters: B batch, H heads, H_kv key heads, S_q queries, S_k keys, D head dim.
"""

import ast
import copy
import functools
import inspect
import sys
import textwrap
import warnings

import torch
import torch.nn.functional as F
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.utils.import_utils import is_tracing

from fastattn import functional
from fastattn.integrations import norms

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # older ones hand output_attentions down to the attention instead
    _active_collector = None

NAME = "fastattn"

# Arguments that models hand down to their attention and that say nothing about which pairs attend, or how.
HARMLESS = frozenset(
    """cache_position deterministic encoder_attention_mask encoder_hidden_states labels logits_to_keep num_items_in_batch
    output_attentions output_hidden_states output_router_logits past_key_value past_key_values position_embeddings
    position_ids return_dict seq_idx token_type_ids use_cache""".split()
)


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, *,
              sliding_window=None, softcap=None, s_aux=None, position_bias=None, indices=None,
              cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None, **kwargs):  # fmt: skip
    """o (B, S_q, H, D_v), and the weights (B, H, S_q, S_k) where the model collects them; query (B, H, S_q, D), key (B, H_kv, S_k, D).

    attention_mask of four dims, bool (True = attend) or float (added), says everything. A padding mask (B, n), of the first n
    keys, is what `mask` makes of a causal pattern, which stays causal whatever the module says. None leaves that to
    is_causal, by default module.is_causal, but for models that only know eager's masks, where None is every pair. Causal
    counts from the first key: that is what transformers means where a static cache is longer than the prompt. A single query
    sees every key. sliding_window w then leaves a query itself and the w - 1 keys before it (and after it, where nothing is
    causal). indices (B, S_q, n) are the only keys that a query may attend to; s_aux are sinks (H,); position_bias is added to
    the scores; cu_seq_lens_q, _k (N + 1,) bound packed sequences, which do not see each other.

    A query that may attend to nothing gives 0 (eager: the mean of the values). Collected weights are eager's, after dropout.
    NotImplementedError names an argument that is not served and would change the result.
    """
    for name, given in kwargs.items():
        if name not in HARMLESS and given is not None and given is not False and _is_read(type(module), name):
            raise NotImplementedError(
                f"fastattn: {type(module).__name__} hands {name}= to its attention, which is not served here and must not be "
                'ignored; model.set_attn_implementation("eager") or "sdpa" goes back'
            )
    S_q, S_k = query.shape[2], key.shape[2]
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    if attention_mask is not None and attention_mask.dim() == 2:
        causal = True
    elif is_causal is None:
        causal = getattr(module, "is_causal", True) and _knows_absent_masks(type(module))
    else:
        causal = is_causal
    causal = bool(causal) and S_q > 1
    window = None if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
    options = dict(scale=scaling, softcap=softcap or 0.0, sinks=s_aux)
    collected = _collects_weights(module, kwargs)

    if packed and attention_mask is None and position_bias is None and indices is None and not collected:
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
        longest = (_longest(cu_seq_lens_q, max_length_q), _longest(cu_seq_lens_k, max_length_k))
        options.update(causal=causal and "bottom_right", window=window, dropout_p=dropout)
        o = functional.attention_varlen(q, k, v, cu_seq_lens_q, cu_seq_lens_k, *longest, **options)
        return o.unflatten(0, (query.shape[0], S_q)), None

    allowed, bias = None, position_bias
    if attention_mask is None or attention_mask.dim() == 2:
        if attention_mask is not None:
            n = attention_mask.shape[1]
            key, value, allowed = key[:, :, :n], value[:, :, :n], attention_mask[:, None, None]
            bias = bias if bias is None else bias[..., :n]
        # Only a window asks where a single query stands: at the end.
        options.update(causal="bottom_right" if S_q == 1 and window else causal, window=window)
    elif attention_mask.dim() != 4:
        raise ValueError(
            f"fastattn: attention_mask is {tuple(attention_mask.shape)}, needs (B, S_k) or (B, H or 1, S_q, S_k)"
        )
    elif attention_mask.dtype == torch.bool:
        allowed = attention_mask
    else:
        bias = attention_mask if bias is None else bias + attention_mask
    if packed:
        same = _sequence_of(query, cu_seq_lens_q)[..., None] == _sequence_of(key, cu_seq_lens_k)[..., None, :]
        allowed = same if allowed is None else allowed & same
    if indices is not None:
        chosen = torch.zeros(query.shape[0], 1, S_q, S_k, dtype=torch.bool, device=query.device)
        chosen = chosen.scatter(-1, indices[:, None].long(), True)[..., : key.shape[2]]
        allowed = chosen if allowed is None else allowed & chosen
    options.update(mask=allowed, bias=bias)
    if not collected:
        o, weights = functional.attention(query, key, value, dropout_p=dropout, **options), None
    else:
        o, weights = functional.attention(query, key, value, return_weights=True, **options)
        if dropout:
            weights = F.dropout(weights, dropout)
            o = weights @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return o.transpose(1, 2).contiguous(), weights


def mask(batch_size, q_length=None, kv_length=None, q_offset=0, kv_offset=0, mask_function=causal_mask_function,
         attention_mask=None, local_size=None, allow_is_causal_skip=True, **kwargs):  # fmt: skip
    """The pattern as `attention` reads it: None, a padding mask (B, n), or bool (B, 1, S_q, S_k); True = attend.

    Arguments are those of transformers' mask functions. None and the padding mask leave causality to the call's flag, and
    are only given where transformers allows it; where it does not, the mask has the shape that its own would have.
    """
    positions = kwargs.pop(
        "cache_position", None
    )  # of transformers 5.0; later ones give a length and an offset
    if positions is not None:
        where, q_length, q_offset = dict(cache_position=positions), len(positions), positions[0]
    else:
        where = dict(q_length=q_length, q_offset=q_offset)
    kwargs.update(batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, local_size=local_size)
    kwargs.update(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip)
    if "config" in kwargs:
        _say_if_unasked(type(kwargs["config"]))
    if "config" in kwargs and not _flags_causality(type(kwargs["config"])):
        return eager_mask(mask_function=mask_function, **where, **kwargs)
    whole = local_size is None and kv_offset == 0 and not torch.compiler.is_exporting()
    if whole and mask_function is causal_mask_function and allow_is_causal_skip and q_length > 1:
        if _is_zero(q_offset) and (attention_mask is None or attention_mask.shape[1] >= q_length):
            # Rows start at the first key, so none looks beyond key q_length - 1.
            padding = attention_mask if attention_mask is None else attention_mask[:, :q_length]
            return None if padding is None or (not is_tracing(padding) and padding.all()) else padding
    if whole and mask_function is bidirectional_mask_function:  # all rows are alike
        where = dict(q_length=1, q_offset=0) if positions is None else dict(cache_position=positions[:1])
        row = sdpa_mask(mask_function=mask_function, **where, **kwargs)
        return row if row is None else row.expand(-1, -1, q_length, -1)
    return sdpa_mask(mask_function=mask_function, **where, **kwargs)


def _classes_beside(config_class):
    """The classes in the modules where models of a config are written."""
    name = config_class.__module__
    modules = {name, name.replace(".configuration_", ".modeling_")} & sys.modules.keys()
    return [c for m in modules for c in list(vars(sys.modules[m]).values()) if isinstance(c, type)]


@functools.cache
def _look_up(config_class):
    classes, package = _classes_beside(config_class), config_class.__module__.rpartition(".")[0]
    return any(
        issubclass(cls, PreTrainedModel)
        and cls.config_class is config_class
        and (cls._supports_sdpa or cls._supports_flash_attn)
        for cls in classes
    ) and not any(_names_sdpa(cls) for cls in classes if cls.__module__.rpartition(".")[0] == package)


def _names_sdpa(cls):
    """Whether a class asks by name if it runs on "sdpa": it then does what only suits the masks of the names it knows."""
    methods = [inspect.unwrap(f) for name, f in vars(cls).items() if callable(f) and name != "__init__"]
    constants = [c for f in methods if hasattr(f, "__code__") for c in f.__code__.co_consts]
    return any("sdpa" in (c if isinstance(c, tuple) else (c,)) for c in constants)


def _pretrained_beside(cls):
    """The model classes in the modules where a class and its bases are written."""
    names = {base.__module__ for base in cls.__mro__} & sys.modules.keys()
    found = [c for name in names for c in list(vars(sys.modules[name]).values()) if isinstance(c, type)]
    return [c for c in found if issubclass(c, PreTrainedModel) and c is not PreTrainedModel]


@functools.cache
def _written_for_sdpa(cls):
    models = _pretrained_beside(cls)
    return not models or any(c._supports_sdpa or c._supports_flash_attn for c in models)


def _knows_absent_masks(cls):
    """Whether an attention was written beside models that run on sdpa or flash attention, which read its is_causal."""
    return _written_for_sdpa(cls)


_knows_absent_masks._dynamo_marked_constant = True  # as below


@functools.cache
def _reads(cls):
    """The arguments that the attention of a transformers class names where it calls, and those that eager's function takes."""
    names = set()
    for base in cls.__mro__:
        eager = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        names |= set(inspect.signature(eager).parameters) if eager else set()
        names |= _handed(base) if eager else set()
    return names or None


def _handed(cls):
    """The keywords of the calls in a class's forward that hand `scaling` to an attention function."""
    try:
        source = textwrap.dedent(inspect.getsource(vars(cls)["forward"]))
    except (KeyError, OSError, TypeError):
        return set()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    keywords = [{k.arg for k in call.keywords if k.arg} for call in calls]
    return set().union(*[names for names in keywords if "scaling" in names])


@functools.cache
def _unserved(cls):
    """What an attention class names in its calls that `attention` would refuse."""
    served = inspect.signature(attention).parameters.keys() | HARMLESS
    return frozenset(_handed(cls) - served) if _asks_the_table(cls) else frozenset()


def _is_read(cls, name):
    """Whether an argument of an attention's call may matter, and does not only come by: models pass on what they are given.

    Not what no call names and eager's function does not take, as sdpa ignores it too; a paged cache comes so, and matters.
    """
    reads = _reads(cls)
    return reads is None or name in reads or name == "cache"


_is_read._dynamo_marked_constant = True  # as below


@functools.cache
def _warn_if_unasked(config_class):
    """Once for a kind of model that makes its masks by the table, as set here, and its attention without it."""
    classes = _classes_beside(config_class)
    attentions = [c for c in classes if "Attention" in c.__name__ and issubclass(c, torch.nn.Module)]
    if attentions and not any(map(_asks_the_table, attentions)):
        warnings.warn(
            f'fastattn: a model of {config_class.__name__} is set to "fastattn", but its attention does not look that up and stays its own',
            stacklevel=2,
        )


def _say_if_unasked(config_class):
    _warn_if_unasked(config_class)


_say_if_unasked._dynamo_marked_constant = True  # as below


def _flags_causality(config_class):
    """Whether the models of a config were written for masks that may be absent, as they are for sdpa and flash attention.

    Others have only ever run with eager's. They may lack the flag that says what an absent mask means, or change the mask; so
    may those that ask for sdpa by its name.
    """
    return _look_up(config_class)


_flags_causality._dynamo_marked_constant = True  # see backend.py; Dynamo looks through a cache


def _is_zero(offset):
    return (
        bool(offset == 0)
        if not isinstance(offset, torch.Tensor)
        else not is_tracing(offset) and bool(offset == 0)
    )


def _collects_weights(module, kwargs):
    """Whether the model returns the weights of this call: its outputs are collected by hooks, which the call does not see."""
    if kwargs.get("output_attentions"):
        return True
    if _active_collector is None or (torch.compiler.is_compiling() and not _active_collector.compiling):
        return False
    return any("attentions" in kind for kind in _active_collector.get() or ())


def _longest(cu_seq_lens, given):
    return int(cu_seq_lens.diff().max() if given is None else given)


def _sequence_of(t, cu_seq_lens):
    """(B, 1, S): the number of the packed sequence that each row of t (B, H, S, D) belongs to."""
    rows = torch.arange(t.shape[0] * t.shape[2], device=t.device)
    return torch.bucketize(rows, cu_seq_lens[1:].to(rows.dtype), right=True).view(t.shape[0], 1, t.shape[2])


def targets(model):
    """{class of transformers: our subclass of it, or a forward for one}, for patch."""
    kinds = {kind for kind in map(type, model.modules()) if kind.__module__.startswith(norms.PACKAGES)}
    if not kinds:
        return {}
    from fastattn.integrations import gpt2_bert  # which imports both models

    formulas = {cls: norms.formula(cls) for cls in kinds}
    found = {cls: forward for cls, forward in formulas.items() if forward is not None}
    return found | gpt2_bert.copies(kinds) | gpt2_bert.TARGETS


def attach(model, report):
    """Switch every transformers model inside `model` to "fastattn"; each gets its own copy of its config.

    The implementation is an entry of the config, and a config may be shared with a model that nobody asked to change.
    """
    unknown = sys.modules.get("fastattn.integrations.gpt2_bert")
    for name, module in model.named_modules() if unknown else ():
        if type(module) in unknown.UNKNOWN:
            report.skipped.append((name, type(module), unknown.UNKNOWN[type(module)]))
    switched = []
    for name, inner in model.named_modules():
        if not isinstance(inner, PreTrainedModel) or any(f"{name}.".startswith(outer) for outer in switched):
            continue
        before = inner.config._attn_implementation
        if not _asks(inner):
            reason = "its attention does not go through transformers' AttentionInterface, so that it cannot be switched"
            report.skipped.append((name, type(inner), reason))
            continue
        unserved = {(type(m), *sorted(_unserved(type(m)))) for m in inner.modules() if _unserved(type(m))}
        if unserved:
            report.skipped += [
                (name, cls, f"its attention hands on {', '.join(names)}, which is not served here")
                for cls, *names in unserved
            ]
            continue
        if before == NAME:
            continue
        switched.append(f"{name}." if name else "")
        copies = {}
        for below, module in inner.named_modules(prefix=name):
            for attribute, value in list(vars(module).items()):
                if isinstance(value, PreTrainedConfig):
                    report.edit(below, module, attribute, copy.deepcopy(value, copies))
        inner.set_attn_implementation(NAME)
        for module in inner.modules():
            # T5's stacks have copies of its config, which transformers 5.17 does not look for.
            if isinstance(module, PreTrainedModel) and type(module.config) is type(inner.config):
                if module.config._attn_implementation == before != inner.config._attn_implementation:
                    module.config._attn_implementation = inner.config._attn_implementation
        report.attention.append((name, before, inner.config._attn_implementation))


def uses_fastattn(model):
    """Whether the attention of a transformers model, or of one inside this model, is computed here.

    It must be set to "fastattn" and must look up what it is set to. Some models (DeBERTa, Bloom, MPNet) take the name in
    from_pretrained and stay what they were; transformers says nothing.
    """
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    return any(m.config._attn_implementation == NAME and _asks(m) for m in models)


def _asks(model):
    return model._can_set_attn_implementation() and any(_asks_the_table(type(m)) for m in model.modules())


def _asks_the_table(cls):
    """Whether a class was written where transformers' attention implementations are looked up; some versions only guess."""
    return hasattr(sys.modules.get(cls.__module__), "ALL_ATTENTION_FUNCTIONS")


def patch_at_load():
    """From now on from_pretrained and from_config build BERT and GPT-2 of our classes, in this process, until unpatch_at_load.

    A transformers model that is made without these (BertModel(config)) is as ever. GPT2Model and GPT2Block are left
    out: transformers would from then on collect the hidden states of no other GPT-2. The attention implementation is set as always.
    """
    from transformers.monkey_patching import register_patch_mapping

    register_patch_mapping(_load_mapping(), overwrite=True)


def unpatch_at_load():
    """Undo patch_at_load; models that were loaded meanwhile keep their classes."""
    from transformers.monkey_patching import unregister_patch_mapping

    unregister_patch_mapping(list(_load_mapping()))


def _load_mapping():
    from fastattn.integrations import gpt2_bert

    # Activations are held in a table of classes, which such a mapping does not reach.
    classes = [cls for cls in gpt2_bert.TARGETS if cls.__module__.startswith("transformers.models.")]
    # Patterns, since a name would be searched for in every longer one: MobileBertOutput holds BertOutput.
    return {
        f"^{cls.__name__}$": gpt2_bert.TARGETS[cls]
        for cls in classes
        if cls.__name__ not in ("GPT2Block", "GPT2Model")
    }


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
