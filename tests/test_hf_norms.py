"""The norms that each of transformers' models has a class of its own for: which formula each is found to be, and whether it is right."""

import copy
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")
from conftest import DEVICE
from test_transformers import DECODER, KINDS, PADDING, assert_close, ids, pair, results, t5_config
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.moshi.modeling_moshi import MoshiRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import fastattn
from fastattn import backend, reference
from fastattn.check import check
from fastattn.integrations import norms

C = 40
CLASSES = {
    norms.rms_norm: [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Olmo2RMSNorm, T5LayerNorm],
    norms.layer_norm: [CohereLayerNorm],
    norms.shifted_rms_norm: [GemmaRMSNorm, Gemma3RMSNorm],
    norms.widened_rms_norm: [Gemma3nRMSNorm, MoshiRMSNorm],
}


def test_formulas_are_found():
    for formula, classes in CLASSES.items():
        assert [norms.formula(cls) for cls in classes] == [formula] * len(classes)
    assert norms.formula(torch.nn.RMSNorm) is None and norms.formula(transformers.LlamaForCausalLM) is None


# Each uses the names of Llama's forward, or almost, and computes something else.
def cubed(self, x):
    dtype, x = x.dtype, x.to(torch.float32)
    variance = x.pow(3).mean(-1, keepdim=True)
    return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon)).to(dtype)


def eps_outside(self, x):
    dtype, x = x.dtype, x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    return self.weight * (x * (torch.rsqrt(variance) + self.variance_epsilon)).to(dtype)


def of_two_dims(self, x):
    dtype, x = x.dtype, x.to(torch.float32)
    variance = x.pow(2).mean((-2, -1), keepdim=True)
    return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon)).to(dtype)


def otherwise_in_training(self, x):
    dtype, x = x.dtype, x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * x.to(dtype) * (1 + getattr(self, "training", 0))


def gated(self, x, gate=None):
    dtype, x = x.dtype, x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * x.to(dtype) if gate is None else gate


def raising(self, x):
    dtype, x = x.dtype, x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    return self.weight.mean(9) * (x * torch.rsqrt(variance + self.variance_epsilon)).to(dtype)


@pytest.mark.parametrize("forward", [cubed, eps_outside, of_two_dims, otherwise_in_training, gated, raising])
def test_what_computes_something_else_is_left_and_listed(forward):
    cls = type(
        "AlikeRMSNorm", (LlamaRMSNorm,), {"__module__": "transformers.models.alike", "forward": forward}
    )
    assert norms.formula(cls) is None
    model = torch.nn.Sequential(cls(C), torch.nn.LayerNorm(C))
    report = fastattn.patch(model)
    assert type(model[0]) is cls and [kind for _, kind, _ in report.skipped] == [cls]
    same = type("SameRMSNorm", (LlamaRMSNorm,), {"__module__": "transformers.models.alike"})
    assert norms.formula(same) is norms.rms_norm
    elsewhere = type("UsersRMSNorm", (LlamaRMSNorm,), {"__module__": "mine"})
    assert norms.formula(elsewhere) is None


def scaled_twice(self, x):
    output = self._norm(x.float())
    if self.with_scale:
        output = output * self.weight.float()
    return output.type_as(x) if self.with_scale else output.type_as(x).float().mean(-1)


def test_gemmas_norm_without_a_weight():
    module = Gemma3nRMSNorm(C, eps=1e-3, with_scale=False)
    swapped, x = copy.deepcopy(module), torch.randn(3, C)
    assert fastattn.patch(swapped).swapped
    torch.testing.assert_close(swapped(x), module(x))
    body = {"__module__": "transformers.models.alike", "forward": scaled_twice}
    assert norms.formula(type("AlikeRMSNorm", (Gemma3nRMSNorm,), body)) is None


def exact(cls):
    """The formula on float64: what a class stands for."""
    if cls in CLASSES[norms.layer_norm]:
        return lambda x, weight: reference.layer_norm(x, (C,), weight, None, 1e-5)
    shift = 1.0 if cls in CLASSES[norms.shifted_rms_norm] else 0.0
    return lambda x, weight: reference.rms_norm(x, (C,), shift + weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", sum(CLASSES.values(), []))
def test_values_and_gradients(cls, dtype):
    """Within twice the distance that transformers' own keeps from the formula, on stock torch and on the kernels."""
    module = cls(C, eps=1e-5).to(DEVICE, dtype)
    swapped = copy.deepcopy(module)
    fastattn.patch(swapped, strict=True)
    assert isinstance(swapped, cls) and type(swapped) is not cls
    x = torch.randn(3, 5, C, device=DEVICE) * 2 + 0.5
    inputs = [x.to(dtype).requires_grad_(), torch.randn(C, device=DEVICE).to(dtype).requires_grad_()]

    def call(m):
        return lambda x, weight: torch.func.functional_call(m, {"weight": weight}, (x,))

    for name in (None, "triton"):
        with backend.use_backend(name):
            before = backend.calls.copy()
            assert check(call(swapped), exact(cls), inputs, baseline=call(module)) == []
            op = "layer_norm" if cls is CohereLayerNorm else "rms_norm"
            assert (backend.calls - before)[op, name or "torch"] == 1
    assert swapped(inputs[0]).dtype == module(inputs[0]).dtype == dtype


@pytest.mark.parametrize("cls", sum(CLASSES.values(), []))
def test_dtypes_that_differ_and_autocast(cls, monkeypatch):
    """Beside a weight of another dtype, and under autocast, the dtype and the values of transformers' own."""
    widening = dict.fromkeys(
        ("rms_norm", "layer_norm"), frozenset({"cpu", "cuda"})
    )  # as a GPU's autocast does
    monkeypatch.setattr(fastattn.ops.layer_norm, "WIDENED", widening)
    module = cls(C)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(3, C)
    for given, weight, autocast in (
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
    ):
        stock = copy.deepcopy(module).to(weight)
        swapped = copy.deepcopy(stock)
        fastattn.patch(swapped)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            got, want = swapped(x.to(given)), stock(x.to(given))
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


def test_a_weight_of_several_rows_is_left_to_transformers():
    """As Cohere has it for the heads of its queries and keys."""
    module = CohereLayerNorm((4, 8))
    torch.nn.init.normal_(module.weight)
    swapped, x = copy.deepcopy(module), torch.randn(2, 3, 4, 8)
    report = fastattn.patch(swapped)
    assert torch.equal(swapped(x), module(x))
    assert report.calls() == [("CohereLayerNorm", "torch", 1, "the weight is (4, 8), not one row")]


def models():
    small = {name: value for name, value in DECODER.items() if name != "head_dim"}
    return {
        "llama": (*KINDS["llama"], 5, {"rms_norm": 5}),
        "gemma2": (*KINDS["gemma2"], 9, {"rms_norm": 9}),
        "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**DECODER), 9, {"rms_norm": 9}),
        "cohere": (transformers.CohereForCausalLM, transformers.CohereConfig(**small), 3, {"layer_norm": 3}),
    }


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "cohere"])
def test_a_model_with_its_norms_swapped(kind, monkeypatch):
    cls, config, swapped, calls = models()[kind]
    monkeypatch.setitem(KINDS, kind, (cls, config))
    model, eager = pair(kind)
    for m in (model, eager):
        torch.manual_seed(2)
        for name, parameter in m.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.set_attn_implementation("eager")
    keep, inputs = PADDING["left"].bool(), dict(input_ids=ids(), attention_mask=PADDING["left"])
    stock = results(model, keep, **inputs)
    report = fastattn.patch(model)
    assert len(report.swapped) == swapped and not report.skipped
    before = backend.calls.copy()
    want = results(eager, keep, **inputs)
    assert_close(results(model, keep, **inputs), want)
    made = backend.calls - before
    assert {op: made[op, "torch"] for op in calls} == calls
    if kind == "llama":
        with backend.use_backend("triton"):
            assert_close(results(model, keep, **inputs), want)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close({"logits": other(**inputs).logits[keep]}, {"logits": want["logits"]})
        fastattn.unpatch(other)
        assert torch.equal(other(**inputs).logits[keep], stock["logits"])
    options = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids(), **options), eager.generate(ids(), **options))
    fastattn.unpatch(model)
    after = results(model, keep, **inputs)
    assert all(torch.equal(after[name], stock[name]) for name in stock)


def test_swapped_norms_compile_and_recompute():
    model, eager = pair("llama", num_hidden_layers=1)
    fastattn.patch(model)
    keep, inputs = PADDING["right"].bool(), dict(input_ids=ids(), attention_mask=PADDING["right"])
    want = results(eager, keep, **inputs)
    model.train().gradient_checkpointing_enable()
    assert_close(results(model, keep, **inputs), want)
    try:
        with torch.no_grad():
            got = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")(**inputs).logits[keep]
    finally:
        torch._dynamo.reset()
    assert_close({"logits": got}, {"logits": want["logits"]})


def test_t5_with_its_norms_swapped():
    config = t5_config()
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    inputs = dict(input_ids=ids(), attention_mask=PADDING["left"], labels=ids(length=5))
    want = model(**inputs)
    report = fastattn.patch(model)
    assert sum(before is T5LayerNorm for _, before, _ in report.swapped) == 12
    got = model(**inputs)
    assert_close({"logits": got.logits, "loss": got.loss}, {"logits": want.logits, "loss": want.loss})
