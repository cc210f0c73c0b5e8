"""Text, blocks of tokens, and batches whose order can be resumed exactly.

Everything random about a batch is a function of (seed, epoch, number of the sample), so a position in the data is one
integer, and what comes after it is the same whether or not a run was interrupted there.
"""

import ast
import pathlib
import sysconfig

import numpy as np
import torch

SUFFIXES = (".txt", ".md", ".rst")
IGNORED = -100  # a target that does not count


class DataError(ValueError):
    """Text that is missing, unreadable or too short."""


def documents(path=None):
    """[text of each document]: a file is one, a folder's .txt, .md and .rst files are one each, None means Python's own."""
    if path is None:
        return python_documents()
    path = pathlib.Path(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        if not files:
            raise DataError(f"{path}: has no {', '.join(SUFFIXES)} file")
    found = [text for text in map(_read, files) if text.strip()]
    if not found:
        raise DataError(f"{path}: holds no text")
    return found


def _read(file):
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: is not UTF-8 text (byte {e.start}); convert it, or leave it out") from e
    except OSError as e:
        raise DataError(f"{file}: cannot be read ({e.strerror})") from e


def python_documents():
    """Python's reference manual as `help()` has it, and the docstrings of the standard library's top-level modules.

    A document is a topic or a module; 1.4 MB in all with Python 3.11. Needs no network and no download.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        topics = {}
    found = [topics[name] for name in sorted(topics)]
    for file in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = "\n\n".join(_docstrings(ast.parse(file.read_bytes())))
        if text:
            found.append(text)
    return found


def _docstrings(node):
    """Those of a module, its classes and functions, in the order of the source."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if text := ast.get_docstring(node):
            yield text
        for child in node.body:
            yield from _docstrings(child)


def split(texts, fraction=0.05, seed=0):
    """(to train on, held out): whole documents, about `fraction` of the characters, and the end of the longest where
    documents are too few or too long for that."""
    budget = round(fraction * sum(map(len, texts)))
    left, held = budget, set()
    for i in np.random.default_rng(seed).permutation(len(texts)):
        if len(texts[i]) <= left and len(held) < len(texts) - 1:
            held.add(int(i))
            left -= len(texts[i])
    kept = [text for i, text in enumerate(texts) if i not in held]
    out = [texts[i] for i in sorted(held)]
    if left > budget / 2:
        longest = max(range(len(kept)), key=lambda i: len(kept[i]))
        text = kept[longest]
        cut = len(text) - left
        cut = text.find("\n", cut, cut + left // 4) + 1 or cut  # at the end of a line if one is near
        kept[longest] = text[:cut]
        out.append(text[cut:])
    return kept, out


class Blocks:
    """Documents one behind the other, each closed by tokenizer.sep_id if there is one, cut into samples of `length` tokens and their targets.

    Every token but the very first is the target of exactly one sample. A sample is a dict of numpy arrays (length,):
    input_ids, targets (IGNORED where the last block repeats what its predecessor had), and documents, the number of the
    document each token belongs to.
    """

    def __init__(self, texts, tokenizer, length):
        end = [] if tokenizer.sep_id is None else [tokenizer.sep_id]
        encoded = [np.asarray([*tokenizer.encode(text), *end], dtype=np.int32) for text in texts]
        self.tokens = np.concatenate(encoded)
        self.documents = np.repeat(np.arange(len(encoded), dtype=np.int32), [len(e) for e in encoded])
        self.length = length
        if len(self.tokens) <= length:
            raise DataError(
                f"{len(self.tokens)} tokens of text do not fill one block of {length}: give more text or a smaller block"
            )

    def __len__(self):
        return -(-(len(self.tokens) - 1) // self.length)

    def __getitem__(self, i):
        wanted = i * self.length
        start = min(wanted, len(self.tokens) - 1 - self.length)
        span, after = slice(start, start + self.length), slice(start + 1, start + self.length + 1)
        targets = self.tokens[after].astype(np.int64)
        targets[: wanted - start] = IGNORED
        return {
            "input_ids": self.tokens[span].astype(np.int64),
            "targets": targets,
            "documents": self.documents[span].astype(np.int64),
        }


def stack(samples):
    """{name: (B, ...) tensor} of samples of one shape."""
    return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}


def packed(samples):
    """`stack` of Blocks, with documents as cu_seqlens (n + 1,) int32: where in the rows, one behind the other, each begins and
    the last ends. A row begins one too. Absent where no row has more than one, so that rows are plain sequences."""
    batch = stack(samples)
    documents = batch.pop("documents")
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    if begins.sum() > len(documents):
        starts = begins.flatten().nonzero().flatten()
        batch["cu_seqlens"] = torch.cat([starts, starts.new_tensor([documents.numel()])]).int()
    return batch


class Batches:
    """Endless batches, in an order drawn anew for every epoch; `position`, the samples all ranks drew so far, may be set.

    samples: anything with len() and [i]. draw(sample, rng): what is random about a sample, such as its masks, with a
    numpy generator of its own. collate(list of samples): a dict of tensors. Of each batch of size * world samples a rank
    gets its own share. only_first: the first batch over and over, to see a model learn it by heart.
    """

    def __init__(self, samples, size, collate=stack, draw=None, *, seed=0, rank=0, world=1, only_first=False):
        if not len(samples):
            raise DataError("no samples to make batches of")
        self.samples, self.size, self.collate, self.draw = samples, size, collate, draw
        self.seed, self.rank, self.world, self.only_first = seed, rank, world, only_first
        self.position = 0
        self._order = None, None  # (epoch, its permutation)

    def __iter__(self):
        return self

    def __next__(self):
        first = (0 if self.only_first else self.position) + self.rank * self.size
        batch = self.collate([self._sample(n) for n in range(first, first + self.size)])
        self.position += self.size * self.world
        return batch

    def _sample(self, n):
        epoch, place = divmod(n, len(self.samples))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
        return self._drawn(epoch, int(self._order[1][place]))

    def _drawn(self, epoch, i):
        sample = self.samples[i]
        return self.draw(sample, np.random.default_rng([self.seed, epoch, i])) if self.draw else sample

    def once(self, limit=None):
        """Every sample in its own order, or `limit` batches of them spread over all: (batch, whether it counts).

        All ranks get equally many; one that has run out of samples gets some again that do not count.
        """
        share = self.size * self.world
        chosen = range(len(self.samples))
        if limit is not None and limit * share < len(chosen):
            chosen = [k * len(chosen) // (limit * share) for k in range(limit * share)]
        for first in range(self.rank * self.size, self.rank * self.size + len(chosen), share):
            mine = chosen[first : first + self.size]
            counts = len(mine) > 0
            yield self.collate([self._drawn(0, i) for i in (mine if counts else chosen[:1])]), counts
