"""Text into documents, documents into blocks, blocks into batches that can be taken up where they were left."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.recipes import data

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
    assert first == other
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


def test_no_samples_is_an_error():
    with pytest.raises(data.DataError, match="no samples"):
        data.Batches([], 2)
