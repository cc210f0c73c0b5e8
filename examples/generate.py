"""Go on with a text, with GPT-2 or any checkpoint of its layout.

    python examples/generate.py FOLDER "Once upon a time" [--tokens 40] [--temperature 0.8] [--top-p 0.95] [--seed 0]

FOLDER holds config.json, model.safetensors and tokenizer.json, as transformers saves them (`gpt2` on its hub; nothing is
downloaded here). Temperature 0 takes the likeliest token each time.
"""

import argparse

import torch
from tokenizers import Tokenizer

from fastattn.models import GPT


def load(folder):
    return GPT.from_pretrained(folder), Tokenizer.from_file(f"{folder}/tokenizer.json")


def go_on(model, tokenizer, prompts, tokens=40, **sampling):
    """Each prompt with what the model writes behind it. Prompts of different lengths are padded on the left, and masked."""
    tokenizer.enable_padding(direction="left")
    found = tokenizer.encode_batch(prompts)
    ids = torch.tensor([e.ids for e in found])
    written = model.generate(
        ids, tokens, attention_mask=torch.tensor([e.attention_mask for e in found]), **sampling
    )
    return [
        p + tokenizer.decode(row) for p, row in zip(prompts, written[:, ids.shape[1] :].tolist(), strict=True)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sampling = dict(temperature=options.temperature, top_p=options.top_p)
    generator = torch.Generator().manual_seed(options.seed)
    (text,) = go_on(*load(options.folder), [options.prompt], options.tokens, generator=generator, **sampling)
    print(text)
