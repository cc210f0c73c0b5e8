"""transformers' GPT-2 and BERT with fused parts: embeddings, bias with GELU, and dropout with residual sum and norm.

Each class is a subclass of its namesake, with its parameters and its name (which device maps and FSDP policies go by). What
is fused must be what its type says: a layer that was wrapped, subclassed or has hooks is called instead, as transformers does.
"""

import inspect

import torch
from torch import nn
from transformers import DynamicCache, activations
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert import modeling_bert as bert
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.pytorch_utils import Conv1D

try:
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, capture_outputs
except ImportError:  # transformers 5.0, whose GPT2Model is left alone

    def merge_with_config_defaults(forward):
        return forward

    capture_outputs, _CAN_RECORD_REGISTRY = merge_with_config_defaults, {}

from fastattn import functional
from fastattn.nn import LayerNorm, _add_norm, _has_hooks, _take_over

_NO_DROPOUT = nn.Dropout(0.0)


class NewGELUActivation(activations.NewGELUActivation):
    """gelu(x) by its tanh approximation, as one functional.bias_gelu where transformers takes eight steps."""

    def forward(self, input):
        return functional.bias_gelu(input, approximate="tanh")


# bias_gelu's `approximate` for the modules that compute a GELU.
GELUS = {
    NewGELUActivation: "tanh",
    activations.NewGELUActivation: "tanh",
    activations.GELUActivation: "none",
}


class GPT2MLP(gpt2.GPT2MLP):
    """GPT2MLP whose first bias and GELU are one bias_gelu. Other activations and a wrapped first layer are called."""

    def forward(self, hidden_states):
        return self.dropout(self.before_dropout(hidden_states))

    def before_dropout(self, x):
        if _fusable(self.c_fc, Conv1D, self.act):
            return self.c_proj(
                functional.bias_gelu(x @ self.c_fc.weight, self.c_fc.bias, GELUS[type(self.act)])
            )
        return self.c_proj(self.act(self.c_fc(x)))


class GPT2Block(gpt2.GPT2Block):
    """GPT2Block whose residual sums are one add_layer_norm each with the norm that follows: ln_2, and in a GPT2Model of ours the
    next block's ln_1 or ln_f. Left to transformers: cross-attention.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _take_over(self)

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, encoder_hidden_states=None,
                encoder_attention_mask=None, use_cache=False, **kwargs):  # fmt: skip
        if encoder_hidden_states is not None:
            return super().forward(
                hidden_states, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask, use_cache, **kwargs
            )  # fmt: skip
        state = dict(past_key_values=past_key_values, attention_mask=attention_mask, use_cache=use_cache)
        x, residual, dropout = self.before_sum(self.ln_1(hidden_states), hidden_states, **state, **kwargs)
        return residual + dropout(x)

    def before_sum(self, x, residual, **state):
        """(x, residual, dropout): the block's output is residual + dropout(x); given are ln_1(residual) and residual."""
        attended = self.attn(x, **state)[0]  # after its own dropout
        x, residual = _add_norm(attended, residual, _NO_DROPOUT, self.ln_2, prenorm=True)
        if _plain(self.mlp, GPT2MLP):
            return self.mlp.before_dropout(x), residual, self.mlp.dropout
        return self.mlp(x), residual, _NO_DROPOUT


def _may_be_entered(block):
    """Whether a GPT2Model may run a block's before_sum in place of a call: nobody would miss the call."""
    return (
        _plain(block, GPT2Block)
        and block._compiled_call_impl is None
        and not (block.gradient_checkpointing and block.training)
    )


class GPT2Model(gpt2.GPT2Model):
    """GPT2Model that looks both tables up by one functional.embeddings, with the sum and the dropout, and whose blocks of ours
    end in one add_layer_norm: dropout, residual sum, and the ln_1 of the block that follows, or ln_f.

    Blocks that were replaced, subclassed, hooked, sharded, compiled alone, or recompute themselves are called. Left to
    transformers: inputs_embeds, token_type_ids, cross-attention.
    """

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, token_type_ids=None, position_ids=None,
                inputs_embeds=None, encoder_hidden_states=None, encoder_attention_mask=None, use_cache=None, **kwargs):  # fmt: skip
        ours = dict(
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
        )
        theirs = dict(
            token_type_ids=token_type_ids, inputs_embeds=inputs_embeds, encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )  # fmt: skip
        given = any(argument is not None for argument in theirs.values())
        if given or input_ids is None or self.config.add_cross_attention:
            return super().forward(input_ids, **ours, **theirs, **kwargs)
        return self._decode(input_ids, **ours, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def _decode(self, input_ids, past_key_values=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):  # fmt: skip
        for name in ("output_attentions", "output_hidden_states"):  # capture_outputs has read them
            kwargs.pop(name, None)
        self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        shape = input_ids.shape
        input_ids = input_ids.view(-1, shape[-1])
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(shape[-1], device=input_ids.device) + seen)[None]
        residual = self._embed(input_ids, position_ids)
        if attention_mask is not None and attention_mask.dim() < 4:
            attention_mask = attention_mask.view(input_ids.shape[0], -1)
        attention_mask = create_causal_mask(
            config=self.config, inputs_embeds=residual, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        kwargs.update(use_cache=use_cache, position_ids=position_ids)
        cache = None if self.gradient_checkpointing and self.training else past_key_values

        x = None  # the next norm's output, where it came with the sum before it
        entered = list(map(_may_be_entered, self.h))
        for i, block in enumerate(self.h):
            if not entered[i]:
                residual = block(residual, cache, attention_mask, None, encoder_attention_mask=None, **kwargs)
                continue
            x = block.ln_1(residual) if x is None else x
            y, residual, dropout = block.before_sum(
                x, residual, past_key_values=cache, attention_mask=attention_mask, **kwargs
            )
            if i + 1 == len(self.h):
                x = _add_norm(y, residual, dropout, self.ln_f)
            elif entered[i + 1]:
                x, residual = _add_norm(y, residual, dropout, self.h[i + 1].ln_1, prenorm=True)
            else:
                x, residual = None, residual + dropout(y)
        x = self.ln_f(residual) if x is None else x
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x.view(-1, *shape[1:], x.shape[-1]),
            past_key_values=past_key_values if use_cache else None,
        )

    def _embed(self, input_ids, position_ids):
        words, positions, dropout = self.wte, self.wpe, self.drop
        tables = _table(words) and _table(positions) and words.weight.dtype == positions.weight.dtype
        if tables and words.weight.device == positions.weight.device and _plain(dropout, nn.Dropout):
            return functional.embeddings(
                input_ids, words.weight, positions.weight, position_ids=position_ids,
                padding_idx=words.padding_idx, dropout_p=dropout.p if dropout.training else 0.0,
            )  # fmt: skip
        x = words(input_ids)
        return dropout(x + positions(position_ids).to(x.device))


class BertIntermediate(bert.BertIntermediate):
    """BertIntermediate as a matmul and one bias_gelu. Other activations and a wrapped layer are called."""

    def forward(self, hidden_states):
        act = self.intermediate_act_fn
        if not _fusable(self.dense, nn.Linear, act):
            return act(self.dense(hidden_states))
        x = nn.functional.linear(hidden_states, self.dense.weight)
        return functional.bias_gelu(x, self.dense.bias, GELUS[type(act)])


class _Output:
    """dense, then dropout, residual sum and norm as one add_layer_norm."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _take_over(self)

    def forward(self, hidden_states, input_tensor):
        return _add_norm(self.dense(hidden_states), input_tensor, self.dropout, self.LayerNorm)


class BertSelfOutput(_Output, bert.BertSelfOutput):
    """BertSelfOutput whose dropout, residual sum and norm are one add_layer_norm."""


class BertOutput(_Output, bert.BertOutput):
    """BertOutput whose dropout, residual sum and norm are one add_layer_norm."""


class BertEmbeddings(bert.BertEmbeddings):
    """BertEmbeddings as one functional.embeddings: three look-ups, their sum, norm and dropout.

    Left to transformers: inputs_embeds, and tables that are wrapped, hooked, sparse, or have max_norm or scale_grad_by_freq.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _take_over(self)

    def forward(self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None, past_key_values_length=0):  # fmt: skip
        words, types, positions = self.word_embeddings, self.token_type_embeddings, self.position_embeddings
        norm, dropout = self.LayerNorm, self.dropout
        tables = all(map(_table, (words, types, positions)))
        if input_ids is None or not (tables and _plain(norm, LayerNorm) and _plain(dropout, nn.Dropout)):
            return super().forward(
                input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length
            )
        if position_ids is None:
            end = past_key_values_length + input_ids.shape[1]
            position_ids = self.position_ids[:, past_key_values_length:end]
        return functional.embeddings(
            input_ids, words.weight, positions.weight, type_ids=token_type_ids, type_table=types.weight,
            position_ids=position_ids, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps,
            padding_idx=words.padding_idx, dropout_p=dropout.p if dropout.training else 0.0,
        )  # fmt: skip


def _plain(module, kind):
    """Whether a module may be computed from its parameters, without being called."""
    return (
        type(module) is kind
        and not _has_hooks(module)
        and all(type(p) is nn.Parameter for p in module._parameters.values() if p is not None)
    )


def _table(module):
    """Whether a module is an embedding that its weight alone describes."""
    return (
        _plain(module, nn.Embedding)
        and module.max_norm is None
        and not (module.sparse or module.scale_grad_by_freq)
    )


def _fusable(layer, kind, act):
    return _plain(layer, kind) and type(act) in GELUS and _plain(act, type(act)) and layer.bias is not None


TARGETS = {
    activations.NewGELUActivation: NewGELUActivation,
    gpt2.GPT2MLP: GPT2MLP,
    bert.BertIntermediate: BertIntermediate,
    bert.BertSelfOutput: BertSelfOutput,
    bert.BertOutput: BertOutput,
    bert.BertEmbeddings: BertEmbeddings,
}
# What a GPT2Block and a GPT2Model do between their parts is written out above, as of transformers 5.10: by these names.
_STEPS = {
    GPT2Block: "ln_1 attn hasattr ValueError ln_cross_attn crossattention ln_2 mlp",
    GPT2Model: """pop ValueError warn_if_padding_and_no_attention_mask size view shape DynamicCache config add_cross_attention
        isinstance EncoderDecoderCache wte get_seq_length torch arange device unsqueeze wpe to ndim create_causal_mask
        create_bidirectional_mask drop enumerate h gradient_checkpointing training ln_f
        BaseModelOutputWithPastAndCrossAttentions""",
}
UNKNOWN = {}  # {class of transformers: why it is left}


def same_steps(ours, theirs, names):
    """Whether a forward of transformers takes our arguments and does what it did when ours was written."""
    arguments = [list(inspect.signature(cls.forward).parameters) for cls in (ours, theirs)]
    return arguments[0] == arguments[1] and set(inspect.unwrap(theirs.forward).__code__.co_names) == set(
        names.split()
    )


for _ours, _names in _STEPS.items():
    if same_steps(_ours, _ours.__base__, _names):
        TARGETS[_ours.__base__] = _ours
    else:
        UNKNOWN[_ours.__base__] = "this transformers computes it by other steps than those fused here"
# Functions that compute what these do, for any class of transformers that was copied from them (RobertaOutput, ElectraOutput ...).
COPIED = {
    bert.BertIntermediate: BertIntermediate.forward,
    bert.BertSelfOutput: _Output.forward,
    bert.BertOutput: _Output.forward,
}


def copies(classes):
    """{class: forward} of those whose forward is BERT's, instruction by instruction and name by name."""
    return {
        cls: forward
        for cls in classes
        if cls.__module__.startswith("transformers.") and cls not in TARGETS
        for original, forward in COPIED.items()
        if _code(cls) == _code(original)
    }


def _code(cls):
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code and (code.co_code, code.co_names, code.co_consts, code.co_argcount, code.co_flags & 12)


# transformers finds what a model can return by the name of its class, which only an __init__ would enter.
_CAN_RECORD_REGISTRY.update({str(GPT2Model): GPT2Model._can_record_outputs})
