"""BERT's two tasks (Devlin et al., 2018): tell tokens that were covered, and whether a second text follows the first.

A sample is cls A sep B sep. A is a stretch of lines of a document; B half the time the stretch that follows it (label 0),
else one from another document (label 1). Of the tokens that are not special 15 % are to be told: 80 % of them show
the mask, 10 % a random token, 10 % stay. With whole words all tokens of a word are covered together.
"""

import numpy as np

from fastattn.recipes.data import IGNORED, DataError

SHARE = 0.15
SHOWN_MASK, SHOWN_RANDOM = 0.8, 0.1


def cover(ids, words, rng, mask_id, regular_ids, whole_words=False):
    """(ids with some covered, targets: what they were, IGNORED elsewhere); numpy arrays of one length.

    words: the number of the word a token belongs to, -1 for special tokens, which are never covered. regular_ids: the ids
    random tokens are drawn from.
    """
    open_to = np.flatnonzero(words >= 0)
    count = max(1, round(SHARE * len(open_to)))
    if whole_words:
        chosen = _whole_words(words[open_to], count, rng)
    else:
        chosen = rng.permutation(len(open_to))[:count]
    at = open_to[chosen]
    targets = np.full_like(ids, IGNORED)
    targets[at] = ids[at]
    kind = rng.random(len(at))
    covered = ids.copy()
    covered[at[kind < SHOWN_MASK]] = mask_id
    other = at[(kind >= SHOWN_MASK) & (kind < SHOWN_MASK + SHOWN_RANDOM)]
    covered[other] = rng.choice(regular_ids, len(other))
    return covered, targets


def _whole_words(words, count, rng):
    """Places of the tokens of words in random order, as many as fit into `count`, and one word at least."""
    starts = np.flatnonzero(np.r_[True, words[1:] != words[:-1]])
    ends = np.r_[starts[1:], len(words)]
    chosen, left = [], count
    for w in rng.permutation(len(starts)):
        length = ends[w] - starts[w]
        if length <= left or not chosen:
            chosen += range(starts[w], ends[w])
            left -= length
        if left <= 0:
            break
    return np.array(chosen)


class Pairs:
    """Samples for `Batches(pairs, size, draw=pairs.draw)`: dicts of numpy arrays (length,)

    input_ids, token_type_ids (0 up to the first sep, 1 after it), attention_mask (1, and 0 where padded), targets (the
    covered tokens, IGNORED elsewhere); and next_sentence, a number: 0 continues, 1 is from elsewhere.
    """

    def __init__(self, texts, tokenizer, length, whole_words=False):
        lacking = [role for role in ("cls", "sep", "mask") if tokenizer.special[role] is None]
        if lacking:
            raise DataError(
                f"{tokenizer.name} has no {', '.join(lacking)} token, which masked training needs; take a BERT "
                "tokenizer, bytes, or one learned from the data"
            )
        self.tokenizer, self.length, self.whole_words = tokenizer, length, whole_words
        special = list(tokenizer.special_ids)
        self.regular_ids = np.setdiff1d(np.arange(tokenizer.vocab_size), special)
        half = (length - 3) // 2
        if half < 1:
            raise DataError(f"a block of {length} has no room for two texts; 16 is little, 128 is usual")
        self.stretches, self.document_of = [], []  # (ids, words); which document
        for number, text in enumerate(texts):
            found = list(_stretches(text, tokenizer, half))
            self.stretches += found
            self.document_of += [number] * len(found)
        self.document_of = np.array(self.document_of)
        self.firsts = np.flatnonzero(self.document_of[1:] == self.document_of[:-1])
        if len(self.stretches) < 3 or not len(self.firsts):
            raise DataError(
                f"the text makes {len(self.stretches)} stretches of {half} tokens, too few for pairs: give more text or "
                "a smaller block"
            )

    def __len__(self):
        return len(self.firsts)

    def __getitem__(self, i):
        return int(self.firsts[i])

    def draw(self, first, rng):
        elsewhere = int(rng.random() < 0.5)
        second = self._elsewhere(first, rng) if elsewhere else first + 1
        (a, words_a), (b, words_b) = self.stretches[first], self.stretches[second]
        t = self.tokenizer
        ids = np.r_[t.cls_id, a, t.sep_id, b, t.sep_id]
        words = np.r_[-1, words_a, -1, words_b + len(ids), -1]  # no word of A has the number of one of B
        covered, targets = cover(ids, words, rng, t.mask_id, self.regular_ids, self.whole_words)
        kinds = np.r_[np.zeros(len(a) + 2, int), np.ones(len(b) + 1, int)]
        pad = lambda x, filler: np.pad(x, (0, self.length - len(x)), constant_values=filler)  # noqa: E731
        return {
            "input_ids": pad(covered, t.pad_id),
            "token_type_ids": pad(kinds, 0),
            "attention_mask": pad(np.ones(len(ids), int), 0),
            "targets": pad(targets, IGNORED),
            "next_sentence": np.array(elsewhere),
        }

    def _elsewhere(self, first, rng):
        """A stretch of another document; of a single document, any but the first and its follower."""
        low, high = np.searchsorted(self.document_of, [self.document_of[first], self.document_of[first] + 1])
        if high - low == len(self.stretches):
            low, high = first, first + 2
        found = int(rng.integers(len(self.stretches) - (high - low)))
        return found if found < low else found + int(high - low)


def _stretches(text, tokenizer, most):
    """(ids, words) of consecutive lines, as many as have `most` tokens together; a longer line is cut."""
    ids, words, last = [], [], 0
    for line in text.splitlines(keepends=True):
        new, _, spelled = tokenizer.pieces(line)
        if ids and len(ids) + len(new) > most:
            yield _arrays(ids, words)
            ids, words, last = [], [], 0
        ids += new
        words += [last + w for w in spelled]
        last = words[-1] + 1 if words else 0
        while len(ids) > most:
            yield _arrays(ids[:most], words[:most])
            ids, words = ids[most:], words[most:]
    if ids:
        yield _arrays(ids, words)


def _arrays(ids, words):
    return np.array(ids), np.array(words)
