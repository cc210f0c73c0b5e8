"""GPT: embeddings, blocks of attention and MLP around a residual stream, a final norm, a tied head.

GPT-2 and GPT-3 are pre-norm. Every sum of their residual stream and the norm behind it are one op, so a block takes (what is
still to be added, the stream) and hands on the same pair. GPT-1 is post-norm. Parameters are named as in the published
GPT-2 checkpoints, weights lie as nn.Linear has them (out, in); the head is wte's weight and has no entry of its own.

Letters: B batch, T new positions, S cached positions, C width, H heads, D = C / H, V vocabulary.
"""

import dataclasses
import math
import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, linear, mse_loss
from torch.utils.checkpoint import checkpoint

from fastattn import functional as F
from fastattn.models import generation, training
from fastattn.models.checkpoint import CheckpointError, label_fields, load_into, read, write
from fastattn.nn import LayerNorm

SIZES = {
    "tiny": dict(n_layer=2, n_head=2, n_embd=64, n_positions=128, vocab_size=256),
    "gpt1": dict(n_layer=12, n_head=12, n_embd=768, n_positions=512, vocab_size=40478, post_norm=True),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124 M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355 M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774 M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558 M
}

# arXiv 2005.14165, table 2.1. Where its heads times their width are not the model's width, the width is kept; how far its
# banded layers look is not published, and 256 is GPT-Neo's choice.
SIZES |= {
    f"gpt3-{name}": dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=2048, local_window=256)
    for name, n_layer, n_head, n_embd in (
        ("125m", 12, 12, 768), ("350m", 24, 16, 1024), ("760m", 24, 16, 1536), ("1.3b", 24, 16, 2048),
        ("2.7b", 32, 32, 2560), ("6.7b", 32, 32, 4096), ("13b", 40, 40, 5120), ("175b", 96, 96, 12288),
    )
}  # fmt: skip


@dataclasses.dataclass
class GPTConfig:
    vocab_size: int = 50257
    n_positions: int = 1024  # the longest sequence
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None  # width of the MLP, 4 * n_embd by default
    dropout: float = 0.0  # of the embeddings, the attention and what joins the residual stream
    layer_norm_epsilon: float = 1e-5
    gelu: str = "tanh"  # or "none", exact: what torch's gelu calls approximate
    positions: str = "learned"  # or "sinusoidal", with embeddings scaled by sqrt(n_embd)
    post_norm: bool = False  # GPT-1: norms behind the sums, none at the end
    local_window: int | None = None  # every second layer sees this many keys, its own among them (GPT-3)
    scale_attn_weights: bool = True  # by 1 / sqrt(D)
    scale_attn_by_inverse_layer_idx: bool = False  # and by 1 / (layer + 1)
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    num_labels: int = 2  # a classifier's outputs
    id2label: dict[int, str] | None = None  # what they mean; not kept where num_labels is another count

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"GPTConfig: n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        for name, allowed in (("gelu", ("tanh", "none")), ("positions", ("learned", "sinusoidal"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)!r}, needs one of {allowed}")
        if self.local_window is not None and self.local_window < 1:
            raise ValueError(f"GPTConfig: local_window is {self.local_window}, needs at least 1 key")
        if self.id2label is None or len(self.id2label) != self.num_labels:
            self.id2label = {i: f"LABEL_{i}" for i in range(self.num_labels)}

    def window(self, layer):
        """attention's window of a layer."""
        banded = self.local_window is not None and layer % 2 == 1
        return (self.local_window - 1, None) if banded else None

    def scale(self, layer):
        scale = (self.n_embd // self.n_head) ** -0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


class Keys(NamedTuple):
    """Which keys a query may see besides those after it: none of these, or one."""

    mask: torch.Tensor | None = None  # (B, 1, 1, T) bool: no padding
    cu_seqlens: torch.Tensor | None = None  # (n + 1,): its own document's
    longest: int = 0
    cache: generation.KVCache | None = None  # those of before


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.options = dict(window=config.window(layer), scale=config.scale(layer))
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x_BTC, keys):
        B, T, C = x_BTC.shape
        qkv_BT3HD = self.c_attn(x_BTC).view(B, T, 3, self.n_head, C // self.n_head)
        p = self.dropout if self.training else 0.0
        if keys.cu_seqlens is not None:
            q_NHD, k_NHD, v_NHD = qkv_BT3HD.flatten(0, 1).unbind(1)
            bounds = (keys.cu_seqlens, keys.cu_seqlens, keys.longest, keys.longest)
            o_NHD = F.attention_varlen(q_NHD, k_NHD, v_NHD, *bounds, causal=True, dropout_p=p, **self.options)
            return self.c_proj(o_NHD.reshape(B, T, C))
        q_BHTD, k_BHTD, v_BHTD = (t.transpose(1, 2) for t in qkv_BT3HD.unbind(2))
        if keys.cache is None:
            o_BHTD = F.attention(
                q_BHTD, k_BHTD, v_BHTD, mask=keys.mask, causal=True, dropout_p=p, **self.options
            )
        else:
            o_BHTD = keys.cache.attend(self.layer, q_BHTD, k_BHTD, v_BHTD, **self.options)
        return self.c_proj(o_BHTD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.approximate = config.gelu
        self.c_fc = nn.Linear(config.n_embd, width)
        self.c_proj = nn.Linear(width, config.n_embd)

    def forward(self, x_BTC):
        return self.c_proj(F.bias_gelu(linear(x_BTC, self.c_fc.weight), self.c_fc.bias, self.approximate))


class AddNorm(LayerNorm):
    """(branch, stream) -> (norm(sum), sum) with sum = stream + dropout(branch)."""

    def __init__(self, config):
        super().__init__(config.n_embd, eps=config.layer_norm_epsilon)
        self.dropout = config.dropout

    def forward(self, branch_BTC, x_BTC):
        if branch_BTC is None:  # the first norm, with nothing to add yet
            return super().forward(x_BTC), x_BTC
        p = self.dropout if self.training else 0.0
        affine = (self.normalized_shape, self.weight, self.bias, self.eps)
        return F.add_layer_norm(branch_BTC, x_BTC, *affine, dropout_p=p, prenorm=True)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = AddNorm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = AddNorm(config)
        self.mlp = MLP(config)

    def forward(self, branch_BTC, x_BTC, keys):
        h_BTC, x_BTC = self.ln_1(branch_BTC, x_BTC)
        h_BTC, x_BTC = self.ln_2(self.attn(h_BTC, keys), x_BTC)
        return self.mlp(h_BTC), x_BTC


class PostNormBlock(Block):
    def forward(self, branch_BTC, x_BTC, keys):
        x_BTC, _ = self.ln_1(self.attn(x_BTC, keys), x_BTC)
        x_BTC, _ = self.ln_2(self.mlp(x_BTC), x_BTC)
        return None, x_BTC


class GPT(nn.Module):
    """model = GPT(GPTConfig(**SIZES["gpt2"])); logits, loss = model(ids, targets); ids = model.generate(ids, 50).

    `checkpointing = True` recomputes each block in backward instead of keeping what it computed.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        block = PostNormBlock if config.post_norm else Block
        self.h = nn.ModuleList(block(config, layer) for layer in range(config.n_layer))
        if not config.post_norm:
            self.ln_f = AddNorm(config)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """N(0, 0.02), GPT-2's way: what writes into the residual stream is scaled down for its 2 * n_layer writers."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):  # apply() has been to its children already
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, input_ids, targets=None, **where):
        """input_ids (B, T) -> logits (B, T, V) and None; with targets (B, T): None and the mean cross-entropy, fp32.

        targets[:, t] is the token that follows input_ids[:, t]; -100 does not count. With targets the logits are never
        stored. `where` is what hidden() takes: attention_mask, position_ids, or cu_seqlens of packed documents.
        """
        h_BTC = self.hidden(input_ids, **where)
        if targets is None:
            return self.head(h_BTC), None
        return None, F.linear_cross_entropy(h_BTC, self.wte.weight, targets)

    def head(self, h_BTC):
        return linear(h_BTC, self.wte.weight)

    def hidden(
        self, input_ids, cache=None, *, attention_mask=None, position_ids=None, cu_seqlens=None, longest=None
    ):
        """What the head reads, (B, T, C).

        attention_mask (B, T): 0 or False is padding, on either side, which no token sees and positions do not count; what
        the padding itself gets means nothing. cu_seqlens (n + 1,) int32: the (B, T) tokens, row after row, are documents
        cu_seqlens[i] : cu_seqlens[i + 1] that do not see each other and whose positions start at 0, the longest of them
        having `longest` tokens (looked up where absent, which on a GPU waits for it). With a cache the ids follow what it
        holds, and their keys and values join it. position_ids (B, T) replace the positions that follow from all this.
        """
        B, T = input_ids.shape
        given = [t is not None for t in (attention_mask, cu_seqlens, cache)]
        if sum(given) > 1:
            raise ValueError("GPT: attention_mask, cu_seqlens and cache exclude each other; give one")
        if T > self.config.n_positions and cu_seqlens is None:
            raise ValueError(
                f"GPT: {T} tokens, but n_positions is {self.config.n_positions}; shorten the input"
            )
        keys = Keys()
        if cache is not None:
            cache.make_room(T)
            positions = cache.lens[:, None] + torch.arange(T, device=input_ids.device)
            keys = Keys(cache=cache)
        elif cu_seqlens is not None:
            longest = int(cu_seqlens.diff().max()) if longest is None else longest
            if longest > self.config.n_positions:
                raise ValueError(
                    f"GPT: a document of {longest} tokens, but n_positions is {self.config.n_positions}; cut it"
                )
            keys = Keys(cu_seqlens=cu_seqlens, longest=longest)
            positions = document_positions(cu_seqlens, B * T).view(B, T)
        elif attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"GPT: attention_mask is {tuple(attention_mask.shape)}, needs input_ids' {tuple(input_ids.shape)}"
                )
            mask_BT = attention_mask != 0
            keys = Keys(mask=mask_BT[:, None, None])
            positions = (mask_BT.cumsum(1) - 1).clamp(min=0)
        else:
            positions = None  # 0 .. T-1
        branch_BTC, x_BTC = None, self._embed(input_ids, positions if position_ids is None else position_ids)
        for block in self.h:
            if self.checkpointing and torch.is_grad_enabled():
                branch_BTC, x_BTC = checkpoint(block, branch_BTC, x_BTC, keys, use_reentrant=False)
            else:
                branch_BTC, x_BTC = block(branch_BTC, x_BTC, keys)
        if cache is not None:
            cache.advance(T)
        return x_BTC if self.config.post_norm else self.ln_f(branch_BTC, x_BTC)[0]

    def _embed(self, input_ids, positions):
        p = self.config.dropout if self.training else 0.0
        if self.config.positions == "learned":
            tables = (self.wte.weight, self.wpe.weight)
            return F.embeddings(input_ids, *tables, position_ids=positions, dropout_p=p)
        x_BTC, scale = F.embeddings(input_ids, self.wte.weight), math.sqrt(self.config.n_embd)
        return F.add_positional_encoding(x_BTC, position_ids=positions, scale=scale, dropout_p=p)

    def generate(self, input_ids, max_new_tokens, **options):
        """input_ids and up to max_new_tokens more, (B, T + new): see generation.generate."""
        return generation.generate(self, input_ids, max_new_tokens, **options)

    def stream(self, input_ids, max_new_tokens, **options):
        """The new tokens one after another, (B,) each: see generation.stream."""
        return generation.stream(self, input_ids, max_new_tokens, **options)

    def new_cache(self, batch=1, length=None):
        """A KVCache for generate(..., cache=): see generation.new_cache."""
        return generation.new_cache(self, batch, length)

    def configure_optimizers(self, lr, **options):
        """AdamW with decay groups: see training.configure_optimizer."""
        return training.configure_optimizer(self, lr, **options)

    def flops_per_token(self, T=None):
        """Floating-point operations of training on one token of a sequence of T (n_positions by default), causally counted.

        6 for each weight of a product, the head's among them and the embeddings not; 12 C for each key a query sees.
        """
        config, T = self.config, T or self.config.n_positions
        weights = sum(m.weight.numel() for m in self.h.modules() if isinstance(m, nn.Linear))
        seen = 0.0
        for layer in range(config.n_layer):
            window = config.window(layer)
            w = T if window is None else min(T, window[0] + 1)
            seen += w - w * (w - 1) / (2 * T)  # the mean of min(t + 1, w) over t
        return 6 * (weights + self.wte.weight.numel()) + 12 * config.n_embd * seen

    def mfu(self, tokens_per_second, T=None, devices=1):
        """Share of the peak of `devices` GPUs like this model's; None, to be printed as n/a, for one whose peak is not known."""
        return training.mfu(self.flops_per_token(T), tokens_per_second, self.wte.weight.device, devices)

    @classmethod
    def from_pretrained(cls, source, *, device=None, dtype=torch.float32, **overrides):
        """The model of a checkpoint folder (config.json, safetensors) or of a transformers model, in evaluation mode.

        overrides: fields of GPTConfig, e.g. dropout=0.0 or num_labels=3.
        GPT-2's parameter names, with or without "transformer.", and GPT-1's are known. A classifier's head that the checkpoint
        lacks starts anew, with a warning. Anything else that does not fit raises CheckpointError, as does a file that
        cannot be read.
        """
        if isinstance(source, nn.Module):
            config, state = source.config.to_dict(), source.state_dict()
        else:
            config, state = read(source)
        config = config_from(config, **overrides)
        with torch.device("meta"):
            model = cls(config).to(dtype)
        model.to_empty(device=device or torch.get_default_device())
        lacking = load_into(
            model, state, rename=_our_name, transpose=CONV1D, drop=(*NOT_PARAMETERS, *cls._dropped), optional=("score.",)
        )  # fmt: skip
        if lacking:
            model._init_weights(model.score)
            warnings.warn(
                f"{cls.__name__}: the checkpoint lacks {', '.join(lacking)}, which starts anew and needs training",
                stacklevel=2,
            )
        return model.eval()

    def save_pretrained(self, directory):
        """A folder that from_pretrained reads, and transformers too where it has such a model."""
        config = config_for_transformers(self)
        prefix = "transformer." if config["model_type"] in HEADS else ""
        renamed = GPT1_NAMES if config["model_type"] == "openai-gpt" else {}
        state = {}
        for name, t in self.state_dict().items():
            first, _, rest = name.partition(".")
            stored = f"{renamed.get(first, first)}.{rest}"
            own_head = first == "score"
            state[stored if own_head else prefix + stored] = t.t() if name.endswith(CONV1D) else t
        write(directory, config, state)

    _dropped = ("score.weight",)


class GPTForSequenceClassification(GPT):
    """GPT with a linear layer, without bias, on the last token that is not padding; num_labels outputs."""

    _dropped = ()

    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self._init_weights(self.score)

    def forward(self, input_ids, labels=None, *, attention_mask=None, **where):
        """input_ids (B, T) -> logits (B, L), and the loss of labels, else None.

        labels: integers (B,), a cross-entropy; (B, L) floats, a binary one each; with one output, its square error. What is
        padding attention_mask says, or where it is absent config.pad_token_id.
        """
        if attention_mask is None and self.config.pad_token_id is not None:
            attention_mask = input_ids != self.config.pad_token_id
        h_BTC = self.hidden(input_ids, attention_mask=attention_mask, **where)
        B, T = input_ids.shape
        at = torch.arange(T, device=input_ids.device)
        last_B = at[-1].expand(B) if attention_mask is None else (at * (attention_mask != 0)).argmax(1)
        rows = torch.arange(B, device=input_ids.device)
        logits_BL = self.score(h_BTC[rows, last_B])
        if labels is None:
            return logits_BL, None
        scores = logits_BL.float()
        if scores.shape[1] == 1:
            return logits_BL, mse_loss(scores[:, 0], labels.float().view(B))
        if labels.is_floating_point():
            return logits_BL, binary_cross_entropy_with_logits(scores, labels.float())
        return logits_BL, cross_entropy(scores, labels)


def document_bounds(input_ids, eos_token_id):
    """cu_seqlens of tokens (B, T): a document ends behind each eos_token_id and at the end of each row."""
    ends = input_ids == eos_token_id
    ends[:, -1] = True
    after = ends.flatten().nonzero()[:, 0] + 1
    return torch.cat([after.new_zeros(1), after]).to(torch.int32)


def document_positions(cu_seqlens, n):
    """Each of n packed tokens' place in its document."""
    at = torch.arange(n, device=cu_seqlens.device)
    begins = cu_seqlens[torch.searchsorted(cu_seqlens, at, right=True, out_int32=True) - 1]
    return torch.where(at < cu_seqlens[-1], at - begins, 0)  # behind the last document there may be padding


# What transformers calls things.
HEADS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "openai-gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTForSequenceClassification"),
}
GPT1_NAMES = {"wte": "tokens_embed", "wpe": "positions_embed"}
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out)
# the head is wte's weight; old files have causal masks and position numbers
NOT_PARAMETERS = ("lm_head.weight", ".attn.bias", ".attn.masked_bias", "position_ids")
OURS = "fastattn-gpt"  # the model_type of what transformers has no model for
SAME_NAME = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "layer_norm_epsilon", "eos_token_id",
             "pad_token_id")  # fmt: skip
GPT2_ALONE = ("n_inner", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def _our_name(stored):
    name = stored.removeprefix("transformer.")
    first, _, rest = name.partition(".")
    return {theirs: ours for ours, theirs in GPT1_NAMES.items()}.get(first, first) + "." + rest


def config_from(stored, **overrides):
    """The GPTConfig of a config.json; CheckpointError where it asks for what this model does not do."""
    kind = stored.get("model_type")
    names = {field.name for field in dataclasses.fields(GPTConfig)}
    if kind == OURS:
        found = {name: value for name, value in stored.items() if name in names}
    elif kind in HEADS:
        found = {name: stored[name] for name in (*SAME_NAME, *GPT2_ALONE) if name in stored}
        found |= _gpt1(stored) if kind == "openai-gpt" else _gpt2(stored)
        rates = {name: stored.get(name, 0.1) for name in DROPOUTS}
        if "dropout" not in overrides and len(set(rates.values())) > 1:
            raise CheckpointError(f"the checkpoint has {rates}, which are one here: pass dropout=")
        found["dropout"] = rates["resid_pdrop"]
        for name in (
            "eos_token_id",
            "pad_token_id",
        ):  # GPT-2's own stays behind where a vocabulary was replaced
            if found.get(name) is not None and found[name] >= found.get("vocab_size", GPTConfig.vocab_size):
                found[name] = None
    else:
        raise CheckpointError(f"model_type is {kind!r}, needs one of {', '.join((*HEADS, OURS))}")
    try:
        return GPTConfig(**found | label_fields(stored) | overrides)
    except (AttributeError, TypeError, ValueError) as e:
        raise CheckpointError(f"config.json: {e}") from e


def _gpt1(stored):
    if stored.get("afn", "gelu") != "gelu":
        raise CheckpointError(f"afn is {stored['afn']!r}; this model has GELU only")
    return {"post_norm": True, "gelu": "tanh"}


def _gpt2(stored):
    function = stored.get("activation_function", "gelu_new")
    if function not in GELU:
        raise CheckpointError(f"activation_function is {function!r}, needs one of {', '.join(GELU)}")
    for name, wanted in (("add_cross_attention", False), ("tie_word_embeddings", True)):
        if stored.get(name, wanted) is not wanted:
            raise CheckpointError(f"{name} is {stored[name]}, which this model does not do")
    return {"gelu": GELU[function]}


def config_for_transformers(model):
    """What config.json says of a model; of one that transformers has not, our own fields under a name it does not know."""
    config = model.config
    plain = config.positions == "learned" and config.local_window is None
    gpt1 = (
        plain and config.post_norm and config.n_inner in (None, 4 * config.n_embd) and config.gelu == "tanh"
    )
    gpt1 = gpt1 and config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
    if not plain or (config.post_norm and not gpt1):
        return {"model_type": OURS, "architectures": [type(model).__name__]} | dataclasses.asdict(config)
    kind = "openai-gpt" if gpt1 else "gpt2"
    classifier = isinstance(model, GPTForSequenceClassification)
    found = {name: getattr(config, name) for name in SAME_NAME} | dict.fromkeys(DROPOUTS, config.dropout)
    found |= {"model_type": kind, "architectures": [HEADS[kind][classifier]], "tie_word_embeddings": True}
    if gpt1:
        found |= {"afn": "gelu"}
    else:
        found |= {name: getattr(config, name) for name in GPT2_ALONE}
        found["activation_function"] = "gelu_new" if config.gelu == "tanh" else "gelu"
        found["bos_token_id"] = config.eos_token_id  # GPT-2 has one token for both
    if classifier:
        found["id2label"] = config.id2label
        found["label2id"] = {label: i for i, label in config.id2label.items()}
    found["dtype"] = str(model.wte.weight.dtype).removeprefix("torch.")
    return found
