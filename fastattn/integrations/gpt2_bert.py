"""transformers' GPT-2 and BERT with fused parts: embeddings, bias with GELU, and dropout with residual sum and norm.

Each class is a subclass of its namesake, with its parameters and its name (which device maps and FSDP policies go by). What
is fused must be what its type says: a layer that was wrapped, subclassed or has hooks is called instead, as transformers does.

Not fused: GPT-2's position embeddings and the sum at the end of a block, which are lines of GPT2Model's and GPT2Block's own.
"""

import inspect

from torch import nn
from transformers import activations
from transformers.models.bert import modeling_bert as bert
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.pytorch_utils import Conv1D

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


class GPT2Block(gpt2.GPT2Block):
    """GPT2Block whose first residual sum and ln_2 are one add_layer_norm. Left to transformers: cross-attention."""

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
        attended = self.attn(self.ln_1(hidden_states), **state, **kwargs)[0]  # after its own dropout
        x, residual = _add_norm(attended, hidden_states, _NO_DROPOUT, self.ln_2, prenorm=True)
        return residual + self.mlp(x)


class GPT2MLP(gpt2.GPT2MLP):
    """GPT2MLP whose first bias and GELU are one bias_gelu. Left to transformers: other activations, a wrapped first layer."""

    def forward(self, hidden_states):
        if not _fusable(self.c_fc, Conv1D, self.act):
            return super().forward(hidden_states)
        x = functional.bias_gelu(hidden_states @ self.c_fc.weight, self.c_fc.bias, GELUS[type(self.act)])
        return self.dropout(self.c_proj(x))


class BertIntermediate(bert.BertIntermediate):
    """BertIntermediate as a matmul and one bias_gelu. Left to transformers: other activations, a wrapped layer."""

    def forward(self, hidden_states):
        act = self.intermediate_act_fn
        if not _fusable(self.dense, nn.Linear, act):
            return super().forward(hidden_states)
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
        tables = all(
            _plain(t, nn.Embedding) and t.max_norm is None and not (t.sparse or t.scale_grad_by_freq)
            for t in (words, types, positions)
        )
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
        and "forward" not in module.__dict__  # accelerate's hooks, Liger's patches, hub kernels
        and all(type(p) is nn.Parameter for p in module._parameters.values() if p is not None)
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
# transformers 5.0 still gave a block other arguments.
if inspect.signature(gpt2.GPT2Block.forward).parameters.keys() == inspect.signature(GPT2Block.forward).parameters.keys():  # fmt: skip
    TARGETS[gpt2.GPT2Block] = GPT2Block
