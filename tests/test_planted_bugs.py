"""Can the tests fail? Bugs are planted in copies of the kernels, one at a time, and the rule of fastattn.check must see each."""

import importlib.util
import pathlib
import sys

import pytest
import torch

from fastattn import backend, check, functional, reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs the copies")
KERNELS = pathlib.Path(__file__).resolve().parent.parent / "kernels"


def grads(*shape):
    return torch.randn(shape, requires_grad=True)


def plain_attention(**options):
    """Three key tiles and three query tiles of the shipped sizes, the last ones ragged."""
    q, k, v = grads(1, 1, 290, 16), grads(1, 1, 300, 16), grads(1, 1, 300, 16)
    ours = lambda *t: functional.attention(*t, **options)  # noqa: E731
    return check.check(ours, lambda *t: reference.attention(*t, **options)[0], (q, k, v))


def biased_attention():
    q, k, v, bias = grads(2, 1, 40, 16), grads(2, 1, 45, 16), grads(2, 1, 45, 16), grads(1, 1, 40, 45)
    mask = torch.rand(40, 45) < 0.7
    ours = lambda q, k, v, b: functional.attention(q, k, v, bias=b, mask=mask)  # noqa: E731
    exact = lambda q, k, v, b: reference.attention(q, k, v, bias=b, mask=mask)[0]  # noqa: E731
    return check.check(ours, exact, (q, k, v, bias))


def grouped_attention():
    q, k, v = grads(1, 4, 40, 16), grads(1, 2, 40, 16), grads(1, 2, 40, 16)
    return check.check(functional.attention, lambda *t: reference.attention(*t)[0], (q, k, v))


def norm():
    x, w, b = grads(5, 300), grads(300), grads(300)
    return check.check(
        lambda x, w, b: functional.layer_norm(x, (300,), w, b),
        lambda x, w, b: reference.layer_norm(x, (300,), w, b), (x, w, b),
    )  # fmt: skip


def activation():
    x, b = grads(5, 300), grads(300)
    return check.check(functional.bias_gelu, reference.bias_gelu, (x, b))


def soft():
    return check.check(
        lambda x: functional.softmax(x, -1), lambda x: reference.softmax(x, -1), (grads(5, 300),)
    )


def wide_softmax():
    x = (5 * torch.randn(1, 40000)).sort().values  # the maximum grows from tile to tile
    return check.check(lambda x: functional.softmax(x, -1), lambda x: reference.softmax(x, -1), (x,))


def head():
    """Several blocks a token, its logits ascending, and some tokens that do not count."""
    hidden, weight, bias = grads(5, 16), grads(20003, 16), (3 * torch.randn(20003)).sort().values
    targets = torch.tensor([3, -100, 20002, 8191, 8192])
    both = [
        lambda h, w, f=f: f.linear_cross_entropy(h, w, targets, bias=bias, softcap=20.0)
        for f in (functional, reference)
    ]
    return check.check(*both, (hidden, weight))


def sinusoids():
    x = grads(2, 5, 48)
    ours = lambda x: functional.add_positional_encoding(x, offset=900)  # noqa: E731
    return check.check(ours, lambda x: reference.add_positional_encoding(x, offset=900), (x,))


# kernel file, what is planted, the line, the bug, the case that must see it
PLANTED = [
    ("attention", "causal off by one", "keep = keep & (distance >= -rules.right)",
     "keep = keep & (distance >= 1 - rules.right)", lambda: plain_attention(causal=True)),
    ("attention", "window off by one", "keep = keep & (distance <= rules.left)",
     "keep = keep & (distance < rules.left)", lambda: plain_attention(window=(140, None))),
    ("attention", "accumulator not rescaled", "acc * alpha[:, None]", "acc", plain_attention),
    ("attention", "sum not rescaled", "l_i * alpha + tl.sum(p, 1)", "l_i + tl.sum(p, 1)", plain_attention),
    ("attention", "ragged last keys attended", "keep = (m < at.q_len) & (n < at.kv_len)", "keep = m < at.q_len",
     plain_attention),
    ("attention", "mask upside down", "at, MASKED) != 0, s, float", "at, MASKED) == 0, s, float", biased_attention),
    ("attention", "wrong key head", "h // rules.group, at.start_k", "h % (rules.H // rules.group), at.start_k",
     grouped_attention),
    ("layer_norm", "variance of N - 1", "/ N + eps", "/ (N - 1) + eps", norm),
    ("layer_norm", "mean of the gradient kept", "dx -= (tl.sum(g, axis=1) / N)[:, None]", "dx -= 0.0", norm),
    ("bias_gelu", "bell of another base", "tl.exp2(h * h", "tl.exp(h * h", activation),
    ("bias_gelu", "gradient without the bell", "dx = dy * (g + h * slope)", "dx = dy * g", activation),
    ("softmax", "walked sum not rescaled", "denom * tl.exp(m - finite) +", "denom +", wide_softmax),
    ("softmax", "gradient without its sum", "y * (dy - total[:, None])", "y * dy", soft),
    ("linear_cross_entropy", "sum not rescaled", "denom * tl.exp(top - new_top) +", "denom +", head),
    ("linear_cross_entropy", "gradient of softcap forgotten", "dloss * dz * slope", "dloss * dz", head),
    ("linear_cross_entropy", "ignored targets counted", "target != ignore_index", "target == target", head),
    ("position", "sine for cosine", "odd = (quarter & 1) != 0", "odd = (quarter & 1) == 0", sinusoids),
]  # fmt: skip


def copy_of(stem, source, folder):
    """The kernel file as a module of its own; launchers are then looked up in it."""
    path = folder / f"{stem}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"fastattn.kernels.planted_{stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def broken_rules(module, stem, case, monkeypatch):
    launcher = backend.launcher
    monkeypatch.setattr(
        backend,
        "launcher",
        lambda name, b, op: getattr(module, name) if op == stem else launcher(name, b, op),
    )
    torch.manual_seed(0)
    with backend.use_backend("triton"):
        return case()


@pytest.mark.parametrize("stem, what, line, bug, case", PLANTED, ids=[f"{p[0]}, {p[1]}" for p in PLANTED])
def test_planted_bug_is_seen(stem, what, line, bug, case, tmp_path, monkeypatch):
    source = (KERNELS / f"{stem}.py").read_text()
    assert line in source, f"kernels/{stem}.py no longer has {line!r}: plant this bug anew"
    module = copy_of(stem, source.replace(line, bug), tmp_path)
    assert broken_rules(module, stem, case, monkeypatch), f"nothing noticed: {what}"


CASES = [plain_attention, biased_attention, grouped_attention, norm, soft, wide_softmax, head, sinusoids]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_without_a_bug_nothing_is_seen(case):
    with backend.use_backend("triton"):
        assert case() == []
