"""A conversation: the template that `finetune instruct` trains on, and turns that keep their cache.

    System: ...\\n          if there is one
    User: ...\\n
    Assistant: ...<sep>    and so on; <sep> is the tokenizer's end of text

Plain words, so that every tokenizer has them. Each piece is encoded by itself: what a cache holds of a conversation is
then the beginning of what follows, whatever is said next.
"""

import dataclasses

from fastattn.models.generation import new_cache
from fastattn.recipes import generate

ROLES = {"system": "System", "user": "User"}
STOP = f"\n{ROLES['user']}:"  # a model that was not trained on the template may go on as the user


def encode(tokenizer, messages, reply=False):
    """(ids, whether each is the assistant's) of [{role, content}]; reply: up to where the assistant is to go on."""
    ids, theirs = [], []

    def add(more, assistant):
        ids.extend(more)
        theirs.extend([assistant] * len(more))

    for message in messages:
        if message["role"] == "assistant":
            add(tokenizer.encode("Assistant:"), False)
            add([*tokenizer.encode(f" {message['content']}"), end(tokenizer)], True)
        else:
            add(tokenizer.encode(f"{ROLES[message['role']]}: {message['content']}\n"), False)
    if reply:
        add(tokenizer.encode("Assistant:"), False)
    return ids, theirs


def end(tokenizer):
    """The id that ends an answer."""
    if tokenizer.sep_id is None:
        raise ValueError(
            f"{tokenizer.name} has no id that ends a text, such as <|endoftext|>; conversations need one"
        )
    return tokenizer.sep_id


def replies(model, tokenizer, conversations, longest=64, batch_size=32):
    """The likeliest answer to each conversation, a list of messages; a prompt that is too long loses its beginning."""
    room = max(model.config.n_positions - longest, 1)
    prompts = [encode(tokenizer, messages, reply=True)[0][-room:] for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    sampling = generate.Sampling(min(longest, model.config.n_positions - 1), temperature=0)
    found = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        made = generate.texts(model, tokenizer, [prompts[i] for i in chosen], sampling)
        for i, text in zip(chosen, made, strict=True):
            found[i] = text.strip()
    return found


class Conversation:
    """Turns with a GPT. Keys and values of what was said stay in the cache: a turn costs its own tokens.

    When the positions are used up the oldest turns are forgotten, and the rest is read again.
    """

    def __init__(self, model, tokenizer, sampling, system=None):
        end(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.sampling = dataclasses.replace(sampling, stop=(*sampling.stop, STOP))
        self.first = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.first)
        self.forgotten = 0  # turns
        self._begin()

    def _begin(self):
        self.cache = new_cache(self.model)
        self.read = 0  # messages in the cache
        self.open = False  # the last answer there has no end

    def say(self, text):
        """The answer, piece by piece; who stops listening leaves the rest unsaid."""
        positions = self.model.config.n_positions
        turn = {"role": "user", "content": text}
        alone = len(encode(self.tokenizer, [*self.first, turn], reply=True)[0])
        if alone >= positions:
            raise ValueError(f"a turn of {alone} tokens leaves no room: the model has {positions} positions")
        self.messages.append(turn)
        wanted = min(self.sampling.max_new_tokens or 200, positions // 2)
        ids = self._new_ids()
        while self._used() + len(ids) + wanted > positions and self._forget():
            ids = self._new_ids()
        left = positions - self._used() - len(ids)
        sampling = dataclasses.replace(self.sampling, max_new_tokens=min(wanted, left))
        if self.sampling.seed is not None:  # another draw for every turn, the same for the same turns
            sampling = dataclasses.replace(sampling, seed=self.sampling.seed + len(self.messages))
        said = []
        try:
            for piece in generate.pieces(self.model, self.tokenizer, ids, sampling, self.cache):
                piece = piece if said else piece.lstrip()
                if piece:
                    said.append(piece)
                    yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said).strip()})
            self.read = len(self.messages)
            self.open = self.cache.pending is None or self.cache.pending.item() != end(self.tokenizer)

    def _used(self):
        return self.cache.used + (self.cache.pending is not None)

    def _new_ids(self):
        ids, _ = encode(self.tokenizer, self.messages[self.read :], reply=True)
        return [end(self.tokenizer), *ids] if self.read and self.open else ids

    def _forget(self):
        """Drop the oldest turn, if it is not the one at hand, and begin a new cache."""
        turns = self.messages[len(self.first) :]
        if len(turns) < 3:
            return False
        self.messages = [*self.first, *turns[2:]]
        self.forgotten += 1
        self._begin()
        return True
