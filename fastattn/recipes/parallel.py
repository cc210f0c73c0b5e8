"""One process, or the several that torchrun starts: who I am, sums over all of them, and how a model is spread."""

import contextlib
import dataclasses
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

KINDS = ("ddp", "fsdp")


@dataclasses.dataclass(frozen=True)
class Processes:
    """`kind`: "ddp", every process has the whole model; "fsdp", torch's fully_shard, every process has a part of it."""

    device: torch.device
    rank: int = 0
    world: int = 1
    kind: str = "ddp"

    @property
    def first(self):
        return self.rank == 0

    @property
    def in_parts(self):
        """Whether `spread` leaves each process with a part of the model only."""
        return self.world > 1 and self.kind == "fsdp"

    def spread(self, model):
        """The model to call: itself where there is one process. "fsdp" changes it in place, before its optimizer is made."""
        if self.world == 1:
            return model
        if self.kind == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=ids)
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # half a second

        for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
            for layer in layers:
                fully_shard(layer)
        fully_shard(model)
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")
        return model

    @contextlib.contextmanager
    def gradients(self, model, exchanged):
        """Whether backward passes inside exchange gradients: with accumulation only the last has to."""
        if self.world == 1:
            yield
        elif self.kind == "ddp":
            with contextlib.nullcontext() if exchanged else model.no_sync():
                yield
        else:
            model.set_requires_gradient_sync(exchanged)
            yield

    def sum(self, *values):
        return self._reduced(values, dist.ReduceOp.SUM if self.world > 1 else None)

    def largest(self, *values):
        return self._reduced(values, dist.ReduceOp.MAX if self.world > 1 else None)

    def _reduced(self, values, how):
        if self.world == 1:
            return [float(v) for v in values]
        together = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.device)
        dist.all_reduce(together, how)
        return together.tolist()

    def gathered(self, tensor):
        """[each rank's tensor], all of one shape."""
        if self.world == 1:
            return [tensor]
        mine = tensor.to(self.device)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine)
        return [t.to(tensor.device) for t in found]


def whole(tensor):
    """A tensor of which ranks hold parts, put together; every rank has to ask for it."""
    return tensor.full_tensor() if _in_parts(tensor) else tensor


def as_part_of(tensor, like):
    """A whole tensor laid out over the ranks, dtype and device as `like` is."""
    tensor = tensor.to(like.device, like.dtype)
    if not _in_parts(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def _in_parts(tensor):
    return hasattr(tensor, "full_tensor")  # a DTensor, without its import


@contextlib.contextmanager
def processes(device, kind="ddp"):
    """This process among those of torchrun (RANK, LOCAL_RANK, WORLD_SIZE in the environment), or alone; nccl or gloo."""
    if kind not in KINDS:
        raise ValueError(f"parallel {kind!r}: need one of {', '.join(KINDS)}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Processes(device, kind=kind)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
    )
    try:
        yield Processes(device, dist.get_rank(), dist.get_world_size(), kind)
    finally:
        dist.destroy_process_group()
