"""Text to ids and back: bytes by default; a tokenizer.json, or a folder as transformers has it, otherwise.

load(path) gives a tokenizer, beside(checkpoint) the one that lies beside a model's weights, train_bpe(texts, size) a new
one. All share one interface: four special ids (pad, cls, sep, mask; cls begins a sequence, sep ends each text and every
document), text as pieces with character offsets, and the sequences that models read:

    sequence(a)         cls a sep                    type ids 0
    sequence(a, b)      cls a sep b sep              type ids 0, and 1 from b on
    windows(a, b)       the same with b cut into overlapping windows
    words([...])        cls w1 w2 ... sep            each piece knows its word

Text stays text: "[MASK]" typed by a user is seven characters, never the special id. Anything other than bytes takes the
`tokenizers` library; whatever is wrong with a file is one TokenizerError that names it.
"""

import json
import pathlib
import re
from dataclasses import dataclass

import torch

from fastattn.models.checkpoint import CONFIG, replacing

JSON, SETTINGS = "tokenizer.json", "tokenizer_config.json"
ROLES = ("pad", "cls", "sep", "mask")
# The names that published tokenizers use, for those that come without settings.
KNOWN = {
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "cls": ("[CLS]", "<s>", "<bos>"),
    "sep": ("[SEP]", "</s>", "<eos>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
}
OURS = {role: KNOWN[role][0] for role in ROLES}
SPARE = 1024  # rows an embedding may have beyond the tokenizer's, where sizes are rounded up


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, or that is not the model's."""


@dataclass
class Encoded:
    """One sequence. Per id: type id; (start, end) in the characters of its text; word; text 0 or 1. None for special ids."""

    ids: list
    type_ids: list
    offsets: list
    word_ids: list
    parts: list

    def __len__(self):
        return len(self.ids)


class Tokenizer:
    """What all tokenizers share. A subclass has vocab_size, special = {role: id or None}, pieces, decode and save."""

    @property
    def pad_id(self):
        """GPT-2 has no id of its own for padding; what is padded is masked, so that any will do."""
        pad = self.special["pad"]
        return pad if pad is not None else self.special["sep"] or 0

    @property
    def cls_id(self):
        return self.special["cls"]

    @property
    def sep_id(self):
        return self.special["sep"]

    @property
    def mask_id(self):
        return self.special["mask"]

    @property
    def special_ids(self):
        return {i for i in self.special.values() if i is not None}

    def encode(self, text):
        """The ids of a text alone, as a list."""
        return self.pieces(text)[0]

    def sequence(self, a, b=None, max_length=None):
        """cls a sep [b sep]; what is longer than max_length loses pieces at the end of the longer text."""
        parts = [self.pieces(a)] + ([] if b is None else [self.pieces(b)])
        if max_length is not None:
            room = self._room(max_length, len(parts))
            lengths = [len(ids) for ids, _, _ in parts]
            if sum(lengths) > room and len(parts) == 1:
                lengths = [room]
            elif sum(lengths) > room:
                shorter = min(*lengths, room // 2)
                longer = lengths.index(max(lengths))
                lengths[longer], lengths[1 - longer] = room - shorter, shorter
            parts = [tuple(x[:n] for x in part) for part, n in zip(parts, lengths, strict=True)]
        return self._assemble(parts)

    def windows(self, question, context, max_length, overlap):
        """sequence(question, context) as often as it takes to show all of context; neighbours share `overlap` pieces of it.

        The question keeps half of max_length at most.
        """
        asked = tuple(x[: max_length // 2] for x in self.pieces(question))
        shown = self.pieces(context)
        room = self._room(max_length, 2) - len(asked[0])
        if not 0 <= overlap < room:
            raise ValueError(
                f"windows of {room} pieces cannot share {overlap}: need a smaller overlap or a larger max_length"
            )
        starts = range(0, max(len(shown[0]) - overlap, 1), room - overlap)
        return [self._assemble([asked, tuple(x[s : s + room] for x in shown)]) for s in starts]

    def words(self, words, max_length=None):
        """sequence of words that are given apart; word_ids count them. What lies between words belongs to none."""
        ends, at = [], 0
        for word in words:
            ends.append((at, at + len(word)))
            at += len(word) + 1
        found = self.sequence(" ".join(words), max_length=max_length)
        found.word_ids = [_word_at(ends, offset) for offset in found.offsets]
        return found

    def fit(self, vocab_size, model="the model"):
        """Raise where a model with vocab_size ids cannot be this tokenizer's."""
        if not vocab_size - SPARE < self.vocab_size <= vocab_size:
            raise TokenizerError(
                f"{self.name} has {self.vocab_size} ids, {model} has {vocab_size}: they do not belong together; "
                "name the tokenizer that the model was trained with"
            )
        return self

    def _room(self, max_length, texts):
        around = (self.cls_id is not None) + texts * (self.sep_id is not None)
        if max_length <= around:
            raise ValueError(f"max_length {max_length} has no room for text: {around} ids go around it")
        return max_length - around

    def _assemble(self, parts):
        found = Encoded([], [], [], [], [])

        def special(i, kind):
            if i is not None:
                add([i], [None], [None], kind, None)

        def add(ids, offsets, words, kind, part):
            found.ids += ids
            found.offsets += offsets
            found.word_ids += words
            found.type_ids += [kind] * len(ids)
            found.parts += [part] * len(ids)

        special(self.cls_id, 0)
        for n, part in enumerate(parts):
            add(*part, n, n)
            special(self.sep_id, n)
        return found


def _word_at(spans, offset):
    """The word that a piece ends in: a piece may begin with the space before its word."""
    if offset is None or offset[0] == offset[1]:
        return None
    low, high = 0, len(spans)
    while low < high:  # the first word that ends behind the piece's last character
        middle = (low + high) // 2
        low, high = (middle + 1, high) if spans[middle][1] < offset[1] else (low, middle)
    return low if low < len(spans) and spans[low][0] < offset[1] else None


class Bytes(Tokenizer):
    """UTF-8 as it is: ids 0 to 255, then pad, cls, sep, mask. Words are runs of letters and digits; all else stands alone."""

    name = "the byte tokenizer"
    vocab_size = 256 + len(ROLES)
    special = {role: 256 + i for i, role in enumerate(ROLES)}

    def encode(self, text):
        return list(text.encode())

    def pieces(self, text):
        ids, offsets, words = [], [], []
        for n, word in enumerate(re.finditer(r"\w+|\W", text)):
            for at in range(*word.span()):
                encoded = text[at].encode()
                ids += encoded
                offsets += [(at, at + 1)] * len(encoded)
                words += [n] * len(encoded)
        return ids, offsets, words

    def decode(self, ids):
        """Special ids are left out; bytes that are no UTF-8 become U+FFFD."""
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")

    def save(self, folder):
        """As a tokenizer.json of its 256 bytes, so that transformers can load it as well."""
        names = _byte_names()
        special = {name: self.special[role] for role, name in OURS.items()}
        added = [
            {"id": i, "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for name, i in special.items()
        ]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        text = json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": added,
                "normalizer": None,
                "pre_tokenizer": level,
                "post_processor": None,
                "decoder": level,
                "model": {
                    "type": "BPE",
                    "vocab": {name: i for i, name in enumerate(names)} | special,
                    "merges": [],
                },
            },
            ensure_ascii=False,
        )
        _write(folder, text, {f"{role}_token": name for role, name in OURS.items()} | {"fastattn": "bytes"})


def _byte_names():
    """How byte-level tokenizers spell the 256 bytes in JSON: printable ones as they are, the others from U+0100 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


class Library(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, inner, settings, name):
        inner.no_truncation()  # files carry these along: MiniLM's cuts and pads to 128
        inner.no_padding()
        inner.encode_special_tokens = True  # "[MASK]" in a text is text
        self.inner, self.settings, self.name = inner, settings, name
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.special = {role: _special(role, vocabulary, settings) for role in ROLES}

    def encode(self, text):
        return self.inner.encode(text, add_special_tokens=False).ids

    def pieces(self, text):
        found = self.inner.encode(text, add_special_tokens=False)
        return found.ids, found.offsets, found.word_ids

    def decode(self, ids):
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder):
        _write(folder, self.inner.to_str(), self.settings)


def _special(role, vocabulary, settings):
    named = _content(settings.get(f"{role}_token"))
    if named is None and role in ("cls", "sep"):
        # GPT-2's <|endoftext|> is its bos and its eos: it ends documents and begins nothing
        bos, eos = (_content(settings.get(f"{x}_token")) for x in ("bos", "eos"))
        named = eos if role == "sep" else bos if bos != eos else None
    names = (named,) if named is not None else KNOWN[role]
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def _content(token):
    """transformers writes a special token as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _write(folder, text, settings):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / JSON) as file, replacing(folder / SETTINGS) as set_file:
        file.write_text(text, encoding="utf-8")
        set_file.write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings, indent=2) + "\n",
            encoding="utf-8",
        )


def load(path=None):
    """The tokenizer of a tokenizer.json or of a folder that has one, or vocab.txt (BERT), or vocab.json and merges.txt (GPT-2).

    Without a path, or for "bytes", the byte tokenizer.
    """
    if path is None or str(path) == "bytes":
        return Bytes()
    path = pathlib.Path(path)
    if not path.exists():
        raise TokenizerError(f"{path}: there is no such tokenizer; need a tokenizer.json, a folder, or bytes")
    folder = path if path.is_dir() else path.parent
    settings = {}
    for name in ("special_tokens_map.json", SETTINGS):
        settings |= _object(folder / name) if (folder / name).exists() else {}
    if settings.get("fastattn") == "bytes":
        return Bytes()
    return Library(_inner(path, settings), settings, f"the tokenizer {path}")


def beside(checkpoint, vocab_size, path=None):
    """The tokenizer of a model with vocab_size ids: the one at path, or the one in the checkpoint's folder.

    A checkpoint without one is taken for bytes if vocab_size says so.
    """
    if path is None:
        folder = pathlib.Path(checkpoint)
        folder = folder if folder.is_dir() else folder.parent
        if any((folder / name).exists() for name in (JSON, "vocab.txt", "vocab.json")):
            path = folder
        elif not vocab_size - SPARE < Bytes.vocab_size <= vocab_size:
            raise TokenizerError(
                f"{folder}: has no {JSON} beside its {CONFIG}, and {vocab_size} ids are not bytes; name the tokenizer"
            )
    return load(path).fit(vocab_size, f"the model in {checkpoint}")


def _inner(path, settings):
    library = _library()
    files = [path] if path.is_file() else [path / name for name in (JSON, "vocab.txt", "vocab.json")]
    file = next((f for f in files if f.exists()), None)
    if file is None:
        raise TokenizerError(f"{path}: has no {JSON}, no vocab.txt and no vocab.json")
    try:
        if file.name == "vocab.txt":
            lower, accents = settings.get("do_lower_case", True), settings.get("strip_accents")
            return library.BertWordPieceTokenizer(
                str(file), lowercase=lower, strip_accents=accents
            )._tokenizer
        if file.name == "vocab.json":
            merges = str(file.with_name("merges.txt"))
            inner = library.ByteLevelBPETokenizer(str(file), merges)._tokenizer
            if (end := _content(settings.get("eos_token", "<|endoftext|>"))) is not None:
                inner.add_special_tokens([end])
            return inner
        return library.Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises Exception itself, whatever the matter is
        raise TokenizerError(f"{file}: cannot be read as a tokenizer ({e})") from e


def _object(file):
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise TokenizerError(f"{file}: cannot be read as JSON ({e})") from e
    if not isinstance(found, dict):
        raise TokenizerError(f"{file}: holds a {type(found).__name__}, needs an object")
    return found


def _library():
    try:
        import tokenizers
    except ImportError as e:
        raise ImportError("tokenizers other than bytes take a library: pip install tokenizers") from e
    return tokenizers


def train_bpe(texts, vocab_size):
    """A byte-level BPE of at most vocab_size ids, learned from an iterable of texts; ids 0 to 3 are pad, cls, sep, mask."""
    if vocab_size < Bytes.vocab_size:
        raise ValueError(f"train_bpe: vocab_size {vocab_size}, need at least {Bytes.vocab_size}")
    library = _library()
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(OURS.values()),
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Library(inner, {f"{role}_token": name for role, name in OURS.items()}, "the trained tokenizer")


def table(rows, filler):
    """Lists of ids as an int64 tensor (B, T), filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


def padded(sequences, pad_id):
    """Encoded sequences as the tensors of a batch, each (B, T): input_ids, token_type_ids, attention_mask."""
    return {
        "input_ids": table([s.ids for s in sequences], pad_id),
        "token_type_ids": table([s.type_ids for s in sequences], 0),
        "attention_mask": table([[1] * len(s) for s in sequences], 0),
    }


class Stream:
    """Ids one at a time to text: push(id) gives what can be shown already, flush() the rest.

    A character of several bytes may be spread over ids: what ends in the middle of one is held back.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def push(self, i):
        self.ids.append(int(i))
        return self._new(hold=True)

    def flush(self):
        return self._new(hold=False)

    def _new(self, hold):
        # Decoded again from the last ids shown: some tokenizers write a space before a word only if something precedes it.
        before, text = self.tokenizer.decode(self.ids[: self.shown]), self.tokenizer.decode(self.ids)
        if hold and text.endswith("\ufffd") and len(self.ids) - self.shown < 4:
            return ""
        self.ids = self.ids[self.shown :] or self.ids
        self.shown = len(self.ids)
        return text[len(before) :]
