"""The encoder-decoder of "Attention Is All You Need" (arXiv 1706.03762), learning to write a sequence backwards.

    python examples/reverse.py [--steps 400]

Sequences of 3 to 10 symbols, padded to a batch: the encoder reads one, the decoder writes it in reverse, a symbol at a time.
Whoever guesses gets one symbol in sixteen right, and whole sequences never.
"""

import argparse
import math

import torch
from torch.nn.functional import cross_entropy

import fastattn

PAD, BEGIN, END, FIRST = 0, 1, 2, 3  # symbols are FIRST .. FIRST + 15
SYMBOLS, LONGEST = 16, 10


class Seq2Seq(torch.nn.Module):
    def __init__(self, vocab, width=64, heads=4, layers=2):
        super().__init__()
        self.embed = torch.nn.Embedding(vocab, width, padding_idx=PAD)
        torch.nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.positions = fastattn.nn.SinusoidalPositionalEncoding(width, scale=math.sqrt(width))
        self.transformer = fastattn.nn.Transformer(
            width, heads, layers, layers, 4 * width, dropout=0.0, batch_first=True
        )

    def encode(self, source):
        return self.transformer.encoder(
            self.positions(self.embed(source)), src_key_padding_mask=source == PAD
        )

    def decode(self, memory, source, target):
        """Logits (B, T, V) of the symbol behind each of target (B, T), which sees itself, what is before it, and the source."""
        T = target.shape[1]
        later = torch.ones(T, T, dtype=torch.bool, device=target.device).triu(
            1
        )  # torch's masks: True = ignore
        x = self.transformer.decoder(
            self.positions(self.embed(target)),
            memory,
            tgt_mask=later,
            tgt_is_causal=True,
            memory_key_padding_mask=source == PAD,
        )
        return x @ self.embed.weight.T  # the head is the table, as in the paper

    def forward(self, source, target):
        return self.decode(self.encode(source), source, target)

    @torch.no_grad()
    def write(self, source):
        """Greedy: (B, LONGEST + 1) symbols."""
        memory = self.encode(source)
        target = torch.full_like(source[:, :1], BEGIN)
        for _ in range(LONGEST + 1):
            target = torch.cat([target, self.decode(memory, source, target)[:, -1:].argmax(-1)], dim=1)
        return target[:, 1:]


def batch(size, generator):
    """Sources (size, LONGEST) and what to write, (size, LONGEST + 1), both padded on the right."""
    lengths = torch.randint(3, LONGEST + 1, (size, 1), generator=generator)
    symbols = torch.randint(FIRST, FIRST + SYMBOLS, (size, LONGEST), generator=generator)
    at = torch.arange(LONGEST + 1)
    source = symbols.masked_fill(at[:-1] >= lengths, PAD)
    wanted = symbols.gather(1, (lengths - 1 - at).clamp(0, LONGEST - 1))
    return source, wanted.masked_fill(at > lengths, PAD).masked_fill(at == lengths, END)


def train(steps=400, size=64, seed=0, report=print):
    """The trained model and (share of symbols, share of whole sequences) that it gets right on sequences it has not seen."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Seq2Seq(FIRST + SYMBOLS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        source, wanted = batch(size, generator)
        begun = torch.cat([torch.full((size, 1), BEGIN), wanted[:, :-1]], dim=1)
        loss = cross_entropy(model(source, begun).flatten(0, 1), wanted.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            report(f"step {step + 1}: loss {loss:.3f}")
    model.eval()
    source, wanted = batch(256, torch.Generator().manual_seed(seed + 1))
    right = (model.write(source) == wanted) | (wanted == PAD)
    symbols = right[wanted != PAD].float().mean().item()
    return model, (symbols, right.all(1).float().mean().item())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    _, (symbols, whole) = train(parser.parse_args().steps)
    print(f"right: {symbols:.1%} of the symbols, {whole:.1%} of the sequences")
