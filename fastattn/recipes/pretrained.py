"""Models for the recipes: opened from a folder or fresh, under the head that a task needs, and kept with their tokenizer.

A folder is a checkpoint in transformers' layout, GPT-2's or BERT's, or the folder of a run, whose last checkpoint counts.
"""

import dataclasses
import warnings

from fastattn.models import bert, checkpoint, gpt
from fastattn.models.checkpoint import CONFIG, CheckpointError
from fastattn.recipes import runs, tokens

KINDS = {
    "gpt2": "gpt",
    "openai-gpt": "gpt",
    gpt.OURS: "gpt",
    "bert": "bert",
}  # a checkpoint's model_type and ours
WHOLE = {("gpt", use): gpt.GPT for use in ("lm", "generate", "instruct")}  # without a head of their own
WHOLE[("bert", "embed")] = bert.BERTForSentenceEmbedding
HEADS = {
    ("gpt", "classify"): gpt.GPTForSequenceClassification,
    ("bert", "classify"): bert.BERTForSequenceClassification,
    ("bert", "tokens"): bert.BERTForTokenClassification,
    ("bert", "qa"): bert.BERTForQuestionAnswering,
}
TRAINED = {
    "GPT2ForSequenceClassification": "classify",
    "OpenAIGPTForSequenceClassification": "classify",
    "GPTForSequenceClassification": "classify",  # of a GPT that transformers has not
    "BertForSequenceClassification": "classify",
    "BertForTokenClassification": "tokens",
    "BertForQuestionAnswering": "qa",
}


def model_class(kind, task):
    classes = HEADS | WHOLE
    if (kind, task) not in classes:
        able = " or ".join(f"a {k}" for k, t in classes if t == task)
        raise ValueError(f"{task} needs {able}, this model is a {kind}")
    return classes[kind, task]


def described(path):
    """(folder, kind, config.json) of a checkpoint."""
    folder = runs.newest(path)
    config, _ = checkpoint.read(folder)
    kind = KINDS.get(config.get("model_type"))
    if kind is None:
        raise CheckpointError(
            f"{folder / CONFIG}: model_type is {config.get('model_type')!r}, need one of {', '.join(KINDS)}"
        )
    return folder, kind, config


def trained_task(config):
    """The task whose head a checkpoint was saved with; None if it has none of ours."""
    return next((TRAINED[name] for name in config.get("architectures") or () if name in TRAINED), None)


def labels_in(config):
    """The labels of a head, in the order of its logits."""
    found = config.get("id2label") or {}
    return [found[i] for i in sorted(found, key=int)]


def opened(path, task, tokenizer=None):
    """(model, tokenizer) of a checkpoint that was trained for the task."""
    folder, kind, config = described(path)
    cls = model_class(kind, task)
    if (kind, task) in HEADS and trained_task(config) != task:
        raise CheckpointError(
            f"{folder}: was not trained for {task}; `fastattn finetune {task} --model {path}` does that"
        )
    model = _read(cls, folder)
    return model, tokens.beside(folder, model.config.vocab_size, tokenizer)


def started(path, task, labels=None, tokenizer=None):
    """(model, tokenizer) of a checkpoint to fine-tune. A head that was trained for the same labels is kept, others start anew."""
    folder, kind, config = described(path)
    cls = model_class(kind, task)
    if (kind, task) in WHOLE or (trained_task(config) == task and labels in (None, labels_in(config))):
        model = _read(cls, folder)
    else:
        trunk = _read(gpt.GPT if kind == "gpt" else bert.BERT, folder)
        model = cls(_with_labels(trunk.config, labels))
        # all of it but a pooler that this task does not use; what is left as it was is the head
        (model if kind == "gpt" else model.bert).load_state_dict(trunk.state_dict(), strict=False)
    return model, tokens.beside(folder, model.config.vocab_size, tokenizer)


def fresh(kind, size, task, tokenizer, labels=None, length=None, dropout=0.0):
    """A model with random weights for the tokenizer's ids; length: its positions, if not the size's own."""
    sizes = {"gpt": gpt.SIZES, "bert": bert.SIZES}[kind]
    if size not in sizes:
        raise ValueError(f"--size {size}: need one of {', '.join(sizes)}")
    fields = dict(sizes[size])
    # rows beyond the tokenizer's are never used; multiples of 64 make products faster on a GPU
    vocab_size = tokenizer.vocab_size if tokenizer.vocab_size < 1024 else -(-tokenizer.vocab_size // 64) * 64
    if kind == "gpt":
        fields |= dict(vocab_size=vocab_size, dropout=dropout)
        fields |= dict(eos_token_id=tokenizer.sep_id, pad_token_id=tokenizer.pad_id)
        fields |= {"n_positions": length} if length else {}
        config = gpt.GPTConfig(**fields)
    else:
        fields |= dict(vocab_size=vocab_size, pad_token_id=tokenizer.pad_id)
        fields |= dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        fields |= {"max_position_embeddings": length} if length else {}
        config = bert.BERTConfig(**fields)
    return model_class(kind, task)(_with_labels(config, labels))


def positions(model):
    """The longest sequence a model reads."""
    config = model.config
    return config.n_positions if hasattr(config, "n_positions") else config.max_position_embeddings


def has_types(model):
    """Whether it tells two texts apart by token_type_ids."""
    return hasattr(model.config, "type_vocab_size")


def save(model, folder, tokenizer):
    """The checkpoint, and its tokenizer beside it."""
    model.save_pretrained(folder)
    tokenizer.save(folder)


def _read(cls, folder):
    with warnings.catch_warnings():
        # a pooler that is not used, or a head about to be trained
        warnings.filterwarnings("ignore", message="(?s).*which starts? anew")
        return cls.from_pretrained(folder).eval()


def _with_labels(config, labels):
    if not labels:
        return config
    return dataclasses.replace(config, num_labels=len(labels), id2label=dict(enumerate(labels)))
