"""Fine-tuning: every task is learned, from the data's columns to scores; what its targets are; what is refused."""

import csv
import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from fastattn import cli
from fastattn.recipes import chat, examples, finetune, pretrained, tasks, tokens
from fastattn.recipes.data import DataError

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

# Steps enough for each, and scores that leave room: they reach 0.97 to 1.
STEPS = {"classify": 250, "tokens": 150, "qa": 500, "instruct": 300}
NEEDED = {"classify": {"accuracy": 0.9, "f1": 0.9}, "tokens": {"f1": 0.9}, "qa": {"exact_match": 0.8},
          "instruct": {"exact_match": 0.8}}  # fmt: skip


def fastattn(*args, stdin=None):
    return CliRunner().invoke(cli.app, [str(a) for a in args], input=stdin)


def run(task, out, *options):
    done = fastattn("finetune", task, "--out", out, "--device", "cpu", "--log-every", "1000", *options)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tests run side by side, and tiny products gain nothing
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_is_learned(task, tmp_path):
    done = run(task, tmp_path, "--steps", STEPS[task])
    found = json.loads((tmp_path / finetune.SCORES).read_text())
    for name, needed in NEEDED[task].items():
        assert found["scores"][name] > needed, done.output
        assert found["trivial"][name] < 0.7
        assert f"{found['scores'][name]:.4f}" in done.output
    named = ["--task", task] if task == "instruct" else []  # it has no head that would tell
    again = fastattn("eval", tmp_path, *named, "--json", tmp_path / "again.json", "--device", "cpu")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "again.json").read_text()) == {
        "task": task, "examples": found["examples"], **found["scores"]
    }  # fmt: skip
    if task == "instruct":
        asked = [
            "Name the opposite of hot.",
            "/new",
            "What is a young cow called?",
            "Name the capital of Peru.",
        ]
        talk = fastattn("chat", tmp_path, "--temperature", 0, "--device", "cpu", stdin="\n".join(asked))
        assert talk.exit_code == 0 and talk.output.split() == ["cold", "calf", "Lima"], talk.output


def test_made_examples_are_the_same_every_time_and_none_is_held_out_and_learned():
    for task in tasks.TASKS:
        learned, held = examples.made(task, 400), examples.made(task, 100, seed=1, held_out=True)
        assert learned == examples.made(task, 400)
        if task == "instruct":
            asked = lambda rows: {m["content"] for r in rows for m in r["messages"] if m["role"] == "user"}  # noqa: E731
            answers = lambda rows: {m["content"] for r in rows for m in r["messages"] if m["role"] != "user"}  # noqa: E731
            assert not asked(learned) & asked(held) and answers(held) <= answers(learned)
        else:
            assert not {json.dumps(r) for r in learned} & {json.dumps(r) for r in held}


def test_labels_can_be_told_from_context_alone():
    """What the made examples are for: one word has several tags, one context several answers."""
    tags = {}
    for row in examples.made("tokens", 500):
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            tags.setdefault(word, set()).add(tag)
    assert {"B-PER", "B-LOC"} <= tags["Paris"] and {"I-PER", "B-LOC"} <= tags["Lincoln"]


# Files


CLASSIFY = [{"text": 'a "quoted", text', "label": "x"}, {"text": "zwei\nZeilen", "label": "y"}]
TOKENS = [{"tokens": ["Ann", "left"], "tags": ["B-PER", "O"]}]
QA = [{"question": "Who?", "context": "Ann left Ann.", "answer": "Ann", "answer_start": 9}]
INSTRUCT = [{"prompt": "Hi", "answer": "Hello"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("task, rows", list(zip(tasks.TASKS, (CLASSIFY, TOKENS, QA, INSTRUCT), strict=True)))
def test_files(task, rows, suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            flat = lambda v: " ".join(v) if isinstance(v, list) else v  # noqa: E731
            writer.writerows({k: flat(v) for k, v in row.items()} for row in rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    found = examples.read(path, task)
    if task == "qa":
        assert found[0]["answers"] == {"text": ["Ann"], "answer_start": [9]}
    elif task == "instruct":
        assert found[0]["messages"] == [
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
        ]  # fmt: skip
    else:
        assert found == rows


def test_other_columns_of_the_same(tmp_path):
    path = tmp_path / "rows.jsonl"
    squad = {"question": "Who?", "context": "Ann left.", "answers": {"text": ["Ann"], "answer_start": [0]}}
    path.write_text(
        json.dumps(squad) + "\n" + json.dumps(squad | {"answers": {"text": [], "answer_start": []}})
    )
    assert [row["answers"]["text"] for row in examples.read(path, "qa")] == [["Ann"], []]
    path.write_text(json.dumps({"question": "Who?", "context": "Ann left.", "answer": ""}))
    assert examples.read(path, "qa")[0]["answers"]["text"] == []
    path.write_text(json.dumps({"text": "a", "text_b": "b", "label": 1}))
    assert examples.read(path, "classify") == [{"text": "a", "text_b": "b", "label": "1"}]
    messages = [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]
    path.write_text(json.dumps({"messages": messages}))
    assert examples.read(path, "instruct") == [{"messages": messages}]


@pytest.mark.parametrize(
    "task, line, said",
    [
        ("classify", '{"text": "a"}', "line 1: has text; need columns text, label"),
        ("classify", '{"text": "a", "label": "x"}\n{"text": ', "line 2: is not JSON"),
        ("classify", "[1]", "line 1: holds a list"),
        ("classify", '{"text": 3, "label": "x"}', "text is a int"),
        ("classify", '{"text": "a", "label": null}', "label is None"),
        ("classify", "\n", "holds no examples; need columns text, label"),
        ("tokens", '{"tokens": ["a", "b"], "tags": ["O"]}', "2 tokens and 1 tags"),
        ("tokens", '{"tokens": 3, "tags": ["O"]}', "tokens is 3, needs a list"),
        ("qa", '{"question": "q", "context": "c", "answer": "x"}', "'x' is not in the context"),
        (
            "qa",
            '{"question": "q", "context": "c c", "answer": "c", "answer_start": 1}',
            "not in the context at 1",
        ),
        ("qa", '{"question": "q", "context": "c", "answers": {}}', "line 1"),
        ("instruct", '{"messages": [{"role": "user", "content": "x"}]}', "no message of the assistant"),
        ("instruct", '{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot'"),
    ],
)
def test_wrong_files_are_one_error(task, line, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=said.replace("[", r"\[")):
        examples.read(path, task)
    assert str(path) in str(pytest.raises(DataError, examples.read, path, task).value)


# Targets


def test_instruct_counts_the_answers_alone():
    tokenizer = tokens.Bytes()
    messages = [
        ("system", "Brief!"),
        ("user", "Hi"),
        ("assistant", "Yo"),
        ("user", "Bye"),
        ("assistant", "So?"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    task = tasks.task_for("instruct", tokenizer, 128, None)
    ((ids, targets),) = task.samples([row])
    whole = "System: Brief!\nUser: Hi\nAssistant: Yo~User: Bye\nAssistant: So?"
    assert ids == [tokenizer.sep_id if c == "~" else ord(c) for c in whole]
    counted = [t for t in targets if t != -100]
    assert counted == [*b" Yo", tokenizer.sep_id, *b" So?", tokenizer.sep_id]
    for t, target in enumerate(targets[:-1]):
        assert target in (-100, ids[t + 1])

    model = pretrained.fresh("gpt", "tiny", "instruct", tokenizer)
    short = {"messages": row["messages"][1:3]}
    samples = task.samples([row, short])
    batch = task.collate(samples)
    assert task.targets(batch)["loss"] == 9 + 4
    logits = model(batch["input_ids"])[0]
    losses = [
        cross_entropy(logits[b, t], torch.tensor(target), reduction="none")
        for b, (_, targets) in enumerate(samples)
        for t, target in enumerate(targets)
        if target != -100
    ]
    loss = task.loss(model, batch)["loss"]
    assert abs(loss.item() - torch.stack(losses).mean().item()) < 1e-5

    packed = tasks.task_for("instruct", tokenizer, 128, None, pack=True)
    together = packed.collate(samples)
    assert together["input_ids"].shape == (1, sum(len(ids) for ids, _ in samples))
    assert packed.targets(together) == task.targets(batch)
    assert abs(packed.loss(model, together)["loss"].item() - loss.item()) < 1e-5

    cut = tasks.task_for("instruct", tokenizer, len("User: Hi\nAssistant: "), None).samples([short])
    assert [t for t in cut[0][1] if t != -100] == [*b" Y"]
    with pytest.raises(DataError, match="no answer begins within 10"):
        tasks.task_for("instruct", tokenizer, 10, None).samples([short])


def test_sub_words_have_no_tag():
    tokenizer = tokens.Bytes()
    task = tasks.task_for("tokens", tokenizer, 9, ["B-X", "O"])
    ((sequence, targets),) = task.samples([{"tokens": ["ab", "c", "defg"], "tags": ["O", "B-X", "O"]}])
    #                   cls  a   b     ' '   c  ' '   d  e     sep
    assert targets == [-100, 1, -100, -100, 0, -100, 1, -100, -100]
    assert tokenizer.decode(sequence.ids) == "ab c de"


class Planted(torch.nn.Module):
    """Gives logits that were made beforehand, whatever it is asked."""

    def __init__(self, logits):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(()))
        self.logits = logits

    def forward(self, input_ids, attention_mask, token_type_ids, unpad):
        return self.logits(input_ids), None


def test_words_beyond_the_end_are_outside():
    task = tasks.task_for("tokens", tokens.Bytes(), 5, ["B-X", "O"])
    model = Planted(lambda ids: torch.tensor([1.0, 0.0]).expand(*ids.shape, 2))
    assert task.predict(model, [{"tokens": ["ab", "c", "d"]}]) == [["B-X", "O", "O"]]


@pytest.mark.parametrize("length", [24, 64])
def test_answers_are_found_where_they_are(length):
    """The positions a model is trained on give back the answer, in every window that shows all of it."""
    tokenizer = tokens.Bytes()
    rows = examples.made("qa", 20) + [
        {
            "question": "Wo?",
            "context": "Größe zählt – in Köln.",
            "answers": {"text": ["Köln"], "answer_start": [17]},
        }
    ]
    task = tasks.task_for("qa", tokenizer, length, None, overlap=length // 4)
    for row in rows:
        answer, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        shown = 0
        for window, first, last in task.samples([row]):
            inside = [o for o, part in zip(window.offsets, window.parts, strict=True) if part == 1]
            if inside[0][0] <= start and start + len(answer) <= inside[-1][1]:
                found = row["context"][window.offsets[first][0] : window.offsets[last][1]]
                assert (found, window.offsets[first][0]) == (answer, start)
                shown += 1
            else:
                assert (first, last) == (0, 0)
        assert shown or len(answer) > length // 4


def test_the_likeliest_span_of_all_windows_is_the_answer():
    tokenizer = tokens.Bytes()
    context = "The cat sat on the mat and slept there all day."
    row = {"question": "Where?", "context": context, "answers": {"text": ["the mat"], "answer_start": [15]}}
    task = tasks.task_for("qa", tokenizer, 30, None, overlap=12)
    assert len(task.windows(row)) > 1

    def logits(ids, none=0.0, none_elsewhere=0.0):
        first, last = torch.zeros(ids.shape), torch.zeros(ids.shape)
        for b, text in enumerate(ids.tolist()):
            text = bytes(min(i, 255) for i in text)
            if (at := text.find(b"the mat")) >= 0:
                first[b, at], last[b, at + 6] = 5.0, 5.0
            first[b, 1] = 9.0  # in the question: not an answer
            last[b, text.find(b"\xff", 1) + 1] = 9.0  # before the beginning: not one either
            first[b, 0] = none if at >= 0 else none_elsewhere
        return first, last

    assert task.predict(Planted(logits), [row]) == ["the mat"]
    assert task.scores(["the mat"], [row]) == {"exact_match": 1.0, "f1": 1.0}
    lacks = row | {"answers": {"text": [], "answer_start": []}}
    assert task.predict(Planted(logits), [lacks]) == ["the mat"]
    assert task.predict(Planted(lambda ids: logits(ids, 0.0, 20.0)), [lacks]) == ["the mat"]
    assert task.predict(Planted(lambda ids: logits(ids, 20.0, 20.0)), [lacks]) == [""]
    assert task.predict(Planted(lambda ids: logits(ids, 20.0, 20.0)), [row]) == ["the mat"], (
        "all questions have answers"
    )


# Where it starts from, and where it ends


PAIRS = [{"text": f"{a} is it?", "text_b": b, "label": str(a == b)} for a in "abcd" for b in "abcd"] * 2


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    return path


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_from_a_checkpoint_of_transformers_to_one(kind, pairs, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = dict(vocab_size=260, pad_token_id=256)
    if kind == "gpt":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **shared)
        theirs = transformers.GPT2LMHeadModel(config)
        classifier = transformers.GPT2ForSequenceClassification
    else:
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=64, **shared,
        )  # fmt: skip
        theirs = transformers.BertForMaskedLM(config)
        classifier = transformers.BertForSequenceClassification
    theirs.save_pretrained(tmp_path / "start")
    run(
        "classify",
        tmp_path / "out",
        "--model",
        tmp_path / "start",
        "--data",
        pairs,
        "--steps",
        3,
        "--lr",
        0.01,
    )
    model, tokenizer = pretrained.opened(tmp_path / "out", "classify")
    moved = (model.wte if kind == "gpt" else model.bert.embeddings.word_embeddings).weight[:256]
    before = (theirs.transformer.wte if kind == "gpt" else theirs.bert.embeddings.word_embeddings).weight[
        :256
    ]
    assert 0 < (moved - before).abs().max() < 0.1, "training starts from the weights of the checkpoint"

    folder = tmp_path / "out" / "step-0000003"
    again = classifier.from_pretrained(folder).eval()
    assert again.config.id2label == {0: "False", 1: "True"}
    task = tasks.task_for("classify", tokenizer, 64, ["False", "True"], types=kind == "bert")
    batch = task.collate(task.samples(PAIRS[:5]))
    del batch["labels"]
    torch.testing.assert_close(model(**batch)[0], again(**batch).logits, atol=1e-5, rtol=0)


def test_a_head_is_kept_for_the_same_labels_and_new_for_others(pairs, tmp_path):
    run("classify", tmp_path / "a", "--data", pairs, "--steps", 2, "--tokenizer", "bytes")
    trained, _ = pretrained.opened(tmp_path / "a", "classify")
    same, _ = pretrained.started(tmp_path / "a", "classify", ["False", "True"])
    other, _ = pretrained.started(tmp_path / "a", "classify", ["no", "yes"])
    more, _ = pretrained.started(tmp_path / "a", "classify", ["a", "b", "c"])
    assert pretrained.labels_in(pretrained.described(tmp_path / "a")[2]) == ["False", "True"]
    tagger, _ = pretrained.started(tmp_path / "a", "tokens", ["O", "B-X", "I-X"])
    assert torch.equal(same.classifier.weight, trained.classifier.weight)
    assert not torch.equal(other.classifier.weight, trained.classifier.weight)
    assert more.classifier.weight.shape[0] == tagger.classifier.weight.shape[0] == 3
    for model in (same, other, more, tagger):
        for name, p in model.bert.named_parameters():
            assert torch.equal(p, trained.bert.get_parameter(name)), name
    refused = fastattn("eval", tmp_path / "a", "--task", "tokens")
    assert refused.exit_code == 2 and "fastattn finetune tokens" in " ".join(refused.output.split())


def test_a_gpt_that_transformers_has_not_keeps_its_head(tmp_path):
    torch.manual_seed(0)
    banded = pretrained.gpt.GPTConfig(**pretrained.gpt.SIZES["tiny"] | dict(vocab_size=260, local_window=16))
    pretrained.save(pretrained.gpt.GPT(banded), tmp_path / "lm", tokens.Bytes())
    model, tokenizer = pretrained.started(tmp_path / "lm", "classify", ["no", "yes"])
    pretrained.save(model, tmp_path / "head", tokenizer)
    again, _ = pretrained.opened(tmp_path / "head", "classify")
    assert again.config.local_window == 16 and torch.equal(again.score.weight, model.score.weight)
    assert pretrained.labels_in(pretrained.described(tmp_path / "head")[2]) == ["no", "yes"]


def test_a_resumed_run_is_the_uninterrupted_one(pairs, tmp_path):
    options = [
        "--data",
        pairs,
        "--steps",
        6,
        "--dropout",
        0.1,
        "--tokenizer",
        "bytes",
        "--save-every",
        3,
        "--keep",
        2,
    ]
    run("classify", tmp_path / "whole", *options)
    run("classify", tmp_path / "cut", *options)
    for file in (tmp_path / "cut/step-0000006").iterdir():
        file.unlink()
    (tmp_path / "cut/step-0000006").rmdir()
    run("classify", tmp_path / "cut", "--resume")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "training.safetensors"):
        whole, cut = (tmp_path / run / "step-0000006" / name for run in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), name
    assert (tmp_path / "whole/scores.json").read_text() == (tmp_path / "cut/scores.json").read_text()


# What is refused


def refused(*args):
    done = fastattn(*args, "--device", "cpu")
    assert done.exit_code == 2 and "Traceback" not in done.output, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return " ".join(done.output.replace("│", " ").split())


def test_refusals_name_the_argument_and_the_remedy(pairs, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "need one of classify, tokens, qa, instruct" in refused("finetune", "sort", *out)
    assert "qa needs a bert, this model is a gpt" in refused("finetune", "qa", "--model", "gpt", *out)
    assert "instruct needs a gpt" in refused("finetune", "instruct", "--model", "bert", *out)
    assert "--size huge: need one of tiny" in refused("finetune", "qa", "--size", "huge", *out)
    assert "no such file or folder" in refused("finetune", "qa", "--model", tmp_path / "nowhere", *out)
    assert "there is no such file" in refused("finetune", "qa", "--data", tmp_path / "nowhere.csv", *out)
    assert "need .jsonl or .csv" in refused("finetune", "qa", "--data", __file__, *out)
    assert "need columns question, context" in refused("finetune", "qa", "--data", pairs, *out)
    assert "--valid" in refused("finetune", "classify", "--valid", pairs, *out)
    bytes_ = ("--tokenizer", "bytes")
    assert "no answer begins within 9 tokens" in refused(
        "finetune", "instruct", "--max-length", 9, *bytes_, *out
    )
    others = tmp_path / "others.jsonl"
    others.write_text(json.dumps(PAIRS[0] | {"label": "maybe"}))
    both = ("--data", pairs, "--valid", others)
    assert "'maybe' is none of the model's: False, True" in refused(
        "finetune", "classify", *both, *bytes_, *out
    )
    assert "give --valid" in refused("finetune", "classify", "--data", others, *out)
    alike = refused("finetune", "classify", "--data", others, "--valid", pairs, *bytes_, *out)
    assert "all examples have the label 'maybe'" in alike
    assert "overlap" in refused("finetune", "qa", "--overlap", 120, *bytes_, *out)
    assert not (tmp_path / "out").exists(), "nothing is written before all is found right"

    run("classify", tmp_path / "out", "--data", pairs, "--steps", 1, *bytes_)
    assert "holds a run already" in refused("finetune", "classify", "--data", pairs, *out)
    assert "--seed 3: the run" in refused("finetune", "classify", "--resume", "--seed", 3, *out)
    folder = tmp_path / "out/step-0000001"
    again = ("finetune", "classify", "--data", pairs, "--model", folder, "--out", tmp_path / "new")
    assert "the model reads 1 to 128 positions" in refused(*again, "--max-length", 300)
    bpe = tokens.train_bpe([json.dumps(PAIRS)] * 3, 300)
    bpe.save(tmp_path / "bpe")
    assert "do not belong together" in refused(*again, "--tokenizer", tmp_path / "bpe")
    (folder / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: cannot be read as JSON" in refused(*again)
    tokens.Bytes().save(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors: cannot be read" in refused(*again)
    assert "model.safetensors: cannot be read" in refused("eval", folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text('{"model_type": "t5"}')
    assert "model_type is 't5', need one of" in refused(*again)
    assert not (tmp_path / "new").exists()


def test_conversations_need_an_end():
    nameless = tokens.Bytes()
    nameless.special = nameless.special | {"sep": None}
    with pytest.raises(ValueError, match="no id that ends a text"):
        chat.encode(nameless, [{"role": "assistant", "content": "x"}])
