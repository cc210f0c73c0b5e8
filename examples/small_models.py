"""A small GPT and a small BERT from nothing: what goes in, what comes out, how each is trained. Takes half a minute on a CPU.

    python examples/small_models.py

Sketches of the two often start from torch.nn.Transformer(hidden_size, num_layers) and call it on token embeddings. That
is another model: its second argument is the number of heads, it builds six encoder and six decoder layers, it wants a
target beside the source, and it has no positions, no causal mask and no head. A GPT is a decoder alone, in which no token
sees a later one; a BERT is an encoder alone, in which every token sees every other.
"""

import torch

from fastattn.models import GPT, BERTConfig, GPTConfig
from fastattn.models.bert import BERTForMaskedLM

VOCAB, BATCH, LENGTH, STEPS = 28, 32, 16, 350
PAD, MASK = 0, 1


def counting(generator):
    """(BATCH, LENGTH + 1) tokens, each the one before it plus a step that is the sequence's own: what there is to learn."""
    start = torch.randint(0, 26, (BATCH, 1), generator=generator)
    step = torch.randint(1, 4, (BATCH, 1), generator=generator)
    return 2 + (start + step * torch.arange(LENGTH + 1)) % 26


def train(model, batches):
    """Loss of the first and the last step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.2)
    losses = []
    for inputs in batches:
        _, loss = model(*inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses[0], losses[-1]


def small_gpt():
    """Next-token prediction: the target of each place is the token behind it. Returns the losses and what it writes."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(vocab_size=VOCAB, n_layer=2, n_head=4, n_embd=64, n_positions=LENGTH))
    sequences = (counting(generator) for _ in range(STEPS))
    losses = train(model, ((s[:, :-1], s[:, 1:]) for s in sequences))
    prompt = torch.tensor([[10, 12, 14, 16]])
    return losses, model.generate(prompt, max_new_tokens=6, temperature=0)[0].tolist()


def small_bert():
    """Masked tokens: three in ten are covered (a large BERT: 15 in 100), and those alone are predicted. Returns the losses and what it puts under a mask."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = BERTConfig(
        vocab_size=VOCAB, num_hidden_layers=2, num_attention_heads=4, hidden_size=64, intermediate_size=256,
        max_position_embeddings=LENGTH, initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BERTForMaskedLM(config)

    def batches():
        for _ in range(STEPS):
            ids = counting(generator)[:, :-1]
            lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1), generator=generator)
            attention_mask = torch.arange(LENGTH) < lengths  # 1 or True: a token, 0 or False: padding
            covered = attention_mask & (torch.rand(BATCH, LENGTH, generator=generator) < 0.3)
            labels = ids.masked_fill(~covered, -100)
            yield ids.masked_fill(covered, MASK).masked_fill(~attention_mask, PAD), attention_mask, labels

    losses = train(model, batches())
    question = torch.tensor([[10, 11, 12, MASK, 14, 15, 16, 17]])
    logits, _ = model(question)
    return losses, logits[0, 3].argmax().item()


if __name__ == "__main__":
    (first, last), written = small_gpt()
    print(f"GPT: loss {first:.2f} -> {last:.2f}; 10 12 14 16 goes on as {written[4:]}")
    (first, last), found = small_bert()
    print(f"BERT: loss {first:.2f} -> {last:.2f}; between 12 and 14 it puts {found}")
