"""What a model is fine-tuned for: how rows become samples, samples a batch and a loss, logits an answer, answers a score.

Every task has samples(rows), collate(samples), loss(model, batch), targets(batch), predict(model, rows), scores(predicted,
rows), and trivial(learned, rows): the answers of someone who has counted the rows to learn from and reads nothing. Rows
are those of recipes.examples.
"""

import collections

import torch

from fastattn.recipes import chat, metrics
from fastattn.recipes.data import IGNORED, DataError
from fastattn.recipes.tokens import padded, table

LONGEST_ANSWER = 30  # pieces of a predicted span


class Classify:
    """The label of a text, or of two texts together: logits (B, labels). Scores: accuracy, macro F1."""

    name = "classify"

    def __init__(self, tokenizer, max_length, labels, types=True):
        """types: whether the model has token_type_ids, as BERT and not a GPT."""
        self.tokenizer, self.max_length, self.labels, self.types = tokenizer, max_length, labels, types

    @staticmethod
    def labels_of(rows):
        return sorted({row["label"] for row in rows})

    def batch(self, sequences):
        batch = padded(sequences, self.tokenizer.pad_id)
        if not self.types:
            del batch["token_type_ids"]
        return batch

    def sequences(self, rows):
        return [self.tokenizer.sequence(row["text"], row.get("text_b"), self.max_length) for row in rows]

    def samples(self, rows):
        numbers = _numbers((row["label"] for row in rows), self.labels)
        return list(zip(self.sequences(rows), numbers, strict=True))

    def collate(self, samples):
        sequences, labels = zip(*samples, strict=True)
        return self.batch(sequences) | {"labels": torch.tensor(labels)}

    def loss(self, model, batch):
        return {"loss": _call(model, batch, labels=batch["labels"])[1]}

    def targets(self, batch):
        return {"loss": len(batch["labels"])}

    def predict(self, model, rows):
        found = _each(model, self.sequences(rows), self.batch)
        return [self.labels[logits.argmax()] for logits in found]

    def scores(self, predicted, rows):
        expected = [row["label"] for row in rows]
        return {"accuracy": metrics.accuracy(predicted, expected), "f1": metrics.f1(predicted, expected)}

    def trivial(self, learned, rows):
        return [_commonest(row["label"] for row in learned)] * len(rows)


class Tokens:
    """A tag for each word, read off its first piece: logits (B, T, tags). Scores: accuracy; F1 of spans if tags are O, B-, I-."""

    name = "tokens"

    def __init__(self, tokenizer, max_length, labels):
        self.tokenizer, self.max_length, self.labels = tokenizer, max_length, labels

    def batch(self, sequences):
        return padded(sequences, self.tokenizer.pad_id)

    @staticmethod
    def labels_of(rows):
        return sorted({tag for row in rows for tag in row["tags"]})

    def sequences(self, rows):
        return [self.tokenizer.words(row["tokens"], self.max_length) for row in rows]

    def samples(self, rows):
        found = []
        for row, sequence in zip(rows, self.sequences(rows), strict=True):
            targets = [IGNORED] * len(sequence)
            numbers = _numbers(row["tags"], self.labels)
            for word, at in _first_pieces(sequence).items():
                targets[at] = numbers[word]
            found.append((sequence, targets))
        return found

    def collate(self, samples):
        sequences, targets = zip(*samples, strict=True)
        return self.batch(sequences) | {"labels": table(targets, IGNORED)}

    def loss(self, model, batch):
        return {"loss": _call(model, batch, labels=batch["labels"])[1]}

    def targets(self, batch):
        return {"loss": int((batch["labels"] != IGNORED).sum())}

    def predict(self, model, rows):
        """Words that max_length has cut off, and words without a piece, have the tag O, or else the first."""
        beyond = "O" if "O" in self.labels else self.labels[0]
        sequences = self.sequences(rows)
        found = []
        for row, sequence, logits in zip(rows, sequences, _each(model, sequences, self.batch), strict=True):
            best = logits.argmax(-1).tolist()
            first = _first_pieces(sequence)
            found.append(
                [self.labels[best[first[i]]] if i in first else beyond for i in range(len(row["tokens"]))]
            )
        return found

    def scores(self, predicted, rows):
        expected = [row["tags"] for row in rows]
        flat = [[tag for tags in side for tag in tags] for side in (predicted, expected)]
        found = {"accuracy": metrics.accuracy(*flat)}
        if all(tag == "O" or tag[:2] in ("B-", "I-") for tag in flat[1]):
            found |= metrics.span_scores(predicted, expected)
        else:
            found["f1"] = metrics.f1(*flat)
        return found

    def trivial(self, learned, rows):
        """Each word's commonest tag, the commonest of all for new words."""
        seen = collections.defaultdict(list)
        for row in learned:
            for word, tag in zip(row["tokens"], row["tags"], strict=True):
                seen[word].append(tag)
        usual = {word: _commonest(tags) for word, tags in seen.items()}
        rest = _commonest(tag for tags in seen.values() for tag in tags)
        return [[usual.get(word, rest) for word in row["tokens"]] for row in rows]


def _first_pieces(sequence):
    """{word: where its first piece is}."""
    found = {}
    for at, word in enumerate(sequence.word_ids):
        if word is not None:
            found.setdefault(word, at)
    return found


class Answer:
    """The span of the context that answers the question: logits (B, T) of first and of last piece. Scores: EM, F1.

    A context longer than max_length is read in windows that share `overlap` pieces. A window without the answer has its
    first position as the target, which stands for none.
    """

    name = "qa"
    labels = None

    def __init__(self, tokenizer, max_length, labels=None, overlap=32):
        self.tokenizer, self.max_length, self.overlap = tokenizer, max_length, overlap

    def batch(self, sequences):
        return padded(sequences, self.tokenizer.pad_id)

    def windows(self, row):
        return self.tokenizer.windows(row["question"], row["context"], self.max_length, self.overlap)

    def samples(self, rows):
        found = []
        for row in rows:
            answers = row["answers"]
            span = None
            if answers["text"]:
                start = answers["answer_start"][0]
                span = start, start + len(answers["text"][0])
            found += [(window, *_positions(window, span)) for window in self.windows(row)]
        return found

    def collate(self, samples):
        windows, first, last = zip(*samples, strict=True)
        return self.batch(windows) | {
            "first": torch.tensor(first),
            "last": torch.tensor(last),
        }

    def loss(self, model, batch):
        ends = {"start_positions": batch["first"], "end_positions": batch["last"]}
        return {"loss": _call(model, batch, **ends)[1]}

    def targets(self, batch):
        return {"loss": len(batch["first"])}

    def predict(self, model, rows):
        """The likeliest span of all windows; none, where that is likelier, if some of the rows have no answer."""
        may_lack = any(not row["answers"]["text"] for row in rows)
        windows = [(row, window) for row in rows for window in self.windows(row)]
        logits = _each(model, [window for _, window in windows], self.batch)
        best = {}
        for (row, window), found in zip(windows, logits, strict=True):
            score, start, end, none = _best_span(window, found)
            top = best.setdefault(id(row), [-torch.inf, 0, 0, torch.inf])
            top[3] = min(top[3], none)
            if score > top[0]:
                top[:3] = score, start, end
        answers = []
        for row in rows:
            score, start, end, none = best[id(row)]
            answers.append("" if may_lack and none > score else row["context"][start:end].strip())
        return answers

    def scores(self, predicted, rows):
        right = [row["answers"]["text"] for row in rows]
        return {
            name: sum(map(metric, predicted, right)) / len(rows)
            for name, metric in (("exact_match", metrics.exact_match), ("f1", metrics.token_f1))
        }

    def trivial(self, learned, rows):
        return [_commonest(text for row in learned for text in row["answers"]["text"] or ("",))] * len(rows)


def _positions(window, span):
    """(first, last) piece of the characters span in the window's context; (0, 0) unless all of it is there."""
    shown = [i for i, part in enumerate(window.parts) if part == 1]
    if span is None or not shown:
        return 0, 0
    inside = [i for i in shown if window.offsets[i][0] < span[1] and window.offsets[i][1] > span[0]]
    whole = window.offsets[shown[0]][0] <= span[0] and window.offsets[shown[-1]][1] >= span[1]
    return (inside[0], inside[-1]) if inside and whole else (0, 0)


def _best_span(window, logits):
    """(score, start, end in characters of the context, score of no answer)."""
    first, last = logits.float().unbind(-1)
    none = (first[0] + last[0]).item()
    shown = torch.tensor([part == 1 for part in window.parts])
    if not shown.any():
        return -torch.inf, 0, 0, none
    first, last = (side.masked_fill(~shown, -torch.inf) for side in (first, last))
    scores = first[:, None] + last[None, :]
    near = torch.ones_like(scores, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    at = scores.masked_fill(~near, -torch.inf).argmax().item()
    a, b = divmod(at, len(last))
    return scores[a, b].item(), window.offsets[a][0], window.offsets[b][1], none


class Instruct:
    """The assistant's answers, token by token: a GPT's loss over them alone. Scores: EM and F1 of the last answer, perplexity.

    The prompt's targets are ignored, so that the loss is the cross-entropy of the answers' tokens, their end included.
    """

    name = "instruct"
    labels = None

    def __init__(self, tokenizer, max_length, labels=None, longest=64, pack=False):
        """longest: of the answers that are generated to be scored. pack: a batch's conversations lie one behind the other,
        without padding, and do not see each other."""
        self.tokenizer, self.max_length, self.longest, self.pack = tokenizer, max_length, longest, pack
        chat.end(tokenizer)

    def samples(self, rows):
        """(ids, targets): targets[t] is the token after ids[t] if it is the assistant's. What lies beyond max_length is cut."""
        found = []
        for row in rows:
            ids, theirs = chat.encode(self.tokenizer, row["messages"])
            targets = [i if assistant else IGNORED for i, assistant in zip(ids, theirs, strict=True)]
            ids, targets = ids[:-1][: self.max_length], targets[1:][: self.max_length]
            if any(t != IGNORED for t in targets):
                found.append((ids, targets))
        if not found:
            raise DataError(
                f"no answer begins within {self.max_length} tokens: need a larger max_length or shorter prompts"
            )
        return found

    def collate(self, samples):
        ids, targets = zip(*samples, strict=True)
        if self.pack:
            flat = [torch.tensor([[i for row in rows for i in row]]) for rows in (ids, targets)]
            ends = torch.tensor([0, *map(len, ids)]).cumsum(0, dtype=torch.int32)
            return {"input_ids": flat[0], "targets": flat[1], "cu_seqlens": ends}
        return {"input_ids": table(ids, self.tokenizer.pad_id), "targets": table(targets, IGNORED)}

    def loss(self, model, batch):
        where = {"cu_seqlens": batch["cu_seqlens"]} if self.pack else {}
        return {"loss": model(batch["input_ids"], batch["targets"], **where)[1]}

    def targets(self, batch):
        return {"loss": int((batch["targets"] != IGNORED).sum())}

    def predict(self, model, rows):
        return chat.replies(model, self.tokenizer, [_asked(row) for row in rows], self.longest)

    def scores(self, predicted, rows):
        right = [[row["messages"][_last_answer(row)]["content"]] for row in rows]
        return {
            name: sum(map(metric, predicted, right)) / len(rows)
            for name, metric in (("exact_match", metrics.exact_match), ("f1", metrics.token_f1))
        }

    def trivial(self, learned, rows):
        return [_commonest(row["messages"][_last_answer(row)]["content"] for row in learned)] * len(rows)


def _last_answer(row):
    return max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")


def _asked(row):
    return row["messages"][: _last_answer(row)]


TASKS = {task.name: task for task in (Classify, Tokens, Answer, Instruct)}


def task_for(name, tokenizer, max_length, labels, types=True, overlap=32, pack=False):
    """The task of a name; types: whether the model has token_type_ids; overlap: of the windows of qa; pack: see Instruct."""
    more = {"classify": {"types": types}, "qa": {"overlap": overlap}, "instruct": {"pack": pack}}
    return TASKS[name](tokenizer, max_length, labels, **more.get(name, {}))


def _numbers(labels, known):
    number = {label: i for i, label in enumerate(known)}
    labels = list(labels)
    for label in labels:
        if label not in number:
            raise DataError(f"label {label!r} is none of the model's: {', '.join(known[:20])}")
    return [number[label] for label in labels]


def _commonest(things):
    return collections.Counter(things).most_common(1)[0][0]


def _call(model, batch, **labels):
    inputs = {
        name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch
    }
    if "token_type_ids" in batch:  # a BERT, which takes padding out: on a CPU that costs more than it saves
        inputs["unpad"] = batch["input_ids"].is_cuda
    return model(**inputs, **labels)


@torch.no_grad()
def _each(model, sequences, batch_of, batch_size=32):
    """The logits of each sequence, on the CPU and without its padding; neighbours in length share a batch."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = batch_of([sequences[i] for i in chosen])
            logits, _ = _call(model, {name: t.to(device) for name, t in batch.items()})
            logits = logits.cpu() if torch.is_tensor(logits) else torch.stack(logits, -1).cpu()
            for i, row in zip(chosen, logits, strict=True):
                found[i] = row[: len(sequences[i])] if row.dim() == 2 else row
    finally:
        model.train(training)
    return found
