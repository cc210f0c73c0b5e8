"""Which dims of a DTensor each rank can compute by itself: sharding rules, and the calls on local parts that follow them.

A rule names every dim of every tensor of a call with a letter, equal letters for equal dims, and says along which letters
the work may be split. On each dim of the mesh the call is split along the first such letter along which a tensor already
is. Tensors that have the letter are split too, all others are whole, and a whole tensor's gradient is the sum over the
ranks, as torch's Partial() says. An input that lies otherwise is redistributed, as torch's own rules would.

The function then runs on the local parts, plain tensors that every kernel reads, under autograd's own nodes for the way
in and out. So there is one choice of placements for forward and backward, made once, and what forward saved is local:
statistics of rows that a rank holds need no place in a global tensor. Seen by `backend.in_parts` alone: importing
torch.distributed.tensor takes a second, and only who has a DTensor pays for it.
"""

from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def on_parts(call, tensors, names, split, outputs, *, gathered=""):
    """call(*local tensors), a DTensor or a tuple of them with dims named by `outputs`; NotImplemented where no rule applies.

    tensors: DTensors or None, names: a string each. `split`: the letters along which the work may be split. Along a letter
    of the string `gathered` it may not; the first of `split` which the mesh divides takes its place, and the outputs return to it.
    NotImplemented: a plain tensor among them or two meshes, which torch's ops refuse or serve under implicit_replication, and
    a rank that is not of the mesh.
    """
    given = [t for t in tensors if t is not None]
    mesh = given[0].device_mesh
    if (
        not all(isinstance(t, DTensor) and t.device_mesh == mesh for t in given)
        or mesh.get_coordinate() is None
    ):
        return NotImplemented
    named = [(t, s) for t, s in zip(tensors, names, strict=True) if t is not None]
    letters, returned = _chosen(mesh, named, split, gathered)
    local = iter([_local(t, s, letters) for t, s in named])
    results = call(*(t if t is None else next(local) for t in tensors))
    sizes = {}
    for t, s in named:
        for letter, n in zip(s, t.shape, strict=True):
            sizes[letter] = max(n, sizes.get(letter, 0))
    several = isinstance(results, tuple)
    wrapped = []
    for part, s in zip(results if several else (results,), outputs, strict=True):
        shape = tuple(sizes[letter] for letter in s)
        placements = _placements(s, letters, Replicate())
        y = DTensor.from_local(
            part, mesh, placements, run_check=False, shape=shape, stride=_strides(shape, part)
        )
        wrapped.append(
            y if letters == returned else y.redistribute(placements=_placements(s, returned, Replicate()))
        )
    return tuple(wrapped) if several else wrapped[0]


def _chosen(mesh, named, split, gathered):
    """(letters, returned): for each dim of the mesh the letter along which to split the call, and its outputs; None is whole."""
    letters, returned = [], []
    parts = dict.fromkeys(split, 1)
    for i in range(mesh.ndim):
        found = _lies(i, named, split + gathered)
        exchanged = found is not None and found in gathered
        chosen = None
        for letter in split if exchanged else () if found is None else (found,):
            if chosen is None and _divides(parts[letter] * mesh.size(i), letter, named, exchanged):
                chosen = letter
                parts[letter] *= mesh.size(i)
        letters.append(chosen)
        returned.append(found if exchanged else chosen)
    return letters, returned


def _lies(i, named, letters):
    """Along which of `letters` the first tensor is that is split over mesh dim i along one."""
    for t, name in named:
        p = t.placements[i]
        if isinstance(p, Shard) and name[p.dim] in letters and t.shape[p.dim] > 1:
            return name[p.dim]
    return None


def _divides(parts, letter, named, evenly):
    """Whether a dim's `parts` fall on the same ranks in all tensors: equal sizes do, unequal ones (grouped heads) where `parts` divides them."""
    sizes = {n for t, s in named for name, n in zip(s, t.shape, strict=True) if name == letter and n > 1}
    return bool(sizes) and ((len(sizes) == 1 and not evenly) or all([n % parts == 0 for n in sizes]))


def _placements(name, letters, otherwise, shape=None):
    """Shard where the dim of that name is there (and, by `shape`, is not 1, which broadcasts); else `otherwise`."""
    return [
        Shard(name.index(c)) if c is not None and c in name and (shape is None or shape[name.index(c)] > 1)
        else Replicate() if c is None else otherwise
        for c in letters
    ]  # fmt: skip


def _local(t, name, letters):
    t = t.redistribute(placements=_placements(name, letters, Replicate(), t.shape))
    return t.to_local(grad_placements=_placements(name, letters, Partial(), t.shape))


def _strides(shape, part):
    """Of the whole, in the order of memory in which its parts lie."""
    strides, step = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (part.stride(d), -d)):
        strides[d], step = step, step * max(shape[d], 1)
    return tuple(strides)
