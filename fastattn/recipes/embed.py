"""Sentences as vectors, and the order of sentences by likeness to a query: what `fastattn embed` runs.

model, tokenizer = opened("folder of a BERT, such as MiniLM's")
vectors = embed(model, tokenizer, ["a sentence", "another"])      (N, C) fp32, each of length 1
"""

import json
import pathlib

import numpy as np
import torch

from fastattn.models.checkpoint import CheckpointError, replacing
from fastattn.recipes import pretrained, runs
from fastattn.recipes.tokens import padded


def opened(path, tokenizer=None):
    """(model, tokenizer, longest sequence). What sentence-transformers wrote beside the weights is held to."""
    folder = runs.newest(path)
    pooling = _json(folder / "1_Pooling" / "config.json")
    if pooling and not pooling.get("pooling_mode_mean_tokens", False):
        raise CheckpointError(
            f"{folder}: was trained with another pooling than the mean of its tokens, which this is"
        )
    model, tokenizer = pretrained.opened(folder, "embed", tokenizer)
    longest = pretrained.positions(model)
    trained = _json(folder / "sentence_bert_config.json").get("max_seq_length") or longest
    return model, tokenizer, min(longest, trained)


def _json(file):
    """{} where there is no such file."""
    file = pathlib.Path(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file}: cannot be read as JSON ({e})") from e
    return found if isinstance(found, dict) else {}


@torch.no_grad()
def embed(model, tokenizer, sentences, max_length=None, batch_size=32):
    """(N, C) fp32 on the CPU, rows of length 1; what is longer than max_length is cut. Neighbours in length share a batch."""
    device = next(model.parameters()).device
    max_length = max_length or pretrained.positions(model)
    encoded = [tokenizer.sequence(sentence, max_length=max_length) for sentence in sentences]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    found = torch.empty(len(encoded), model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = padded([encoded[i] for i in chosen], tokenizer.pad_id)
        batch = {name: t.to(device) for name, t in batch.items()}
        found[chosen] = model(**batch).float().cpu()
    return found


def rank(model, tokenizer, query, sentences, max_length=None):
    """[(cosine, number of the sentence)], the likest first."""
    vectors = embed(model, tokenizer, [query, *sentences], max_length)
    cosines = vectors[1:] @ vectors[0]
    return [(cosines[i].item(), i) for i in cosines.argsort(descending=True, stable=True).tolist()]


def lines(sentences, vectors):
    """A JSON object for each sentence: text, vector."""
    for sentence, vector in zip(sentences, vectors.tolist(), strict=True):
        yield json.dumps({"text": sentence, "vector": vector}, ensure_ascii=False)


def _write_lines(path, sentences, vectors):
    with replacing(path) as file:
        file.write_text("".join(f"{line}\n" for line in lines(sentences, vectors)), encoding="utf-8")


def _write_array(path, sentences, vectors):
    with replacing(path) as file, open(file, "wb") as stream:
        np.save(stream, vectors)


WRITERS = {".npy": _write_array, ".jsonl": _write_lines}
