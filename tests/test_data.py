"""Text into documents, documents into blocks, blocks into batches that can be taken up where they were left."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.recipes import data, masking, tokens

BYTES = types.SimpleNamespace(sep_id=257, encode=lambda text: list(text.encode()))


def test_python_has_text_enough_to_train_on():
    texts = data.documents()
    assert 1e6 < sum(len(t.encode()) for t in texts) < 5e6
    assert len(texts) > 100 and all(texts)
    assert any("dictionary" in t for t in texts)


def test_docstrings_come_in_the_order_of_the_source():
    source = '"""module"""\nclass A:\n    """A"""\n    def f(self):\n        """f"""\ndef g():\n    """g"""\n'
    assert list(data._docstrings(data.ast.parse(source))) == ["module", "A", "f", "g"]


def test_a_folder_is_a_document_a_file(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "second", "a.md": "first", "sub/c.rst": "third", "d.png": "no text"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "empty.txt").write_text(" \n")
    assert data.documents(tmp_path) == ["first", "second", "third"]
    assert data.documents(tmp_path / "b.txt") == ["second"]


def test_what_is_no_text_is_named(tmp_path):
    with pytest.raises(data.DataError, match="nowhere: there is no such file"):
        data.documents(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match="has no .txt, .md, .rst"):
        data.documents(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(data.DataError, match=r"a.txt: is not UTF-8 text \(byte 3\)"):
        data.documents(tmp_path)
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(data.DataError, match="holds no text"):
        data.documents(tmp_path)


@pytest.mark.parametrize("sizes", [[1000] * 60, [10, 100000], [5000], [3, 1], [100, 100, 4000, 10, 10]])
def test_split_loses_nothing_and_holds_out_its_share(sizes):
    texts = [(f"{i} line\n" * n)[:n] for i, n in enumerate(sizes)]
    kept, held = data.split(texts, 0.05, seed=1)
    assert sorted("".join(kept + held)) == sorted("".join(texts))
    share = sum(map(len, held)) / sum(sizes)
    assert abs(share - 0.05) < 0.03 or sum(sizes) < 100
    assert (kept, held) == data.split(texts, 0.05, seed=1)
    assert all(k for k in kept)


def test_split_of_nothing_held_out():
    assert data.split(["abc", "def"], 0.0) == (["abc", "def"], [])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 16))
def test_every_token_but_the_first_is_a_target_once(sizes, length):
    texts = [chr(97 + i) * n for i, n in enumerate(sizes)]
    stream = [t for text in texts for t in [*text.encode(), BYTES.sep_id]]
    if len(stream) <= length:
        with pytest.raises(data.DataError, match=f"one block of {length}"):
            data.Blocks(texts, BYTES, length)
        return
    blocks = data.Blocks(texts, BYTES, length)
    counted, previous = [], None
    for i in range(len(blocks)):
        b = blocks[i]
        assert {len(a) for a in b.values()} == {length}
        valid = b["targets"] != data.IGNORED
        assert (b["targets"][valid][:-1] == b["input_ids"][valid][1:]).all()
        counted += b["targets"][valid].tolist()
        for token, document in zip(b["input_ids"].tolist(), b["documents"].tolist(), strict=True):
            assert token in (BYTES.sep_id, 97 + document)
        previous = b
    assert counted == stream[1:] and previous is not None


def ten(**options):
    numbers = [{"x": np.array([i])} for i in range(10)]
    return data.Batches(numbers, **({"size": 3} | options))


def drawn(batches, n):
    return [next(batches)["x"].flatten().tolist() for _ in range(n)]


def test_an_epoch_has_every_sample_once_in_another_order():
    seen = sum(drawn(ten(), 10), [])
    assert all(sorted(seen[e * 10 : e * 10 + 10]) == list(range(10)) for e in range(3))
    assert seen[:10] != seen[10:20] and seen[:10] != sum(drawn(ten(seed=1), 4), [])[:10]


def test_batches_go_on_from_a_position():
    whole, later = drawn(ten(), 9), ten()
    later.position = 4 * 3
    assert drawn(later, 5) == whole[4:] and later.position == 9 * 3


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_what_one_process_would_draw(world):
    ranks = [drawn(ten(rank=r, world=world), 5) for r in range(world)]
    alone = drawn(ten(size=3 * world), 5)
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone


def test_what_is_random_about_a_sample_depends_on_nothing_else():
    def draw(sample, rng):
        return {"x": np.array([100 * sample["x"][0] + rng.integers(100)])}

    first = sum(drawn(ten(draw=draw), 10), [])
    other = sum(drawn(ten(draw=draw, size=5), 6), [])
    assert first == other and len({x % 100 for x in first[:10]}) > 3
    assert set(first[:10]) != set(first[10:20]), "an epoch has draws of its own"


def test_the_first_batch_over_and_over():
    batches = ten(only_first=True)
    assert len({tuple(x) for x in drawn(batches, 5)}) == 1 and batches.position == 5 * 3


@pytest.mark.parametrize("world, size", [(1, 3), (2, 3), (3, 2), (4, 3)])
def test_once_sees_every_sample_once(world, size):
    passes = [list(ten(rank=r, world=world, size=size).once()) for r in range(world)]
    assert len({len(p) for p in passes}) == 1, "all ranks take part in every batch"
    seen = [i for p in passes for batch, counts in p if counts for i in batch["x"].flatten().tolist()]
    assert sorted(seen) == list(range(10))
    few = [i for batch, _ in ten(size=2).once(limit=2) for i in batch["x"].flatten().tolist()]
    assert few == [0, 2, 5, 7]


def test_stack_makes_tensors():
    batch = next(data.Batches(data.Blocks(["abcdefgh"], BYTES, 4), 2))
    assert {name: (t.shape, t.dtype) for name, t in batch.items()} == dict.fromkeys(
        ("input_ids", "targets", "documents"), (torch.Size([2, 4]), torch.int64)
    )


def test_packed_documents_have_their_bounds():
    blocks = data.Blocks(["abc", "defgh", "ijklmnop"], BYTES, 6)  # 4 + 6 + 9 tokens with their ends
    batch = data.packed([blocks[i] for i in range(3)])
    assert batch["cu_seqlens"].tolist() == [0, 4, 6, 10, 12, 18] and batch["cu_seqlens"].dtype == torch.int32
    assert batch.keys() == {"input_ids", "targets", "cu_seqlens"}
    assert "cu_seqlens" not in data.packed([blocks[2]])


def test_no_samples_is_an_error():
    with pytest.raises(data.DataError, match="no samples"):
        data.Batches([], 2)


# Masked tokens and next sentences.

LINES = ["\n".join(f"Document {d}, line {i}: words of some length." for i in range(12)) for d in range(5)]


def covered(whole_words=False, n=4000, words=None):
    words = np.repeat(np.arange(n // 4), 4) if words is None else words
    ids = np.arange(n) % 90 + 10
    ids[words < 0] = 3
    found, targets = masking.cover(ids, words, np.random.default_rng(0), 4, np.arange(10, 100), whole_words)
    return ids, found, targets, targets != data.IGNORED


@pytest.mark.parametrize("whole_words", [False, True])
def test_15_percent_are_covered_80_10_10(whole_words):
    ids, found, targets, chosen = covered(whole_words)
    assert chosen.sum() == 600 and (targets[chosen] == ids[chosen]).all()
    assert (found[~chosen] == ids[~chosen]).all()
    masked, same = (found[chosen] == 4).mean(), (found[chosen] == ids[chosen]).mean()
    assert abs(masked - 0.8) < 0.05 and abs(same - 0.1) < 0.04 and abs(1 - masked - same - 0.1) < 0.04
    per_word = chosen.reshape(-1, 4).sum(1)
    assert set(per_word.tolist()) == ({0, 4} if whole_words else {0, 1, 2, 3, 4})


def test_special_tokens_are_never_covered():
    words = np.where(np.arange(4000) % 3 == 0, -1, np.arange(4000) // 3)
    ids, found, targets, chosen = covered(words=words)
    assert not chosen[words < 0].any() and (found[words < 0] == 3).all() and chosen.sum() == 400


@pytest.mark.parametrize("whole_words", [False, True])
def test_something_is_always_covered(whole_words):
    assert covered(whole_words, 3, np.array([-1, 0, 0]))[3].sum() == (2 if whole_words else 1)
    lengths = np.repeat([0, 1, 2], [1, 30, 9])  # a word too long for the share stays, where others fit
    sizes = [masking._whole_words(lengths, 6, np.random.default_rng(seed)).size for seed in range(30)]
    assert set(sizes) == {1, 9, 30}


def test_pairs_continue_or_come_from_elsewhere():
    pairs = masking.Pairs(LINES, tokens.Bytes(), 128)
    labels = []
    for _, sample in zip(range(300), data.Batches(pairs, 1, draw=pairs.draw), strict=False):
        ids, targets, kinds, mask = (
            sample[name][0].numpy() for name in ("input_ids", "targets", "token_type_ids", "attention_mask")
        )
        n = mask.sum()
        assert mask[:n].all() and (ids[n:] == 256).all() and (targets[n:] == data.IGNORED).all()
        whole = np.where(targets != data.IGNORED, targets, ids)[:n].tolist()
        assert whole[0] == 257 and whole[-1] == 258 and whole.count(258) == 2
        end = whole.index(258)
        assert kinds[:n].tolist() == [0] * (end + 1) + [1] * (n - end - 1) and not kinds[n:].any()
        a, b = bytes(whole[1:end]).decode(), bytes(whole[end + 1 : -1]).decode()
        label = sample["next_sentence"].item()
        assert any(a + b in text for text in LINES) == (label == 0)
        if label:
            assert not any(a in text and b in text for text in LINES), "elsewhere is another document"
        labels.append(label)
    assert 0.4 < np.mean(labels) < 0.6


def test_pairs_of_a_single_document():
    pairs = masking.Pairs(["".join(f"line {i}\n" for i in range(200))], tokens.Bytes(), 64)
    for i in range(50):
        first = pairs[i]
        found = {pairs._elsewhere(first, np.random.default_rng(seed)) for seed in range(50)}
        assert not {first, first + 1} & found and len(found) > 10


def test_long_lines_are_cut_and_lose_nothing():
    text = "x" * 1000 + "\nshort\n" + "y z " * 100
    stretches = list(masking._stretches(text, tokens.Bytes(), 60))
    assert bytes(np.concatenate([ids for ids, _ in stretches]).tolist()).decode() == text
    assert max(len(ids) for ids, _ in stretches) == 60
    for _, words in stretches:
        assert (np.diff(words) >= 0).all()


def test_pairs_that_cannot_be():
    with pytest.raises(data.DataError, match="too few for pairs"):
        masking.Pairs(["short"], tokens.Bytes(), 128)
    with pytest.raises(data.DataError, match="no room for two texts"):
        masking.Pairs(LINES, tokens.Bytes(), 4)
    bare = types.SimpleNamespace(name="GPT-2's", special={"cls": None, "sep": 1, "mask": None})
    with pytest.raises(data.DataError, match="GPT-2's has no cls, mask token"):
        masking.Pairs(LINES, bare, 128)
