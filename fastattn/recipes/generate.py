"""Text that goes on from a prompt: what `fastattn generate` and `fastattn chat` print.

model, tokenizer = pretrained.opened("folder of a GPT", "generate")
for piece in pieces(model, tokenizer, tokenizer.encode("The "), Sampling(max_new_tokens=50)):
    print(piece, end="")
"""

import dataclasses

import torch

from fastattn.recipes.tokens import Stream, table


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn (models/generation.py, sample), and when to stop: `stop` are texts, which are not shown."""

    max_new_tokens: int | None = None  # what the positions leave, 200 at most
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple = ()
    seed: int | None = None

    def options(self, device):
        """For GPT.stream and GPT.generate."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        generator = None if self.seed is None else torch.Generator(device).manual_seed(self.seed)
        return {name: getattr(self, name) for name in names} | {"generator": generator}

    def room(self, model, prompt):
        """Tokens to generate after a prompt of so many."""
        left = model.config.n_positions - prompt
        if left < 1:
            raise ValueError(
                f"a prompt of {prompt} tokens leaves no room: the model has {model.config.n_positions} positions"
            )
        return min(left, 200) if self.max_new_tokens is None else self.max_new_tokens


def pieces(model, tokenizer, ids, sampling, cache=None):
    """The text that follows ids, piece by piece, each of whole characters, up to the tokenizer's end of text or a stop.

    cache: a generation.KVCache that holds what was before ids, and will hold what comes.
    """
    device = model.wte.weight.device
    ids = ids or beginning(tokenizer)
    used = 0 if cache is None else cache.used + (cache.pending is not None)
    longest = sampling.room(model, used + len(ids))
    end = () if tokenizer.sep_id is None else tokenizer.sep_id
    stream = Stream(tokenizer)
    until = _Until(sampling.stop)
    drawn = model.stream(
        torch.tensor([ids], device=device), longest, eos_token_id=end, cache=cache, **sampling.options(device)
    )
    for token in drawn:
        if (i := token.item()) == tokenizer.sep_id:
            break
        yield until.push(stream.push(i))
        if until.stopped:
            return
    yield until.push(stream.flush())
    yield until.rest()


def texts(model, tokenizer, prompts, sampling):
    """What follows each of several prompts (lists of ids), all at once in one batch."""
    device = model.wte.weight.device
    prompts = [ids or beginning(tokenizer) for ids in prompts]
    longest = sampling.room(model, max(map(len, prompts)))
    ids = table(prompts, tokenizer.pad_id).to(device)
    mask = table([[1] * len(p) for p in prompts], 0).to(device)
    end = () if tokenizer.sep_id is None else tokenizer.sep_id
    made = model.generate(ids, longest, attention_mask=mask, eos_token_id=end, **sampling.options(device))
    found = []
    for row in made[:, ids.shape[1] :].tolist():
        row = row[: row.index(tokenizer.sep_id)] if tokenizer.sep_id in row else row
        until = _Until(sampling.stop)
        found.append(until.push(tokenizer.decode(row)) + until.rest())
    return found


def beginning(tokenizer):
    """What a text without a prompt follows: the end of another, as in training."""
    start = tokenizer.sep_id if tokenizer.sep_id is not None else tokenizer.cls_id
    if start is None:
        raise ValueError(f"{tokenizer.name} has no id that a text could begin with: need a prompt")
    return [start]


class _Until:
    """Text up to the first of some stops; what may be the beginning of one is held back."""

    def __init__(self, stops):
        self.stops, self.held, self.stopped = [s for s in stops if s], "", False

    def push(self, text):
        text = self.held + text
        at = min((text.find(s) for s in self.stops if s in text), default=None)
        if at is not None:
            self.stopped, self.held = True, ""
            return text[:at]
        keep = max((n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self):
        held, self.held = self.held, ""
        return held
