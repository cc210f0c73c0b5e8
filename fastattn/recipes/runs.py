"""The folder of a run: log.jsonl, and a folder step-0000100 for each checkpoint, which is there whole or not at all.

A checkpoint is a model as its save_pretrained writes it, with whatever the recipe adds, and the state of its training:
training.safetensors (the optimizer's tensors and the generators' states) and training.json (where it stood).
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile

from fastattn.models.checkpoint import CheckpointError, read, replacing

LOG, NUMBERS, TENSORS = "log.jsonl", "training.json", "training.safetensors"
STOOD = ("step", "tokens", "position", "elapsed", "usual_norm", "loss", "run")  # what training.json has


def checkpoints(out):
    """The checkpoints of a run, oldest first."""
    found = pathlib.Path(out).glob("step-*")
    return sorted(
        (f for f in found if re.fullmatch(r"step-\d+", f.name)), key=lambda f: int(f.name.split("-")[1])
    )


def newest(out):
    """The last checkpoint of a run; of a folder that is a checkpoint itself, that folder."""
    found = checkpoints(out)
    return found[-1] if found else pathlib.Path(out)


@contextlib.contextmanager
def new_checkpoint(out, step, keep=None):
    """A folder to write a checkpoint to, which becomes step-<step> when the block ends well and vanishes otherwise.

    Of older ones the last `keep` - 1 stay, all of them if keep is None.
    """
    out = pathlib.Path(out)
    target = out / f"step-{step:07d}"
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=out))
    try:
        yield temporary
        os.chmod(temporary, out.stat().st_mode & 0o777)  # mkdtemp's own is for its user alone
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep is not None:
        for old in [f for f in checkpoints(out) if f != target][: -(keep - 1) or None]:
            shutil.rmtree(old)


def write_training(folder, numbers, tensors):
    from safetensors.torch import save_file

    with replacing(folder / TENSORS) as stored, replacing(folder / NUMBERS) as described:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, stored)
        described.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def read_training(folder):
    """(numbers, tensors by name) of a checkpoint."""
    folder = pathlib.Path(folder)
    for name in (NUMBERS, TENSORS):
        if not (folder / name).exists():
            raise CheckpointError(f"{folder}: has no {name}, so its training cannot be taken up again")
    try:
        numbers = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{folder / NUMBERS}: cannot be read as JSON ({e})") from e
    if absent := [name for name in STOOD if not (isinstance(numbers, dict) and name in numbers)]:
        raise CheckpointError(f"{folder / NUMBERS}: lacks {', '.join(absent)}")
    return numbers, read(folder / TENSORS)[1]


def begin_log(out, header, after=None):
    """log.jsonl of a run, whose lines beyond step `after`, which a resumed run takes again, are dropped. Open for writing."""
    path = pathlib.Path(out) / LOG
    kept = []
    if after is not None and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed run may be half written
                if json.loads(line).get("step", 0) <= after:
                    kept.append(line)
    with replacing(path) as whole:
        whole.write_text("".join(f"{line}\n" for line in [*kept, json.dumps(header)]), encoding="utf-8")
    return open(path, "a", encoding="utf-8", buffering=1)
