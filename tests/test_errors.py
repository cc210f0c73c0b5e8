"""Bad input is a Python exception that names the argument, on every backend, and never a crash."""

import os
import subprocess
import sys

import pytest
import torch

from fastattn import backend
from fastattn import functional as f

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a CPU shows it; where values lie on a GPU they are not read"
)

X = torch.zeros(2, 3, 8)
W = torch.ones(8)
Q, K = torch.zeros(2, 4, 5, 16), torch.zeros(2, 2, 7, 16)
PACKED = torch.zeros(7, 2, 16)
CU = torch.tensor([0, 3, 7], dtype=torch.int32)
IDS = torch.tensor([[0, 1, 2]])
TABLE = torch.zeros(5, 8)
LENS = torch.tensor([3, 4])


def attention(q=Q, k=K, v=K, **options):
    return lambda: f.attention(q, k, v, **options)


def varlen(q=PACKED, k=PACKED, v=PACKED, cu_q=CU, cu_k=CU, longest=4, **options):
    return lambda: f.attention_varlen(q, k, v, cu_q, cu_k, longest, longest, **options)


def decode(q=Q, k=K, v=K, lens=LENS, **options):
    return lambda: f.attention_decode(q, k, v, lens, **options)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


ERRORS = (
    ValueError,
    TypeError,
    IndexError,
    RuntimeError,
)  # what torch's own ops of these names raise, and ours

# name: (call, what the message must say)
BAD = {
    "attention rank of q": (attention(q=Q[0]), "q"),
    "attention rank of k": (attention(k=K[0]), "k"),
    "attention batch": (attention(k=K[:1]), "k"),
    "attention head dim": (attention(k=K[..., :8]), "k"),
    "attention heads": (attention(q=Q[:, :3]), "heads"),
    "sdpa of no key heads": (
        lambda: f.scaled_dot_product_attention(Q, K[:, :0].requires_grad_(), K, enable_gqa=True), "heads"),
    "layer_norm without eps": (lambda: f.layer_norm(X, (8,), eps=None), "eps"),
    "position table too short for no rows": (lambda: f.add_positional_encoding(X[:0], TABLE, offset=4), "offset"),
    "position offset is a tensor": (lambda: f.add_positional_encoding(X, offset=torch.tensor(1)), "offset"),
    "attention lengths of k and v": (attention(v=K[:, :, :3]), "v"),
    "attention dtype mix": (attention(k=K.half()), "k"),
    "attention integers": (attention(q=Q.int(), k=K.int(), v=K.int()), "q"),
    "attention device mix": (attention(v=K.to("meta")), "v"),
    "attention bias device": (attention(bias=torch.zeros(5, 7, device="meta")), "bias"),
    "attention bias shape": (attention(bias=torch.zeros(5, 6)), "bias"),
    "attention bias dtype": (attention(bias=torch.zeros(5, 7, dtype=torch.bool)), "bias"),
    "attention mask shape": (attention(mask=torch.ones(3, 1, 5, 7, dtype=torch.bool)), "mask"),
    "attention mask rank": (attention(mask=torch.ones(1, 1, 1, 5, 7, dtype=torch.bool)), "mask"),
    "attention mask dtype": (attention(mask=torch.ones(5, 7)), "mask"),
    "attention negative window": (attention(window=(-1, 2)), "window"),
    "attention window of one": (attention(window=4), "window"),
    "attention causal": (attention(causal="bottom"), "causal"),
    "attention softcap": (attention(softcap=-1.0), "softcap"),
    "attention dropout": (attention(dropout_p=1.5), "dropout_p"),
    "attention alibi shape": (attention(alibi_slopes=torch.zeros(3)), "alibi_slopes"),
    "attention sinks shape": (attention(sinks=torch.zeros(2)), "sinks"),
    "attention lens shape": (attention(kv_lens=ints(3)), "kv_lens"),
    "attention lens too long": (attention(kv_lens=ints(3, 8)), "kv_lens"),
    "attention lens negative": (attention(q_lens=ints(-1, 2)), "q_lens"),
    "attention lens dtype": (attention(kv_lens=torch.zeros(2)), "kv_lens"),
    "varlen rank": (varlen(q=Q), "q"),
    "varlen does not start at 0": (varlen(cu_q=ints(1, 3, 7)), "cu_seqlens_q"),
    "varlen does not ascend": (varlen(cu_k=ints(0, 5, 4)), "cu_seqlens_k"),
    "varlen past the end": (varlen(cu_q=ints(0, 3, 9)), "cu_seqlens_q"),
    "varlen dtype": (varlen(cu_q=CU.float()), "cu_seqlens_q"),
    "varlen longest": (varlen(longest=3), "max_seqlen"),
    "varlen batch": (varlen(cu_k=ints(0, 7)), "cu_seqlens_k"),
    "decode rank": (decode(q=Q[0]), "q"),
    "decode dtype mix": (decode(k=K.half()), "k_cache"),
    "decode device mix": (decode(v=K.to("meta")), "v_cache"),
    "decode too long": (decode(lens=torch.tensor([3, 9])), "cache_lens"),
    "decode no room to append": (decode(lens=torch.tensor([3, 7]), k_new=K[:, :, :1], v_new=K[:, :, :1]), "cache_lens"),
    "decode half an append": (decode(k_new=K[:, :, :1]), "k_new"),
    "decode block table rank": (decode(k=torch.zeros(4, 8, 2, 16), v=torch.zeros(4, 8, 2, 16), block_table=ints(0, 1)),
                                "block_table"),
    "decode page out of range": (
        decode(k=torch.zeros(4, 8, 2, 16), v=torch.zeros(4, 8, 2, 16), block_table=torch.tensor([[0], [4]])),
        "block_table",
    ),
    "decode splits": (decode(num_splits=0), "num_splits"),
    "decode negative window": (decode(window=(-2, 0)), "window"),
    "sdpa head dim": (lambda: f.scaled_dot_product_attention(Q, Q[..., :8], Q), ""),
    "sdpa mask": (lambda: f.scaled_dot_product_attention(Q, Q, Q, torch.zeros(3, 3)), ""),
    "layer_norm shape": (lambda: f.layer_norm(X, (7,)), "normalized_shape"),
    "layer_norm weight": (lambda: f.layer_norm(X, (8,), W[:7]), "weight"),
    "layer_norm bias": (lambda: f.layer_norm(X, (8,), W, W[:7]), "bias"),
    "layer_norm weight device": (lambda: f.layer_norm(X, (8,), W.to("meta")), "weight|device|meta"),
    "layer_norm integers": (lambda: f.layer_norm(X.int(), (8,)), ""),
    "add_layer_norm residual": (lambda: f.add_layer_norm(X, X[:1], (8,)), "residual"),
    "add_layer_norm dropout": (lambda: f.add_layer_norm(X, X, (8,), dropout_p=-0.1), "dropout"),
    "rms_norm shape": (lambda: f.rms_norm(X, (7,)), "normalized_shape|shape"),
    "rms_norm weight": (lambda: f.rms_norm(X, (8,), W[:7]), "weight"),
    "add_rms_norm residual": (lambda: f.add_rms_norm(X, X[:1], (8,)), "residual"),
    "bias_gelu bias": (lambda: f.bias_gelu(X, W[:7]), "bias"),
    "bias_gelu bias device": (lambda: f.bias_gelu(X, W.to("meta")), "bias"),
    "bias_gelu approximate": (lambda: f.bias_gelu(X, W, "erf"), "approximate"),
    "softmax dim": (lambda: f.softmax(X, 3), "(?i)dim"),
    "log_softmax dim": (lambda: f.log_softmax(X, -4), "(?i)dim"),
    "scaled_masked_softmax mask": (lambda: f.scaled_masked_softmax(Q, torch.ones(3, 3, dtype=torch.bool)), "mask"),
    "scaled_masked_softmax mask dtype": (lambda: f.scaled_masked_softmax(Q, torch.zeros(5, 16)), "mask"),
    "position rank": (lambda: f.add_positional_encoding(torch.zeros(8)), "x"),
    "position table width": (lambda: f.add_positional_encoding(X, TABLE[:, :7]), "table"),
    "position table device": (lambda: f.add_positional_encoding(X, TABLE.to("meta")), "table"),
    "position past the table": (lambda: f.add_positional_encoding(X, TABLE, offset=3), "offset"),
    "position ids out of range": (lambda: f.add_positional_encoding(X, TABLE, position_ids=torch.tensor([0, 1, 5])), "position_ids"),
    "position ids negative": (lambda: f.add_positional_encoding(X, TABLE, position_ids=torch.tensor([0, -1, 2])), "position_ids"),
    "position ids dtype": (lambda: f.add_positional_encoding(X, TABLE, position_ids=torch.zeros(3)), "position_ids"),
    "position dropout": (lambda: f.add_positional_encoding(X, dropout_p=2.0), "dropout_p"),
    "embeddings ids out of range": (lambda: f.embeddings(torch.tensor([[5]]), TABLE), "input_ids"),
    "embeddings ids dtype": (lambda: f.embeddings(torch.zeros(1, 2), TABLE), "input_ids"),
    "embeddings table rank": (lambda: f.embeddings(IDS, W), "token_table"),
    "embeddings types out of range": (lambda: f.embeddings(IDS, TABLE, type_ids=IDS, type_table=TABLE[:2]), "type_ids"),
    "embeddings types without a table": (lambda: f.embeddings(IDS, TABLE, type_ids=IDS), "type_"),
    "embeddings positions": (lambda: f.embeddings(IDS, TABLE, TABLE[:2]), "position"),
    "embeddings norm": (lambda: f.embeddings(IDS, TABLE, norm_weight=W[:7]), "norm_weight"),
    "embeddings padding": (lambda: f.embeddings(IDS, TABLE, padding_idx=7), "padding_idx"),
}  # fmt: skip


@pytest.mark.parametrize("forced", [None, "triton"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name, forced):
    call, words = BAD[name]
    with (
        backend.use_backend(forced),
        pytest.raises((*ERRORS, NotImplementedError), match=words or None) as caught,
    ):
        call()
    assert caught.value.args and "internal" not in str(caught.value).lower()


def test_refusals_of_the_kernels_say_why():
    wide = torch.zeros(1, 1, 4, 512)
    with backend.use_backend("triton"), pytest.raises(NotImplementedError, match="head dim|256"):
        f.attention(wide, wide, wide)
    with backend.use_backend("triton"), pytest.raises(NotImplementedError, match="float64"):
        f.softmax(X.double(), -1)
    both = lambda: f.scaled_dot_product_attention(Q, Q, Q, torch.zeros(5, 5), is_causal=True)  # noqa: E731
    with backend.use_backend("triton"), pytest.raises(NotImplementedError, match="attn_mask and is_causal"):
        both()  # stock torch on a CPU adds the two up
    with pytest.raises(ValueError, match="use_backend"), backend.use_backend("opencl"):
        pass


def test_wide_heads_fall_back_to_stock_torch():
    wide = torch.randn(1, 1, 4, 512)
    torch.testing.assert_close(
        f.attention(wide, wide, wide), torch.nn.functional.scaled_dot_product_attention(wide, wide, wide)
    )


NO_TENSORS = {
    "attention q": lambda t: f.attention(t, K, K),
    "attention bias": lambda t: f.attention(Q, K, K, bias=t),
    "attention mask": lambda t: f.attention(Q, K, K, mask=t),
    "attention kv_lens": lambda t: f.attention(Q, K, K, kv_lens=t),
    "attention_varlen cu_seqlens_q": lambda t: f.attention_varlen(PACKED, PACKED, PACKED, t, CU, 4, 4),
    "attention_decode q": lambda t: f.attention_decode(t, K, K, LENS),
    "attention_decode cache_lens": lambda t: f.attention_decode(Q, K, K, t),
    "scaled_dot_product_attention query": lambda t: f.scaled_dot_product_attention(t, Q, Q),
    "scaled_dot_product_attention value": lambda t: f.scaled_dot_product_attention(Q, Q, t),
    "softmax x": lambda t: f.softmax(t),
    "log_softmax x": lambda t: f.log_softmax(t),
    "scaled_masked_softmax scores": lambda t: f.scaled_masked_softmax(t),
    "scaled_masked_softmax mask": lambda t: f.scaled_masked_softmax(X, t),
    "layer_norm x": lambda t: f.layer_norm(t, (8,)),
    "layer_norm weight": lambda t: f.layer_norm(X, (8,), t),
    "rms_norm x": lambda t: f.rms_norm(t, (8,)),
    "add_layer_norm x": lambda t: f.add_layer_norm(t, X, (8,)),
    "add_rms_norm residual": lambda t: f.add_rms_norm(X, t, (8,)),
    "bias_gelu x": lambda t: f.bias_gelu(t, W),
    "bias_gelu bias": lambda t: f.bias_gelu(X, t),
    "linear_cross_entropy hidden": lambda t: f.linear_cross_entropy(t, TABLE, IDS[0]),
    "linear_cross_entropy weight": lambda t: f.linear_cross_entropy(X[0], t, IDS[0]),
    "linear_cross_entropy targets": lambda t: f.linear_cross_entropy(X[0], TABLE, t),
    "add_positional_encoding x": lambda t: f.add_positional_encoding(t),
    "add_positional_encoding table": lambda t: f.add_positional_encoding(X, t),
    "embeddings input_ids": lambda t: f.embeddings(t, TABLE),
    "embeddings token_table": lambda t: f.embeddings(IDS, t),
}  # fmt: skip


@pytest.mark.parametrize("forced", [None, "triton"])
@pytest.mark.parametrize("name", NO_TENSORS)
def test_what_is_no_tensor_is_named(name, forced):
    argument = name.split()[1]
    for wrong in (X.numpy(), [1.0, 2.0], 3):
        with backend.use_backend(forced), pytest.raises(TypeError, match=rf"\b{argument}\b.*must be.*Tensor"):
            NO_TENSORS[name](wrong)


def test_packed_sequences_need_their_bounds():
    for bounds, name in (((None, CU), "cu_seqlens_q"), ((CU, None), "cu_seqlens_k")):
        with pytest.raises(TypeError, match=name):
            f.attention_varlen(PACKED, PACKED, PACKED, *bounds, 4, 4)


@pytest.mark.parametrize("forced", [None, "triton"])
def test_shapes_and_dims_of_other_types(forced):
    with backend.use_backend(forced):
        for wrong in (8, torch.tensor([8]), (8.0,), ("8",), (True,)):
            for norm in (f.layer_norm, f.rms_norm):
                with pytest.raises(TypeError, match="normalized_shape"):
                    norm(X, wrong)
        for wrong in (1.0, True, "a", (0,), None):
            with pytest.raises(TypeError, match="dim is"):
                f.softmax(X, wrong)
        assert torch.equal(f.softmax(X, torch.tensor(1)), f.softmax(X, 1))
        with pytest.raises(ValueError, match="must have at least 1 dim"):
            f.rms_norm(X[0, 0, 0], (8,))


def test_norms_of_integers_are_refused_as_in_torch():
    for wrong in (X.long(), X.bool()):
        for norm in (f.layer_norm, f.rms_norm):
            with pytest.raises((RuntimeError, NotImplementedError), match="not implemented|datatype|promote"):
                norm(wrong, (8,), W)
            with backend.use_backend("triton"), pytest.raises(NotImplementedError, match="dtype"):
                norm(wrong, (8,), W)
    with pytest.raises(RuntimeError, match="scalar type"):
        f.layer_norm(X, (8,), W, W.long())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_torchs_business():
    nested = torch.nested.nested_tensor([X[0], X[1, :2]])
    for ours, stock, args in (
        (f.layer_norm, torch.nn.functional.layer_norm, ((8,), W, W)),
        (f.softmax, torch.softmax, (-1,)),
    ):
        for pair in zip(ours(nested, *args).unbind(), stock(nested, *args).unbind(), strict=True):
            assert torch.equal(*pair)
        with backend.use_backend("triton"), pytest.raises(NotImplementedError, match="nested tensors"):
            ours(nested, *args)


def test_bfloat16_in_the_interpreter_needs_nothing_else():
    code = """
import torch, fastattn
x = torch.linspace(-3, 3, 64).bfloat16().view(4, 16)
with fastattn.use_backend("triton"):
    y = fastattn.functional.softmax(x)
torch.testing.assert_close(y, x.softmax(-1))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
