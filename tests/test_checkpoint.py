"""Checkpoint files: what is read back, and what happens to those that are broken."""

import json

import pytest
import torch
from torch import nn

from fastattn.models import checkpoint
from fastattn.models.checkpoint import CheckpointError, load_into, read, write

safetensors = pytest.importorskip("safetensors.torch")


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def state(seed=0):
    torch.manual_seed(seed)
    return model().state_dict()


def sharded(folder):
    folder.mkdir()
    shards = {
        f"model-{i}-of-2.safetensors": part
        for i, part in enumerate((["0.weight", "1.bias"], ["0.bias", "1.weight"]))
    }
    tensors = state()
    for file, names in shards.items():
        safetensors.save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text("{}")
    return folder


def test_what_is_written_is_read(tmp_path):
    kept = {"a": torch.randn(3, 4).T, "b": torch.randn(2).bfloat16(), "c": torch.arange(3)}
    write(tmp_path / "new" / "folder", {"x": 1}, kept)
    for path in (tmp_path / "new/folder", tmp_path / "new/folder/model.safetensors"):
        config, found = read(path)
        assert config == {"x": 1} and set(found) == set(kept) and len(found) == 3
        for name, t in kept.items():
            assert found[name].dtype == t.dtype and torch.equal(found[name], t)
    assert sorted(f.name for f in (tmp_path / "new/folder").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "new/folder/config.json").unlink()
    assert read(tmp_path / "new/folder/model.safetensors")[0] == {}


def test_shards(tmp_path):
    found = read(sharded(tmp_path / "x"))[1]
    assert set(found) == set(state()) and all(torch.equal(found[name], t) for name, t in state().items())


def spoil_shard(folder):
    (folder / "model-1-of-2.safetensors").write_bytes(b"")


def swap_shards(folder):
    (folder / "model-0-of-2.safetensors").replace(folder / "model-1-of-2.safetensors")
    safetensors.save_file({}, folder / "model-0-of-2.safetensors")


def index(text):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_shard, "model-1-of-2.safetensors: cannot be read"),
        (swap_shards, "lacks"),
        (lambda f: (f / "model-0-of-2.safetensors").unlink(), "names model-0-of-2.safetensors, which is missing"),
        (index("{"), "index.json: cannot be read as JSON"),
        (index("{}"), "has no weight_map"),
        (index('{"weight_map": {"a": "../secret.safetensors"}}'), "not a file of its own folder"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json: cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
        (lambda f: (f / "model.safetensors").write_text("hello, I am not a checkpoint"), "cannot be read"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_one_clear_error(tmp_path, spoil, message):
    folder = sharded(tmp_path / "x")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


def test_a_truncated_file_is_an_error_wherever_it_is_cut(tmp_path):
    write(tmp_path, {}, state())
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (0, 4, 8, 100, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="model.safetensors: cannot be read"):
            read(tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle"):
        read(tmp_path)


def test_an_interrupted_write_leaves_the_old_files(tmp_path, monkeypatch):
    write(tmp_path, {"old": True}, state(0))
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}

    def half(tensors, path, **options):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint._safetensors().torch, "save_file", half)
        write(tmp_path, {"old": False}, state(1))
    with pytest.raises(TypeError):  # a config that JSON cannot hold
        write(tmp_path, {"old": torch.float32}, state(1))
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before
    with open(tmp_path / "model.safetensors", "rb") as reader:  # put in place, not written over
        write(tmp_path, {"old": False}, state(1))
        assert reader.read() == before[tmp_path / "model.safetensors"]
    assert not read(tmp_path)[0]["old"] and torch.equal(read(tmp_path)[1]["0.bias"], state(1)["0.bias"])


def test_loading_renames_transposes_and_drops():
    stored = {f"old.{name}": t for name, t in state().items()} | {"mask.position_ids": torch.arange(3)}
    stored["old.0.weight"] = stored["old.0.weight"].T
    target = model()
    rename = lambda name: name.removeprefix("old.")  # noqa: E731
    load_into(target, stored, rename=rename, transpose=("0.weight",), drop=(".position_ids",))
    assert all(torch.equal(t, state()[name]) for name, t in target.state_dict().items())
    del stored["old.1.bias"]
    options = dict(rename=rename, transpose=("0.weight",), drop=(".position_ids",), optional=("1.",))
    assert load_into(target, stored, **options) == ["1.bias"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"0.weight": None}, "missing: 0.weight"),
        ({"more": torch.zeros(1)}, "unexpected: more"),
        ({"0.weight": torch.zeros(3, 4)}, r"of another shape: 0.weight \(3, 4\) for 0.weight \(4, 3\)"),
        ({"again.0.weight": torch.zeros(4, 3)}, "there twice, under two names: again.0.weight"),
        ({"0.weight": None, "more": torch.zeros(1)}, "missing: 0.weight; unexpected: more"),
    ],
)
def test_what_does_not_fit_changes_nothing(change, message):
    stored = {name: t for name, t in (state(1) | change).items() if t is not None}
    target = model()
    before = {name: t.clone() for name, t in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_into(target, stored, rename=lambda name: name.removeprefix("again."))
    assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())
