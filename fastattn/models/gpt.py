"""GPT-2, pre-norm: embeddings, blocks of attention and MLP around a residual stream, a final norm, a tied head.

Every sum of the residual stream and the norm behind it are one op, so a block takes (what is still to be added, the
stream) and hands on the same pair. Parameters are named as in the published GPT-2 checkpoints, weights lie as nn.Linear
has them (out, in); the head is wte's weight and has no entry of its own.

Letters: B batch, T new positions, S cached positions, C width, H heads, D = C / H, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, linear

from fastattn import functional as F
from fastattn.nn import LayerNorm

SIZES = {
    "tiny": dict(n_layer=2, n_head=2, n_embd=64, n_positions=128, vocab_size=256),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124 M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355 M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774 M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558 M
}


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    n_positions: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"GPTConfig: n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")


class KVCache:
    """Keys and values of every layer, (n_layer, 2, B, H, S, D), of which lens (B,) positions are filled."""

    def __init__(self, config, batch, length, device=None, dtype=None):
        shape = (config.n_layer, 2, batch, config.n_head, length, config.n_embd // config.n_head)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.lens = torch.zeros(batch, device=device, dtype=torch.int32)

    def layer(self, i):
        k_BHSD, v_BHSD = self.kv[i]
        return k_BHSD, v_BHSD, self.lens


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x_BTC, cache=None):
        B, T, C = x_BTC.shape
        qkv_BT3HD = self.c_attn(x_BTC).view(B, T, 3, self.n_head, C // self.n_head)
        q_BHTD, k_BHTD, v_BHTD = (t.transpose(1, 2) for t in qkv_BT3HD.unbind(2))
        if cache is None:
            p = self.dropout if self.training else 0.0
            o_BHTD = F.attention(q_BHTD, k_BHTD, v_BHTD, causal=True, dropout_p=p)
        else:
            k_BHSD, v_BHSD, lens_B = cache
            o_BHTD = F.attention_decode(q_BHTD, k_BHSD, v_BHSD, lens_B, k_new=k_BHTD, v_new=v_BHTD)
        return self.c_proj(o_BHTD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_BTC):
        return self.c_proj(gelu(self.c_fc(x_BTC), approximate="tanh"))


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
    def __init__(self, config):
        super().__init__()
        self.ln_1 = AddNorm(config)
        self.attn = Attention(config)
        self.ln_2 = AddNorm(config)
        self.mlp = MLP(config)

    def forward(self, branch_BTC, x_BTC, cache=None):
        h_BTC, x_BTC = self.ln_1(branch_BTC, x_BTC)
        h_BTC, x_BTC = self.ln_2(self.attn(h_BTC, cache), x_BTC)
        return self.mlp(h_BTC), x_BTC


class GPT(nn.Module):
    """model = GPT(GPTConfig(**SIZES["gpt2"])); logits, loss = model(ids, targets); ids = model.generate(ids, 50)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = AddNorm(config)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """N(0, 0.02), GPT-2's way: what writes into the residual stream is scaled down for its 2 * n_layer writers."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):  # apply() has been to its children already
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, input_ids, targets=None):
        """input_ids (B, T) -> logits (B, T, V), and the mean cross-entropy with targets (B, T), else None.

        targets[:, t] is the token that follows input_ids[:, t]; -100 does not count.
        """
        logits_BTV = linear(self.hidden(input_ids), self.wte.weight)
        if targets is None:
            return logits_BTV, None
        return logits_BTV, cross_entropy(logits_BTV.flatten(0, 1).float(), targets.flatten())

    def hidden(self, input_ids, cache=None):
        """What the head reads, (B, T, C). With a cache the ids follow what it holds, and their keys and values join it."""
        T = input_ids.shape[1]
        if T > self.config.n_positions:
            raise ValueError(
                f"GPT: {T} tokens, but n_positions is {self.config.n_positions}; shorten the input"
            )
        position_ids = None  # 0 .. T-1
        if cache is not None:
            position_ids = cache.lens[:, None] + torch.arange(T, device=input_ids.device)
        tables = (self.wte.weight, self.wpe.weight)
        p = self.config.dropout if self.training else 0.0
        branch_BTC, x_BTC = None, F.embeddings(input_ids, *tables, position_ids=position_ids, dropout_p=p)
        for i, block in enumerate(self.h):
            branch_BTC, x_BTC = block(branch_BTC, x_BTC, None if cache is None else cache.layer(i))
        if cache is not None:
            cache.lens += T
        return self.ln_f(branch_BTC, x_BTC)[0]

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """input_ids (B, T) and max_new_tokens more, drawn from softmax(logits / temperature) over the top_k tokens.

        Temperature 0 takes the likeliest token. `generator`: a seeded torch.Generator on the model's device. Keys and
        values are cached, so that a new token costs one position; T + max_new_tokens may not exceed n_positions.
        """
        B, T = input_ids.shape
        length = T + max_new_tokens
        if length > self.config.n_positions:
            raise ValueError(
                f"GPT.generate: {T} + {max_new_tokens} tokens, but n_positions is {self.config.n_positions}; "
                "shorten the prompt or ask for fewer"
            )
        weight = self.wte.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        cache = KVCache(self.config, B, length, weight.device, dtype)
        was_training = self.training
        self.eval()
        ids = new = input_ids
        try:
            for _ in range(max_new_tokens):
                logits_BV = linear(self.hidden(new, cache)[:, -1], weight)
                new = sample(logits_BV, temperature, top_k, generator)
                ids = torch.cat([ids, new], dim=1)
        finally:
            self.train(was_training)
        return ids


def sample(logits_BV, temperature=1.0, top_k=None, generator=None):
    """(B, 1) ids drawn from softmax(logits / temperature) over the top_k tokens."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None:
        least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -math.inf)
    return torch.multinomial(F.softmax(logits_BV), 1, generator=generator)
