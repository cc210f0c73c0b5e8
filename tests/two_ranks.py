"""Started by torchrun from test_train.py: the run of `settings` as "ddp" and as "fsdp", each in its folder of sys.argv[1]."""

import dataclasses
import pathlib
import sys

import torch

from fastattn.recipes import loop, parallel, runs

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import test_train as alone

if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1])
    with parallel.processes(torch.device("cpu")) as found:
        for kind in parallel.KINDS:
            us = dataclasses.replace(found, kind=kind)
            for steps in (1, 4):  # the second goes on where the first ended
                model, resume = alone.plain_gpt(), None
                if steps == 4:
                    resume = runs.newest(out / kind)
                    model = alone.GPT.from_pretrained(resume)
                ours = dict(rank=us.rank, world=us.world, size=2)
                options = loop.Options(steps=steps, **alone.TOGETHER)
                loop.run(
                    model,
                    alone.uneven(**ours),
                    options,
                    out / kind,
                    processes=us,
                    validation=alone.uneven(**ours),
                    resume=resume,
                )
