"""Generation: a cache of keys and values, sampling, stopping, and tokens as they come.

The cache holds each sequence from its first position on, whatever padding it came with: prompts are moved to the left, so
that what lies past a sequence's length is never read and its next token overwrites it. No step needs a mask, and sequences of
different lengths go on side by side.

Letters: B batch, T new positions, S cached positions, C width, H heads, D = C / H, V vocabulary.
"""

import math

import torch

from fastattn import functional as F


class KVCache:
    """Keys and values of every layer, (n_layer, 2, B, H, S, D), of which lens (B,) positions are filled.

    It may serve several calls of generate: each goes on where the one before stopped.
    """

    def __init__(self, config, batch, length, device=None, dtype=None):
        shape = (config.n_layer, 2, batch, config.n_head, length, config.n_embd // config.n_head)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.lens = torch.zeros(batch, device=device, dtype=torch.int32)
        self.seen = torch.zeros(
            batch, config.vocab_size, device=device, dtype=torch.bool
        )  # tokens, for penalties
        self.pending = None  # (B, 1): the last token of a generate, whose keys nobody has computed yet
        self.used = (
            0  # the longest of lens, known without asking the device; with stopped sequences an upper bound
        )

    @property
    def length(self):
        return self.kv.shape[4]

    def make_room(self, T):
        if self.used + T > self.length:
            raise ValueError(
                f"KVCache: {T} tokens after {self.used}, but it holds {self.length}; make it longer or start a new one"
            )

    def attend(self, layer, q_BHTD, k_BHTD, v_BHTD, **options):
        """Attention of the new queries over what the cache holds and the new keys, which join it."""
        k_BHSD, v_BHSD = self.kv[layer]
        T = q_BHTD.shape[2]
        if self.used or T == 1:
            return F.attention_decode(
                q_BHTD, k_BHSD, v_BHSD, self.lens, k_new=k_BHTD, v_new=v_BHTD, **options
            )
        # A prompt in an empty cache is attention as in training, whose kernels are made for many queries.
        k_BHSD[:, :, :T], v_BHSD[:, :, :T] = k_BHTD, v_BHTD
        return F.attention(q_BHTD, k_BHTD, v_BHTD, causal=True, **options)

    def advance(self, T):
        self.lens += T
        self.used += T


def new_cache(model, batch=1, length=None):
    """An empty KVCache on the model's device, in the dtype it computes in; for n_positions where no length is given."""
    weight, device = model.wte.weight, model.wte.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return KVCache(model.config, batch, length or model.config.n_positions, weight.device, dtype)


def compacted(input_ids, attention_mask):
    """(ids with each row's padding moved behind its tokens, lengths (B,))."""
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask is {tuple(attention_mask.shape)}, needs input_ids' {tuple(input_ids.shape)}"
        )
    padding = attention_mask == 0
    order = padding.to(torch.int8).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), (~padding).sum(1, dtype=torch.int32)


def generate(model, input_ids, max_new_tokens, **options):
    """input_ids (B, T) followed by up to max_new_tokens more, (B, T + new): what stream yields, in one piece."""
    return torch.cat(
        [input_ids, *(new[:, None] for new in stream(model, input_ids, max_new_tokens, **options))], 1
    )


def stream(
    model, input_ids, max_new_tokens, *, attention_mask=None, temperature=1.0, top_k=None, top_p=None, min_p=None,
    repetition_penalty=1.0, eos_token_id=None, pad_token_id=None, stop=(), generator=None, cache=None, cuda_graph=False,
):  # fmt: skip
    """An iterator over max_new_tokens steps of tokens (B,), which ends early once every sequence has stopped.

    input_ids (B, T), T >= 1; attention_mask (B, T) is 0 at padding, on either side. Each token is drawn from
    softmax(logits / temperature) over what top_k, top_p and min_p leave (see `sample`), with `generator`, a seeded
    torch.Generator on the model's device; temperature 0 takes the likeliest. repetition_penalty divides the positive logits
    of tokens that were there before and multiplies their negative ones (arXiv 1909.05858).

    A sequence stops behind an eos_token_id (an int or several; the config's by default, () for none) or one of the
    sequences of ids in `stop`; from then on it yields pad_token_id, by default the config's, else the first eos_token_id, else 0.

    cache: a KVCache (model.new_cache()) that this call fills and a later one goes on from, as a chat does; its length bounds
    both. input_ids are then the new tokens only. cuda_graph: decode by one captured CUDA graph a call; it has never run on a GPU.
    """
    config, weight = model.config, model.wte.weight
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise ValueError(f"generate: input_ids is {tuple(input_ids.shape)}, needs (B, T) with T at least 1")
    ids, lens = input_ids, None
    if attention_mask is not None:
        ids, lens = compacted(input_ids, attention_mask)
        if not (lens > 0).all():
            raise ValueError(
                "generate: attention_mask has a row without a token; give it at least one, e.g. eos"
            )
    if cache is not None and cache.pending is not None:
        ids = torch.cat([cache.pending, ids], 1)
        lens = None if lens is None else lens + 1
    B, T = ids.shape
    used = 0 if cache is None else cache.used
    if used + T + max_new_tokens > config.n_positions:
        before = f"{used} cached + " if used else ""
        raise ValueError(
            f"generate: {before}{T} + {max_new_tokens} tokens, but n_positions is {config.n_positions}; "
            "shorten the prompt or ask for fewer"
        )
    if cuda_graph and not weight.is_cuda:
        raise ValueError(f"generate: cuda_graph needs a model on a GPU, it is on {weight.device}")
    if cache is not None and used + T + max_new_tokens - 1 > cache.length:
        raise ValueError(
            f"generate: {used} cached + {T} + {max_new_tokens} tokens, but the cache holds {cache.length}; make it longer"
        )
    if cache is None:
        cache = new_cache(model, B, T + max_new_tokens)
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    if pad_token_id is None:
        pad_token_id = config.pad_token_id if config.pad_token_id is not None else (*eos, 0)[0]
    stops = [torch.tensor([e], device=weight.device) for e in eos]
    stops += [torch.as_tensor(s, device=weight.device) for s in stop]
    if any(s.dim() != 1 or not len(s) for s in stops):
        raise ValueError(f"generate: stop is {stop!r}, needs sequences of token ids, none of them empty")
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, generator=generator)
    return _steps(
        model, ids, lens, max_new_tokens, cache, stops, pad_token_id, repetition_penalty, options, cuda_graph
    )


@torch.no_grad()
def _steps(model, ids, lens, max_new_tokens, cache, stops, pad_token_id, penalty, options, cuda_graph):
    B, device = ids.shape[0], ids.device
    training = model.training
    model.eval()
    try:
        logits_BV = _prefill(model, ids, lens, cache)
        cache.pending = None
        stopped_B = torch.zeros(B, dtype=torch.bool, device=device)
        tail = ids.new_full((B, max((len(s) for s in stops), default=1)), -1)  # of what is new
        step = None
        for i in range(max_new_tokens):
            if i:
                if step is None:
                    step = _Graph(model, cache, tail) if cuda_graph else _step
                logits_BV = step(model, cache, cache.pending, stopped_B)
            if penalty != 1.0:
                changed = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
                logits_BV = torch.where(cache.seen, changed, logits_BV)
            new_B1 = sample(logits_BV, **options)
            cache.pending = new_B1 if i == 0 else torch.where(stopped_B[:, None], cache.pending, new_B1)
            cache.seen.scatter_(1, cache.pending, True)
            shown_B = new_B1[:, 0].masked_fill(stopped_B, pad_token_id)
            tail = torch.cat([tail[:, 1:], new_B1], 1)
            for s in stops:
                stopped_B = stopped_B | (tail[:, -len(s) :] == s).all(1)
            yield shown_B
            if stops and stopped_B.all():
                return
    finally:
        model.train(training)


def _prefill(model, ids, lens, cache):
    """Logits (B, V) behind each row's last token."""
    before = cache.lens.clone()
    h_BTC = model.hidden(ids, cache)
    rows = torch.arange(len(ids), device=ids.device)
    if lens is None:
        cache.seen.scatter_(1, ids, True)
        return model.head(h_BTC[:, -1])
    cache.lens.copy_(before + lens)
    inside = torch.arange(ids.shape[1], device=ids.device) < lens[:, None]
    cache.seen.scatter_(1, torch.where(inside, ids, ids[:, :1]), True)  # a row's first id is never padding
    return model.head(h_BTC[rows, lens.long() - 1])


def _step(model, cache, token_B1, stopped_B):
    """Logits (B, V) behind one more token; a stopped sequence does not grow."""
    h_B1C = model.hidden(token_B1, cache)
    cache.lens -= stopped_B.int()
    return model.head(h_B1C[:, 0])


class _Graph:
    """_step as one CUDA graph. Never run: no GPU was there."""

    def __init__(self, model, cache, like):
        self.token_B1, self.stopped_B = (
            like[:, :1].clone().zero_(),
            torch.zeros_like(like[:, 0], dtype=torch.bool),
        )
        lens, used = cache.lens.clone(), cache.used
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles and loads kernels, which a capture may not
            _step(model, cache, self.token_B1, self.stopped_B)
        torch.cuda.current_stream().wait_stream(stream)
        cache.lens.copy_(lens)
        cache.used = used
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits_BV = _step(model, cache, self.token_B1, self.stopped_B)
        cache.used = used

    def __call__(self, model, cache, token_B1, stopped_B):
        self.token_B1.copy_(token_B1)
        self.stopped_B.copy_(stopped_B)
        self.graph.replay()
        cache.used += 1
        return self.logits_BV


def sample(logits_BV, temperature=1.0, top_k=None, top_p=None, min_p=None, generator=None):
    """(B, 1) ids drawn from softmax(logits / temperature) over the tokens that are left, or at temperature 0 the likeliest.

    top_k leaves the k likeliest; top_p of these the fewest that together reach this probability (arXiv 1904.09751); min_p
    those at least this probable relative to the likeliest (arXiv 2407.01082).
    """
    _check("temperature", temperature, temperature >= 0, "at least 0")
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None:
        _check("top_k", top_k, top_k >= 1, "at least 1")
        least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -math.inf)
    if top_p is not None:
        _check("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")
        sorted_BV, order_BV = logits_BV.sort(descending=True)
        p_BV = F.softmax(sorted_BV)
        enough_BV = p_BV.cumsum(-1) - p_BV >= top_p  # already reached by the likelier ones
        logits_BV = logits_BV.masked_fill(enough_BV.gather(1, order_BV.argsort(1)), -math.inf)
    if min_p is not None:
        _check("min_p", min_p, 0 <= min_p <= 1, "from 0 to 1")
        least_B1 = logits_BV.amax(-1, keepdim=True) + (math.log(min_p) if min_p else -math.inf)
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -math.inf)
    return torch.multinomial(F.softmax(logits_BV), 1, generator=generator)


def _check(name, value, right, needs):
    if not right:
        raise ValueError(f"sample: {name} is {value}, needs to be {needs}")
