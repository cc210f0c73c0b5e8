"""Scores: accuracy, F1 of labels, of spans and of answers, exact match, perplexity, bits per byte.

With true positives TP, false positives FP and false negatives FN, F1 = 2 TP / (2 TP + FP + FN), 0 where that is 0 / 0.
Labels, tags and answers are sequences of equal length, what was predicted first and what is right second.
"""

import collections
import math
import re
import string


def accuracy(predicted, expected):
    """The share of labels that are right."""
    _same_length(predicted, expected)
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / max(len(expected), 1)


def f1(predicted, expected, average="macro", positive=1):
    """binary: F1 of the label `positive`; macro: the mean over all labels seen; micro: from the counts of all of them."""
    _same_length(predicted, expected)
    right, wrong, missed = (collections.Counter() for _ in range(3))
    for p, e in zip(predicted, expected, strict=True):
        if p == e:
            right[e] += 1
        else:
            wrong[p] += 1
            missed[e] += 1
    if average == "binary":
        return _f1(right[positive], wrong[positive], missed[positive])
    if average == "micro":
        return _f1(right.total(), wrong.total(), missed.total())
    if average != "macro":
        raise ValueError(f"f1: average {average!r}, need binary, macro or micro")
    labels = right.keys() | wrong.keys() | missed.keys()
    return sum(_f1(right[k], wrong[k], missed[k]) for k in labels) / max(len(labels), 1)


def spans(tags):
    """{(kind, first, last + 1)} of a sentence's tags B-kind, I-kind, O.

    I- continues a span of its own kind and begins one anywhere else, as the CoNLL script has it.
    """
    found, kind, start = set(), None, 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, of = tag.partition("-")
        if kind is not None and (prefix != "I" or of != kind):
            found.add((kind, start, i))
            kind = None
        if prefix in ("B", "I") and kind is None:
            kind, start = of, i
    return found


def span_scores(predicted, expected):
    """precision, recall and f1 over the spans of all sentences; each argument is a list of lists of tags.

    A span counts if its kind and both ends are right.
    """
    _same_length(predicted, expected)
    right = wrong = missed = 0
    for p, e in zip(predicted, expected, strict=True):
        _same_length(p, e)
        p, e = spans(p), spans(e)
        right, wrong, missed = right + len(p & e), wrong + len(p - e), missed + len(e - p)
    return {
        "precision": right / (right + wrong) if right + wrong else 0.0,
        "recall": right / (right + missed) if right + missed else 0.0,
        "f1": _f1(right, wrong, missed),
    }


def normalised(answer):
    """SQuAD's form of an answer: lower case, without punctuation, without a, an, the, single spaces."""
    kept = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(predicted, answers):
    """1.0 if the prediction is one of the right answers, after normalisation. No answers: right is to say nothing."""
    return float(any(normalised(predicted) == normalised(a) for a in answers or ("",)))


def token_f1(predicted, answers):
    """F1 of the words of the prediction against the nearest of the right answers, words counted as often as they occur."""
    return max(_word_f1(normalised(predicted).split(), normalised(a).split()) for a in answers or ("",))


def _word_f1(predicted, expected):
    if not predicted or not expected:
        return float(predicted == expected)
    common = (collections.Counter(predicted) & collections.Counter(expected)).total()
    return _f1(common, len(predicted) - common, len(expected) - common)


def perplexity(nll, tokens):
    """exp(nll / tokens), nll the sum of -ln p over that many tokens; inf where that overflows."""
    try:
        return math.exp(nll / max(tokens, 1))
    except OverflowError:
        return math.inf


def bits_per_byte(nll, n_bytes):
    """nll / (n_bytes ln 2): comparable between tokenizers, which perplexity is not."""
    return nll / (max(n_bytes, 1) * math.log(2))


def _f1(right, wrong, missed):
    return 2 * right / (2 * right + wrong + missed) if right + wrong + missed else 0.0


def _same_length(predicted, expected):
    if len(predicted) != len(expected):
        raise ValueError(f"{len(predicted)} predictions for {len(expected)} labels: need as many")
