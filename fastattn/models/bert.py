"""BERT, post-norm: fused embeddings, blocks of attention and MLP whose every sum is normalised in the same op, and its heads.

A batch's padding is taken out once, before the embeddings, and put back once, as zeros, after the last block; between the
two there are only the T tokens, one sequence after another, so that padding costs nothing. Under torch.compile, whose
graphs want shapes that do not depend on data, and with unpad=False the mask goes to attention instead.

Parameters are named as in the published checkpoints, but for query, key and value, which are one matrix, qkv; the masked
language model's decoder is the token table and has no entry of its own.

Letters: B batch, S length, T tokens without padding, C width, H heads, D = C / H, V vocabulary.
"""

import dataclasses
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    dropout,
    linear,
    mse_loss,
    normalize,
    pad,
)

from fastattn import functional as F
from fastattn.models import checkpoint, training
from fastattn.nn import Embeddings, LayerNorm

SIZES = {
    "tiny": dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=64, intermediate_size=256, max_position_embeddings=128,
                 vocab_size=512),
    "minilm": dict(num_hidden_layers=6, hidden_size=384, intermediate_size=1536),  # 23 M parameters
    "bert-base": dict(),  # 110 M
    "bert-large": dict(num_hidden_layers=24, num_attention_heads=16, hidden_size=1024, intermediate_size=4096),  # 335 M
}  # fmt: skip
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclass
class BERTConfig:
    """The fields of a checkpoint's config.json that say what is computed, under the same names."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    num_labels: int = 2
    id2label: dict[int, str] | None = (
        None  # what a classifier's outputs mean; not kept where num_labels is another count
    )

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"BERTConfig: hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"BERTConfig: hidden_act is {self.hidden_act!r}, must be one of {', '.join(ACTIVATIONS)}"
            )
        if self.id2label is None or len(self.id2label) != self.num_labels:
            self.id2label = {i: f"LABEL_{i}" for i in range(self.num_labels)}

    @classmethod
    def from_json(cls, found):
        """The config that a checkpoint's config.json describes; CheckpointError where this model cannot be that one."""
        for field, wanted in (("model_type", "bert"), ("position_embedding_type", "absolute"), ("is_decoder", False),
                              ("add_cross_attention", False), ("tie_word_embeddings", True)):  # fmt: skip
            if found.get(field, wanted) != wanted:
                raise checkpoint.CheckpointError(
                    f"BERT: the checkpoint's {field} is {found[field]!r}, this model's is {wanted!r}"
                )
        if "hidden_size" not in found:
            raise checkpoint.CheckpointError(
                "BERT: the checkpoint's config has no hidden_size; is it BERT's?"
            )
        known = {f.name: found[f.name] for f in dataclasses.fields(cls) if f.name in found}
        try:
            return cls(**known | checkpoint.label_fields(found))
        except (AttributeError, TypeError, ValueError) as e:
            raise checkpoint.CheckpointError(
                f"BERT: the checkpoint's config does not describe a model: {e}"
            ) from e

    def to_json(self, architecture):
        fields = dataclasses.asdict(self)
        del fields["num_labels"]  # transformers counts id2label
        return fields | {
            "model_type": "bert",
            "architectures": [architecture],
            "label2id": {label: i for i, label in self.id2label.items()},
        }


class AddNorm(nn.Module):
    """LayerNorm(residual + dropout(dense(x)))."""

    def __init__(self, config, width):
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x, residual):
        norm, p = self.LayerNorm, self.dropout if self.training else 0.0
        affine = (norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return F.add_layer_norm(self.dense(x), residual, *affine, dropout_p=p)


class DenseGelu(nn.Module):
    """gelu(dense(x)), the bias added by the op that computes gelu."""

    def __init__(self, config, width):
        super().__init__()
        self.approximate = ACTIVATIONS[config.hidden_act]
        self.dense = nn.Linear(config.hidden_size, width)

    def forward(self, x):
        return F.bias_gelu(linear(x, self.dense.weight), self.dense.bias, self.approximate)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = AddNorm(config, config.hidden_size)

    def forward(self, x, packed, masks):
        """x (B, S, C) with masks of functional.attention, or (T, C) with packed = (cu_seqlens, longest)."""
        p = self.dropout if self.training else 0.0
        q, k, v = self.qkv(x).view(*x.shape[:-1], 3, self.heads, x.shape[-1] // self.heads).unbind(-3)
        if packed is not None:
            cu_seqlens, longest = packed
            o = F.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest, dropout_p=p)
        else:
            q_BHSD, k_BHSD, v_BHSD = (t.transpose(1, 2) for t in (q, k, v))
            o = F.attention(q_BHSD, k_BHSD, v_BHSD, dropout_p=p, **masks).transpose(1, 2)
        return self.output(o.flatten(-2), x)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = DenseGelu(config, config.intermediate_size)
        self.output = AddNorm(config, config.intermediate_size)

    def forward(self, x, packed, masks):
        x = self.attention(x, packed, masks)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x, packed, masks):
        for layer in self.layer:
            x = layer(x, packed, masks)
        return x


class Pooler(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BSC, attention_mask=None):
        """tanh(dense(first token)) (B, C). With a (B, S) mask the first token is the first that it keeps."""
        if attention_mask is None or attention_mask.dim() != 2:
            first_BC = hidden_BSC[:, 0]
        else:
            rows_B = torch.arange(len(hidden_BSC), device=hidden_BSC.device)
            first_BC = hidden_BSC[rows_B, (attention_mask != 0).int().argmax(1)]
        return torch.tanh(self.dense(first_BC))


class Pretrained(nn.Module):
    """Reading and writing of checkpoints in transformers' layout, for BERT and for the models around it."""

    architecture = "BertModel"  # transformers' name for it

    @classmethod
    def from_pretrained(cls, source, *, device=None, dtype=torch.float32, **overrides):
        """The model of a checkpoint folder (config.json, safetensors) or of a transformers BERT model, in evaluation mode.

        overrides: fields of BERTConfig, e.g. num_labels=3. Weights may lack the "bert." prefix and use the old names gamma and
        beta. A head (or pooler) that the checkpoint lacks starts anew, with a warning that names its parameters; heads
        of other tasks are left out. Anything else that does not fit raises CheckpointError, and so does a file that cannot be read.
        """
        if isinstance(source, nn.Module):
            config, state = source.config.to_dict(), source.state_dict()
        else:
            config, state = checkpoint.read(source)
        model = cls(dataclasses.replace(BERTConfig.from_json(config), **overrides)).to(device, dtype)
        ours = model.state_dict()
        prefix = "bert." if any(name.startswith("bert.") for name in ours) else ""

        def rename(name):
            name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
            name = name.replace("LayerNorm.beta", "LayerNorm.bias")
            return prefix + name if name.startswith(("embeddings.", "encoder.", "pooler.")) else name

        heads = ("cls.", "classifier.", "qa_outputs.", f"{prefix}pooler.")
        stored = fuse_qkv({name: state[name] for name in state})
        stored = {
            name: t
            for name, t in stored.items()
            if rename(name) in ours or not rename(name).startswith(heads)
        }
        lacking = checkpoint.load_into(
            model, stored, rename=rename, drop=("position_ids", "token_type_ids"), optional=heads
        )
        if lacking:
            warnings.warn(
                f"{cls.__name__}: the checkpoint lacks {', '.join(lacking)}, which start anew and need training",
                stacklevel=2,
            )
        return model.eval()

    def save_pretrained(self, directory):
        """config.json and model.safetensors, which transformers' class `architecture` reads, and from_pretrained."""
        checkpoint.write(directory, self.config.to_json(self.architecture), split_qkv(self.state_dict()))


def fuse_qkv(state):
    """A checkpoint's query, key and value, where all three are there, as one qkv."""
    fused = dict(state)
    for name in state:
        if ".self.query." in name:
            parts = [name.replace(".self.query.", f".self.{part}.") for part in ("query", "key", "value")]
            if all(part in fused for part in parts):
                fused[name.replace(".self.query.", ".qkv.")] = torch.cat([fused.pop(part) for part in parts])
    return fused


def split_qkv(state):
    split = {}
    for name, t in state.items():
        if ".qkv." not in name:
            split[name] = t
            continue
        for part, third in zip(("query", "key", "value"), t.chunk(3), strict=True):
            split[name.replace(".qkv.", f".self.{part}.")] = third.clone()  # a file's tensors share no memory
    return split


def start(model, std):
    """N(0, std) for matrices and tables, the padding token's row 0, biases 0."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            module._fill_padding_idx_with_zero()


class BERT(Pretrained):
    """hidden = BERT(BERTConfig(**SIZES["bert-base"]))(input_ids, attention_mask); pooled = model.pooler(hidden, attention_mask)."""

    def __init__(self, config, pooler=True):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(
            config.vocab_size, config.hidden_size, config.max_position_embeddings, config.type_vocab_size,
            eps=config.layer_norm_eps, padding_idx=config.pad_token_id, dropout=config.hidden_dropout_prob,
        )  # fmt: skip
        self.encoder = Encoder(config)
        if pooler:
            self.pooler = Pooler(config)
        start(self, config.initializer_range)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, unpad=True):
        """What the last block leaves, (B, S, C), for input_ids (B, S).

        attention_mask: (B, S), 0 or False where there is padding, on whichever side; or (B or 1, H or 1, S, S), bool or
        integer with 0 = ignore, or floating and added to the scores. token_type_ids and position_ids broadcast to (B, S); absent
        ones are 0 and 0 .. S-1, whatever the padding. Padding's rows of the result are 0, with unpad=False undefined.
        Taking padding out reads its lengths from the device.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"BERT: input_ids is {tuple(input_ids.shape)}, must be (B, S)")
        longest = self.config.max_position_embeddings
        if position_ids is None and input_ids.shape[1] > longest:
            raise ValueError(
                f"BERT: {input_ids.shape[1]} tokens, but max_position_embeddings is {longest}; shorten the input"
            )
        masks = {}
        if attention_mask is not None and attention_mask.dim() == 4:
            masks = (
                {"bias": attention_mask}
                if attention_mask.is_floating_point()
                else {"mask": attention_mask != 0}
            )
        elif attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"BERT: attention_mask is {tuple(attention_mask.shape)}, must be (B, S) like input_ids, "
                    f"{tuple(input_ids.shape)}, or have 4 dims"
                )
            keep_BS = attention_mask != 0
            if unpad and not torch.compiler.is_compiling():
                rows_T = keep_BS.flatten().nonzero().squeeze(1)
                if len(rows_T) < keep_BS.numel():
                    return self._without_padding(input_ids, token_type_ids, position_ids, keep_BS, rows_T)
            else:
                masks = {"mask": keep_BS[:, None, None]}
        return self.encoder(self.embeddings(input_ids, token_type_ids, position_ids), None, masks)

    def _without_padding(self, input_ids, token_type_ids, position_ids, keep_BS, rows_T):
        B, S = keep_BS.shape
        lens_B = keep_BS.sum(1)
        packed = pad(lens_B.cumsum(0), (1, 0)).int(), int(lens_B.max())
        if position_ids is None:
            position_ids = torch.arange(S, device=input_ids.device)
        types_T, positions_T = (
            t if t is None else t.expand(B, S).flatten()[rows_T] for t in (token_type_ids, position_ids)
        )
        x_TC = self.embeddings(input_ids.flatten()[rows_T], types_T, positions_T)
        x_TC = self.encoder(x_TC, packed, {})
        return x_TC.new_zeros(B * S, x_TC.shape[1]).index_copy(0, rows_T, x_TC).view(B, S, -1)


class BERTForSentenceEmbedding(BERT):
    """Mean of the tokens' last hidden states, of length 1: what sentence-transformers' MiniLM and its kin compute."""

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, unpad=True):
        """(B, C) in fp32, so that a dot product of two rows is their cosine; attention_mask (B, S) or None."""
        hidden_BSC = super().forward(input_ids, attention_mask, token_type_ids, position_ids, unpad).float()
        if attention_mask is None:
            return normalize(hidden_BSC.mean(1), dim=-1)
        keep_BS1 = (attention_mask != 0)[..., None]
        return normalize(
            hidden_BSC.masked_fill(~keep_BS1, 0.0).sum(1), dim=-1
        )  # of length 1 whatever the count


class Task(Pretrained):
    """A BERT under a head. Labels are optional; without them the loss is None. A label of -100 does not count, and where none
    counts the loss is 0. Further arguments of forward (token_type_ids, position_ids, unpad) are BERT's.
    """

    pooler = False  # whether the head reads BERT's pooler

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = BERT(config, self.pooler)
        self.add_head(config)
        start(self, config.initializer_range)

    def pooled(self, input_ids, attention_mask, inputs):
        return self.bert.pooler(self.bert(input_ids, attention_mask, **inputs), attention_mask)

    def drop(self, x):
        config = self.config
        p = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        return dropout(x, p, self.training)


class Transform(DenseGelu):
    def __init__(self, config):
        super().__init__(config, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x):
        return self.LayerNorm(super().forward(x))


class Predictions(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_BSC, table_VC, labels_BS=None):
        """(logits (B, S, V), None), or with labels (logits of the M places whose label is not -100 (M, V), loss)."""
        if labels_BS is None:
            return linear(self.transform(hidden_BSC), table_VC, self.bias), None
        chosen_BS = labels_BS != -100
        logits_MV = linear(self.transform(hidden_BSC[chosen_BS]), table_VC, self.bias)
        return logits_MV, mean_cross_entropy(logits_MV, labels_BS[chosen_BS])


def mean_cross_entropy(logits, labels):
    """Over the labels that are not -100; 0 where there is none."""
    total = cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


class BERTForMaskedLM(Task):
    """forward(input_ids, attention_mask, labels) -> logits, loss.

    labels (B, S): the token to find at each place, -100 elsewhere; then only those M places are projected onto the
    vocabulary, and logits are (M, V) in reading order. Without labels they are (B, S, V).
    """

    architecture = "BertForMaskedLM"

    def add_head(self, config):
        self.cls = nn.ModuleDict({"predictions": Predictions(config)})

    def forward(self, input_ids, attention_mask=None, labels=None, **inputs):
        hidden_BSC = self.bert(input_ids, attention_mask, **inputs)
        return self.cls["predictions"](hidden_BSC, self.bert.embeddings.word_embeddings.weight, labels)


class BERTForNextSentencePrediction(Task):
    """forward(input_ids, attention_mask, labels) -> logits (B, 2), loss; label 0: the second segment continues the first."""

    architecture, pooler = "BertForNextSentencePrediction", True

    def add_head(self, config):
        self.cls = nn.ModuleDict({"seq_relationship": nn.Linear(config.hidden_size, 2)})

    def forward(self, input_ids, attention_mask=None, labels=None, **inputs):
        logits_B2 = self.cls["seq_relationship"](self.pooled(input_ids, attention_mask, inputs))
        return logits_B2, None if labels is None else mean_cross_entropy(logits_B2, labels)


class BERTForPreTraining(Task):
    """forward(input_ids, attention_mask, labels, next_sentence_label) -> (token logits, next-sentence logits (B, 2)), loss.

    Both tasks at once, as in BERTForMaskedLM and BERTForNextSentencePrediction; the loss is the sum of those whose labels are given.
    """

    architecture, pooler = "BertForPreTraining", True

    def add_head(self, config):
        heads = {"predictions": Predictions(config), "seq_relationship": nn.Linear(config.hidden_size, 2)}
        self.cls = nn.ModuleDict(heads)

    def forward(self, input_ids, attention_mask=None, labels=None, next_sentence_label=None, **inputs):
        hidden_BSC = self.bert(input_ids, attention_mask, **inputs)
        table_VC = self.bert.embeddings.word_embeddings.weight
        logits, loss = self.cls["predictions"](hidden_BSC, table_VC, labels)
        logits_B2 = self.cls["seq_relationship"](self.bert.pooler(hidden_BSC, attention_mask))
        if next_sentence_label is not None:
            loss = (0.0 if loss is None else loss) + mean_cross_entropy(logits_B2, next_sentence_label)
        return (logits, logits_B2), loss

    def flops_per_token(self, T=None, predicted=0.15):
        """Floating-point operations of training on one token of a sequence of T (all positions by default).

        6 for each weight of a product and 12 C for each of the T keys; the token head's count for the `predicted` share of
        the tokens, the pooler's and the next-sentence head's for one token in T. Embeddings are no product.
        """
        config, T = self.config, T or self.config.max_position_embeddings

        def weights(module):
            return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))

        words = weights(self.cls["predictions"]) + self.bert.embeddings.word_embeddings.weight.numel()
        once = weights(self.bert.pooler) + weights(self.cls["seq_relationship"])
        products = weights(self.bert.encoder) + predicted * words + once / T
        return 6 * products + 12 * config.hidden_size * T * config.num_hidden_layers

    def mfu(self, tokens_per_second, T=None, devices=1):
        """Share of the peak of `devices` GPUs like this model's; None, to be printed as n/a, for one whose peak is not known.

        Tokens are those that are not padding. Sequences shorter than T are counted as if T long in attention.
        """
        device = self.bert.embeddings.word_embeddings.weight.device
        return training.mfu(self.flops_per_token(T), tokens_per_second, device, devices)


class BERTForSequenceClassification(Task):
    """forward(input_ids, attention_mask, labels) -> logits (B, num_labels), loss.

    labels: (B,) integers; (B, num_labels) floating, each label by itself (binary cross-entropy); (B,) numbers where
    num_labels is 1, which is regression (squared error).
    """

    architecture, pooler = "BertForSequenceClassification", True

    def add_head(self, config):
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids, attention_mask=None, labels=None, **inputs):
        logits_BN = self.classifier(self.drop(self.pooled(input_ids, attention_mask, inputs)))
        if labels is None:
            return logits_BN, None
        if self.config.num_labels == 1:
            return logits_BN, mse_loss(logits_BN.flatten().float(), labels.flatten().float())
        if labels.is_floating_point():
            return logits_BN, binary_cross_entropy_with_logits(logits_BN.float(), labels.float())
        return logits_BN, mean_cross_entropy(logits_BN, labels)


class BERTForTokenClassification(Task):
    """forward(input_ids, attention_mask, labels) -> logits (B, S, num_labels), loss; labels (B, S)."""

    architecture = "BertForTokenClassification"

    def add_head(self, config):
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids, attention_mask=None, labels=None, **inputs):
        logits_BSN = self.classifier(self.drop(self.bert(input_ids, attention_mask, **inputs)))
        return logits_BSN, None if labels is None else mean_cross_entropy(logits_BSN, labels)


class BERTForQuestionAnswering(Task):
    """forward(input_ids, attention_mask, start_positions, end_positions) -> (start logits, end logits) (B, S) each, loss.

    Padding's logits are the dtype's lowest, so that no answer lies there. A position (B,) that is negative or S and above does
    not count; the loss is the mean of both ends'.
    """

    architecture = "BertForQuestionAnswering"

    def add_head(self, config):
        self.config = dataclasses.replace(
            config, num_labels=2
        )  # transformers has the head's width from there
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def forward(self, input_ids, attention_mask=None, start_positions=None, end_positions=None, **inputs):
        logits_BS2 = self.qa_outputs(self.bert(input_ids, attention_mask, **inputs))
        if attention_mask is not None and attention_mask.dim() == 2:
            lowest = torch.finfo(logits_BS2.dtype).min
            logits_BS2 = logits_BS2.masked_fill((attention_mask == 0)[..., None], lowest)
        ends = logits_BS2.unbind(-1)
        if start_positions is None or end_positions is None:
            return ends, None
        loss = 0.0
        for logits_BS, labels_B in zip(ends, (start_positions, end_positions), strict=True):
            outside = (labels_B < 0) | (labels_B >= logits_BS.shape[1])
            loss = loss + mean_cross_entropy(logits_BS, labels_B.masked_fill(outside, -100)) / 2
        return ends, loss


class BERTForMultipleChoice(Task):
    """forward(input_ids (B, N, S), attention_mask (B, N, S), labels (B,)) -> logits (B, N), loss, for N choices a question."""

    architecture, pooler = "BertForMultipleChoice", True

    def add_head(self, config):
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, input_ids, attention_mask=None, labels=None, **inputs):
        B, N, _ = input_ids.shape
        input_ids, attention_mask = (t if t is None else t.flatten(0, 1) for t in (input_ids, attention_mask))
        inputs = {
            name: t.flatten(0, 1) if isinstance(t, torch.Tensor) and t.dim() == 3 else t
            for name, t in inputs.items()
        }
        pooled_C = self.drop(self.pooled(input_ids, attention_mask, inputs))
        logits_BN = self.classifier(pooled_C).view(B, N)
        return logits_BN, None if labels is None else mean_cross_entropy(logits_BN, labels)
