"""Scores of a checkpoint on data: what `fastattn eval` runs.

found = evaluate("folder", data="reviews.csv")      {"task": "classify", "examples": 500, "accuracy": 0.93, "f1": 0.92}
"""

import math

import torch

from fastattn.recipes import data as texts
from fastattn.recipes import examples, loop, metrics, parallel, pretrained
from fastattn.recipes.tasks import TASKS, task_for

LM = "lm"


def evaluate(path, task=None, data=None, tokenizer=None, device="cpu", max_length=None, batch=32):
    """task: what the checkpoint's head was trained for if None, and lm (perplexity, bits per byte) for a GPT without one.

    data: for lm a text, else rows as in recipes.examples; None takes Python's documentation, or examples made up.
    """
    _, kind, config = pretrained.described(path)
    task = task or pretrained.trained_task(config) or (LM if kind == "gpt" else None)
    if task not in (LM, *TASKS):
        given = f"task {task!r}" if task else f"{path} has no head that was trained for a task"
        raise ValueError(f"{given}: need one of {', '.join((LM, *TASKS))}")
    if task == LM:
        return {"task": LM} | _likelihood(path, data, tokenizer, torch.device(device), max_length, batch)
    model, tokenizer = pretrained.opened(path, task, tokenizer)
    rows = examples.read(data, task) if data else examples.made(task, 300, seed=1, held_out=True)
    length = min(max_length or 384, pretrained.positions(model))
    doing = task_for(task, tokenizer, length, pretrained.labels_in(config), pretrained.has_types(model))
    scores = doing.scores(doing.predict(model.to(device), rows), rows)
    return {"task": task, "examples": len(rows)} | scores


def _likelihood(path, data, tokenizer, device, length, batch):
    """Of the text in blocks, each read by itself: a block's first tokens have little before them, so this is an upper bound."""
    model, tokenizer = pretrained.opened(path, LM, tokenizer)
    documents = texts.documents(data)
    blocks = texts.Blocks(documents, tokenizer, min(length or math.inf, pretrained.positions(model)))
    batches = texts.Batches(blocks, batch)
    loss = loop.evaluate(model.to(device), batches, parallel.Processes(device))["loss"]
    predicted, n_bytes = len(blocks.tokens) - 1, sum(len(text.encode()) for text in documents)
    return {
        "tokens": predicted,
        "bytes": n_bytes,
        "perplexity": metrics.perplexity(loss * predicted, predicted),
        "bits_per_byte": metrics.bits_per_byte(loss * predicted, n_bytes),
    }
