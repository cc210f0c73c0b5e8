"""Checkpoints as transformers has them: a folder with config.json beside model.safetensors, or beside shards and their index.

Only safetensors: the format holds tensors and nothing that could run. Whatever is wrong with a checkpoint is one
CheckpointError that names the file. A file is written whole under a temporary name and then put in place, so that
whoever is interrupted leaves the old one.
"""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping

import torch

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model."""


def read(path):
    """(config, state) of a folder, or of one .safetensors file, beside which config.json may be missing (config is {} then).

    state is a mapping of names to tensors on the CPU; a tensor's bytes are read when they are used.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    folder = path if path.is_dir() else path.parent
    config_file = folder / CONFIG
    if path.is_dir() and not config_file.exists():
        raise CheckpointError(f"{path}: has no {CONFIG}, so what model it is cannot be known")
    config = _read_json(config_file) if config_file.exists() else {}
    return config, Stored(_files(path))


def label_fields(config):
    """num_labels and id2label of a config.json that names what a classifier's outputs mean, as a model's config has them."""
    names = config.get("id2label")
    if not names:
        return {}
    return {
        "num_labels": len(names),
        "id2label": {int(i): name for i, name in names.items()},
    }  # JSON's keys are text


def _files(path):
    """{name: the file that holds it, None for whatever the file has}."""
    if not path.is_dir():
        return {None: path}
    if (path / WEIGHTS).exists():
        return {None: path / WEIGHTS}
    if not (path / INDEX).exists():
        others = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        hint = f"; {', '.join(others)} is a pickle, which can run code: convert it" if others else ""
        raise CheckpointError(f"{path}: has neither {WEIGHTS} nor {INDEX}{hint}")
    shards = _read_json(path / INDEX).get("weight_map")
    if not (isinstance(shards, dict) and all(isinstance(f, str) for f in shards.values())):
        raise CheckpointError(f"{path / INDEX}: has no weight_map of names to files")
    for file in sorted(set(shards.values())):
        if pathlib.PurePath(file).name != file:
            raise CheckpointError(f"{path / INDEX}: names {file!r}, which is not a file of its own folder")
        if not (path / file).exists():
            raise CheckpointError(f"{path / INDEX}: names {file}, which is missing")
    return {name: path / file for name, file in shards.items()}


class Stored(Mapping):
    """Names and tensors of safetensors files, which stay open as long as this lives."""

    def __init__(self, files):
        self._open = {file: _open(file) for file in dict.fromkeys(files.values())}
        if None in files:
            (file,) = self._open
            files = dict.fromkeys(self._open[file].keys(), file)
        for file, names in self._open.items():
            absent = [name for name, f in files.items() if f == file and name not in set(names.keys())]
            if absent:
                raise CheckpointError(f"{file}: lacks {_some(absent)}, which the index says it has")
        self._files = files

    def __getitem__(self, name):
        return self._open[self._files[name]].get_tensor(name)

    def __iter__(self):
        return iter(self._files)

    def __len__(self):
        return len(self._files)


def _open(file):
    safetensors = _safetensors()
    try:
        return safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as e:
        raise CheckpointError(f"{file}: cannot be read, it may be cut off or another format ({e})") from e


def _read_json(file):
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:  # what is not UTF-8 is a ValueError too
        raise CheckpointError(f"{file}: cannot be read as JSON ({e})") from e
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a {type(found).__name__}, needs an object")
    return found


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as e:
        raise ImportError("checkpoints are safetensors files: pip install safetensors") from e
    return safetensors


def write(directory, config, state):
    """config.json and model.safetensors in a folder, made if need be; both are written before either replaces an older one.

    config: what JSON can hold; state: names to tensors, any device, no two sharing memory.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    # a safetensors file holds contiguous tensors: what is not becomes a copy
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    with replacing(directory / WEIGHTS) as weights, replacing(directory / CONFIG) as described:
        _safetensors().torch.save_file(tensors, weights, metadata={"format": "pt"})
        described.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path):
    """A temporary file's path to write to, which takes `path`'s place when the block ends well and is deleted otherwise."""
    path = pathlib.Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's own is for its user alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_into(model, state, *, rename=None, transpose=(), drop=(), optional=()):
    """Copy a checkpoint's tensors into model's parameters and buffers, or raise CheckpointError and change nothing.

    rename: a function of the stored name that gives the model's. transpose: endings of model names whose matrices are
    stored transposed. drop: endings of stored names that are not wanted. optional: beginnings of model names, such as a
    new head's, that a checkpoint may lack. Returns the optional names that it did lack. Tensors become the model's dtype.
    """
    ours, found = model.state_dict(), {}
    unexpected, twice, misshaped = [], [], []
    for stored in state:
        if stored.endswith(tuple(drop)):
            continue
        name = rename(stored) if rename else stored
        if name not in ours:
            unexpected.append(stored)
        elif name in found:
            twice.append(stored)
        else:
            t = state[stored]
            t = t.T if name.endswith(tuple(transpose)) and t.dim() == 2 else t
            if t.shape != ours[name].shape:
                misshaped.append(
                    f"{stored} {tuple(state[stored].shape)} for {name} {tuple(ours[name].shape)}"
                )
            found[name] = t
    lacking = [name for name in ours if name not in found]
    left = [name for name in lacking if name.startswith(tuple(optional))]
    problems = {
        "missing": [name for name in lacking if name not in left],
        "unexpected": unexpected,
        "there twice, under two names": twice,
        "of another shape": misshaped,
    }
    if any(problems.values()):
        said = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise CheckpointError(f"the checkpoint does not fit {type(model).__name__}. {said}")
    with torch.no_grad():
        for name, t in found.items():
            ours[name].copy_(t)
    return left


def _some(names, most=6):
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
