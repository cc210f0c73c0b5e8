"""Metrics against values computed by hand and against the plainest form of each definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn.recipes import metrics

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def test_by_hand():
    predicted, expected = [1, 1, 0, 0, 1, 2], [1, 0, 0, 1, 1, 1]
    assert metrics.accuracy(predicted, expected) == 3 / 6
    # label 1: 2 right, 1 too many, 2 missed; label 0: 1, 1, 1; label 2: 0, 1, 0
    assert metrics.f1(predicted, expected, "binary") == pytest.approx(4 / 7)
    assert metrics.f1(predicted, expected, "binary", positive=0) == pytest.approx(2 / 4)
    assert metrics.f1(predicted, expected, "macro") == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    assert metrics.f1(predicted, expected, "micro") == pytest.approx(1 / 2)
    assert metrics.f1(["no"], ["no"], "binary", positive="yes") == 0.0


@given(LABELS)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pairs):
    predicted, expected = map(list, zip(*pairs, strict=True))
    scores = []
    for label in sorted(set(predicted) | set(expected)):
        hits = sum(p == e == label for p, e in pairs)
        precision, recall = (hits / max(side.count(label), 1) for side in (predicted, expected))
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
        assert metrics.f1(predicted, expected, "binary", label) == pytest.approx(scores[-1])
    assert metrics.f1(predicted, expected) == pytest.approx(sum(scores) / len(scores))
    assert metrics.f1(predicted, expected, "micro") == pytest.approx(metrics.accuracy(predicted, expected))


@pytest.mark.parametrize(
    "tags, expected",
    [
        ("", set()),
        ("O O O", set()),
        ("B-P I-P O B-L", {("P", 0, 2), ("L", 3, 4)}),
        ("B-P B-P I-P", {("P", 0, 1), ("P", 1, 3)}),
        ("B-P I-L I-L", {("P", 0, 1), ("L", 1, 3)}),  # I- of another kind begins a span
        ("I-P I-P O I-P", {("P", 0, 2), ("P", 3, 4)}),
        ("O B-P-X I-P-X", {("P-X", 1, 3)}),
    ],
)
def test_spans(tags, expected):
    assert metrics.spans(tags.split()) == expected


def test_span_scores_by_hand():
    expected = ["B-P I-P O B-L".split(), "O B-P O".split()]
    # one right of four; wrong kind, wrong end, none there
    predicted = ["B-P I-P O B-P".split(), "B-P B-P I-P".split()]
    scores = metrics.span_scores(predicted, expected)
    assert scores == pytest.approx(dict(precision=1 / 4, recall=1 / 3, f1=2 / 7))
    assert metrics.span_scores(expected, expected) == dict(precision=1, recall=1, f1=1)
    assert metrics.span_scores([["O", "O"]], [["O", "B-P"]]) == dict(precision=0, recall=0, f1=0)


@given(st.lists(st.sampled_from(["O", "B-P", "I-P", "B-L", "I-L"]), max_size=12))
def test_spans_run_from_a_beginning_to_the_next(tags):
    def begins(i):
        before = tags[i - 1] if i else "O"
        return tags[i] != "O" and (tags[i][0] == "B" or before[1:] != tags[i][1:])

    found = set()
    for i in filter(begins, range(len(tags))):
        end = next((j for j in range(i + 1, len(tags)) if tags[j] == "O" or begins(j)), len(tags))
        found.add((tags[i][2:], i, end))
    assert metrics.spans(tags) == found


def test_answers_by_hand():
    assert metrics.normalised(" The  Cat's (an) 3.5 hats! ") == "cats 35 hats"
    assert metrics.normalised("theatre another") == "theatre another"
    assert metrics.exact_match("the Cat.", ["dog", "cat"]) == 1.0
    assert metrics.exact_match("cats", ["cat"]) == 0.0
    assert metrics.exact_match("", []) == 1.0 == metrics.token_f1("", [])
    assert metrics.token_f1("x", []) == 0.0
    # {big, black, cat} and {black, cat, sat, down}: 2 common words, 2 * 2 / (3 + 4)
    assert metrics.token_f1("a big black cat", ["black cat sat down", "dog"]) == pytest.approx(4 / 7)
    assert metrics.token_f1("cat cat", ["cat"]) == pytest.approx(2 / 3)
    assert metrics.token_f1("cat cat dog", ["cat cat bird"]) == pytest.approx(4 / 6)
    assert metrics.token_f1("", ["cat"]) == 0.0


def test_likelihoods_by_hand():
    nll = 10 * math.log(256)  # ten tokens, each one of 256 equally likely
    assert metrics.perplexity(nll, 10) == pytest.approx(256)
    assert metrics.bits_per_byte(nll, 10) == pytest.approx(8)
    assert metrics.bits_per_byte(nll, 20) == pytest.approx(4)
    assert metrics.perplexity(1e6, 1) == math.inf


def test_lengths_must_match():
    for metric in (metrics.accuracy, metrics.f1):
        with pytest.raises(ValueError, match="2 predictions for 1"):
            metric([1, 2], [1])
    with pytest.raises(ValueError, match="predictions"):
        metrics.span_scores([["O"]], [["O", "O"]])
    with pytest.raises(ValueError, match="weighted"):
        metrics.f1([1], [1], "weighted")
