"""What an attention tile must cost on Hopper, from unit rates and from the instructions of its hot loop. No GPU is asked.

A step of the forward walk multiplies a BLOCK_M x D query tile with BLOCK_N keys and the BLOCK_M x BLOCK_N probabilities
with BLOCK_N values. Each unit of an SM needs so many clocks for it; the slowest bounds the step, and
what the tensor unit needs, divided by that, is the best share of its peak that the tile can reach. The rates are NVIDIA's
published ones for compute capability 9.0; that a step reaches its bound is an assumption that only a GPU can test.

Portable kernels, whose products are mma.sync, are held against compute capability 8.0 (PORTABLE): Hopper runs that
instruction at some five eighths of its peak, 1.25 times as fast as 8.0, so that there a share of another unit is a quarter higher.
"""

import dataclasses
import functools
import math
import re

# What one SM does in a clock.
TENSOR_FLOP = 4096  # dense fp16 or bf16
SHARED_BYTES = 128
MUFU = 16  # exp2 and its like
LANES = 128  # issued: four warp instructions
REGISTERS = 65536
SHARED_SIZE = 233472  # bytes an SM has; a block takes 1 KiB more than it asks for
WARPS = 64


# The same of compute capability 8.0, and bytes that the L2 gives one of an A100's 108 SMs, and its memory.
PORTABLE = {"tensor": 2048, "shared": 128, "mufu": 16, "fma": 64, "alu": 64, "issue": 128, "l2": 47, "memory": 10}  # fmt: skip


@dataclasses.dataclass
class Clocks:
    """Clocks of an SM for one step of one block, by unit."""

    tensor: float
    shared: float
    mufu: float
    issue: float = 0.0
    fma: float = 0.0
    alu: float = 0.0
    l2: float = 0.0
    memory: float = 0.0

    def bound(self):
        """(unit, share): the slowest unit and the tensor unit's share of its time."""
        times = dataclasses.asdict(self)
        slowest = max(times, key=times.get)
        return slowest, self.tensor / times[slowest]


def forward_step(BLOCK_M, BLOCK_N, D, DV=None, q_in_registers=False):
    """A step with 16-bit inputs: each 64 rows read K and V once from shared memory, Q unless it stays in registers."""
    DV = D if DV is None else DV
    groups = BLOCK_M // 64
    read = groups * 2 * BLOCK_N * (D + DV) + (0 if q_in_registers else groups * 2 * 64 * D)
    written = 2 * BLOCK_N * (D + DV)
    return Clocks(
        tensor=2 * BLOCK_M * BLOCK_N * (D + DV) / TENSOR_FLOP,
        shared=(read + written) / SHARED_BYTES,
        mufu=BLOCK_M * BLOCK_N / MUFU,
    )


@dataclasses.dataclass
class Tile:
    """A step of a portable attention kernel: each of `warps` warps has `rows` rows in fragments and meets `others` rows of the other
    side in `products` products, of which it reads `lefts` left operands anew. The block shares those others or, `apart`,
    each warp has its own.
    """

    D: int
    warps: int
    rows: int
    others: int
    products: int
    lefts: int
    apart: bool = False
    more_copied: int = 0  # bytes beside two tiles of the other side

    @property
    def elements(self):
        """Of S."""
        return self.warps * self.rows * self.others

    @property
    def copied(self):
        return 2 * self.others * (self.warps if self.apart else 1) * self.D * 2 + self.more_copied

    def instructions(self):
        """What a warp issues of each kind: an mma does 4096 FLOP, ldmatrix and an asynchronous copy move 512 bytes."""
        read = (self.products * self.others + self.lefts * self.rows) * self.D * 2
        return {
            "HMMA": self.products * 2 * self.rows * self.others * self.D // 4096,
            "LDSM": read // 512,
            "LDGSTS": -(-self.copied // self.warps // 512),
        }

    def clocks(self, an_element):
        """Of a step, given its instructions by pipe, {pipe: how many each lane runs for an element of S}."""
        counts = self.instructions()
        lanes = {pipe: n * self.elements for pipe, n in an_element.items()}
        read = counts["LDSM"] * self.warps * 512 + 4 * lanes.get("words", 0)
        return Clocks(
            tensor=counts["HMMA"] * self.warps * 4096 / PORTABLE["tensor"],
            shared=(read + self.copied) / PORTABLE["shared"],
            mufu=lanes["mufu"] / PORTABLE["mufu"],
            issue=sum(lanes.values()) / PORTABLE["issue"],
            fma=lanes["fma"] / PORTABLE["fma"],
            alu=lanes["alu"] / PORTABLE["alu"],
            l2=self.copied / PORTABLE["l2"],
            memory=self.copied / PORTABLE["memory"] if self.apart else 0.0,
        )


def portable_tile(kernel):
    """The Tile of a kernel by its name and arguments, such as attention_fwd_kernel<__half, 64, 4, 2, 64, false>; else None."""
    stem, _, arguments = kernel.rstrip(">").partition("<")
    if stem == "attention_decode_fwd_kernel":
        D, keys = map(int, arguments.split(", ")[1:])
        return Tile(D, 4, 16, keys // 4, 2, 1, apart=True)
    if stem not in ("attention_fwd_kernel", "attention_bwd_dkdv_kernel", "attention_bwd_dq_kernel"):
        return None
    D, warps, tiles, others = map(int, arguments.split(", ")[1:5])
    tile = functools.partial(Tile, D, warps, 16 * tiles, others)
    if stem == "attention_fwd_kernel":
        return tile(2, 0 if tiles * D // 4 <= 32 else 1)  # q stays in registers where it takes 32 of them
    if stem == "attention_bwd_dq_kernel":
        return tile(3, 2)
    dk, dv = (argument == "true" for argument in arguments.split(", ")[6:])
    return tile(1 + 2 * dk + dv, 1 + dk, more_copied=8 * others)


def loop_step(census, warps):
    """One turn of the hot loop, from its instructions (`census` below) and the warps that run it."""
    groups = warps // 4  # an HGMMA is issued by four warps together
    flop = shared = 0
    for shape, count in census["hgmma"].items():
        m, n, k, a = re.fullmatch(r"(\d+)x(\d+)x(\d+) (register|shared)", shape).groups()
        m, n, k = int(m), int(n), int(k)
        flop += count * groups * 2 * m * n * k
        shared += count * groups * 2 * k * (n + (m if a == "shared" else 0))
    ops = census["ops"]
    for op, count in ops.items():
        if op.startswith(("LDGSTS", "LDS", "STS", "LDSM", "STSM")):
            shared += count * warps * 32 * width(op)
    issue = sum(ops.values()) - sum(n for op, n in ops.items() if op.startswith("HGMMA"))
    return Clocks(
        tensor=flop / TENSOR_FLOP,
        shared=shared / SHARED_BYTES,
        mufu=sum(n for op, n in ops.items() if op.startswith("MUFU")) * warps * 32 / MUFU,
        issue=issue * warps * 32 / LANES,
    )


def width(op):
    """Bytes a lane moves."""
    if op.startswith(("LDSM", "STSM")):
        return 16 if ".4" in op else 8 if ".2" in op else 4
    found = re.search(r"\.(128|64|U16|U8|S16|S8)\b", op)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found[1]] if found else 4


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")
LABEL = re.compile(r"^(\.L_\w+):", re.M)


# What runs an instruction; words: plain accesses to shared memory and shuffles, which take the same way.
PIPES = {
    "tensor": ("HMMA",),
    "mufu": ("MUFU",),
    "fma": ("FADD", "FFMA", "FMUL", "HADD2", "HFMA2", "HMUL2", "IMAD"),
    "alu": ("F2FP", "FMNMX", "FSEL", "FSETP", "IABS", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "P2R", "PLOP3", "PRMT",
            "R2P", "SEL", "SGXT", "SHF", "VIADD", "VIMNMX"),
    "tiles": ("LDGSTS", "LDSM"),
    "words": ("LDS", "SHFL", "STS"),
    "global": ("LD", "LDC", "LDG", "ST", "STG"),
}  # fmt: skip
PIPE_OF = {op: pipe for pipe, ops in PIPES.items() for op in ops}


def pipes(ops):
    """{pipe: instructions}; "other" are branches, barriers, votes and the uniform datapath's."""
    found = dict.fromkeys([*PIPES, "other"], 0)
    for op, count in ops.items():
        if op != "NOP":
            found[PIPE_OF.get(op.partition(".")[0], "other")] += count
    return found


def step(sass):
    """The shortest way through a step of a kernel's walk that makes its asynchronous copies: {"once": {op: n}, "repeated": {op: n}}.

    That is a tile in which all pairs are allowed and no row has a new maximum. The step is the smallest loop with tensor-core
    work and the commit of a group of copies; "repeated" are the instructions of loops within. None without such a loop.
    """
    instructions, labels = listed(sass)
    jumps = [jump(i, instruction, labels) for i, instruction in enumerate(instructions)]
    loops = [(to, i + 1) for i, (to, _) in enumerate(jumps) if to is not None and to < i]
    has = lambda loop, op: any(name.startswith(op) for name, *_ in instructions[slice(*loop)])  # noqa: E731
    steps = [loop for loop in loops if has(loop, "HMMA") and has(loop, "LDGDEPBAR")]
    if not steps:
        return None
    start, end = min(steps, key=lambda loop: loop[1] - loop[0])
    copy = 10**6  # worth any way around
    best, then = {end: (0, None)}, {}
    for i in reversed(range(start, end)):
        to, certain = jumps[i]
        ways = [] if certain and to is not None and i + 1 < end else [i + 1]
        ways += [to] if to is not None and i < to < end else []
        cost, then[i] = min(((best[way][0], way) for way in ways), default=(math.inf, None))
        best[i] = (cost + 1 - copy * instructions[i][0].startswith("LDGSTS"), then[i])
    inner = [loop for loop in loops if start <= loop[0] and loop[1] <= end and loop != (start, end)]
    found, i = {"once": {}, "repeated": {}}, start
    while i != end:
        op = instructions[i][0]
        into = found["repeated" if any(a <= i < b for a, b in inner) else "once"]
        into[op] = into.get(op, 0) + 1
        i = then[i]
    return found


def turns(step, kind, count):
    """All instructions of a step, {op: n}, given that it has `count` of `kind`: how often its inner loops turn follows from that."""
    of = lambda ops: sum(n for op, n in ops.items() if op.startswith(kind))  # noqa: E731
    once, repeated = step["once"], step["repeated"]
    times = (count - of(once)) / of(repeated) if of(repeated) else 0
    if times != int(times) or (not of(repeated) and of(once) != count):
        raise ValueError(
            f"a step of {of(once)} {kind} and {of(repeated)} in loops, {count} were to be expected"
        )
    return {op: once.get(op, 0) + int(times) * repeated.get(op, 0) for op in {**once, **repeated}}


def listed(sass):
    """([(op, operands, predicate)], {label: index of the instruction that follows})."""
    instructions, labels = [], {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.search(line):
            instructions.append((found[2], found[3], found[1]))
    return instructions, labels


def jump(i, instruction, labels):
    """(where a branch goes or None, whether always). A jump to itself ends a kernel."""
    op, operands, predicate = instruction
    target = re.search(r"^(.*)`\((\.L_\w+)\)", operands) if op.startswith("BRA") else None
    to = labels.get(target[2]) if target else None
    return (None, False) if to is None or to == i else (to, not predicate and not target[1].strip())


def census(sass):
    """Instruction counts of a kernel in nvdisasm's text: {"all": {op: n}, "loop": {"ops": {op: n}, "hgmma": {shape: n}}}.

    The loop is the innermost one with tensor-core work and the fewest instructions, which is the walk over tiles that
    need no checks; without tensor-core work the longest innermost loop; None without loops.
    """
    instructions, labels = listed(sass)
    loops = []
    for end, instruction in enumerate(instructions):
        to, _ = jump(end, instruction, labels)
        if to is not None and to < end:
            loops.append((to, end + 1))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    counted = [count(instructions[start:end]) for start, end in inner]
    tensor = [c for c in counted if any(op.startswith(("HGMMA", "HMMA")) for op in c["ops"])]
    size = lambda c: sum(c["ops"].values())  # noqa: E731
    loop = min(tensor, key=size) if tensor else max(counted, key=size, default=None)
    return {"all": count(instructions)["ops"], "loop": loop}


def count(instructions):
    ops, shapes = {}, {}
    for op, operands, _ in instructions:
        ops[op] = ops.get(op, 0) + 1
        if found := re.match(r"HGMMA\.(\d+x\d+x\d+)", op):
            # The first operand is the result; A is a second register or, with B, one descriptor pair.
            a = "register" if re.match(r"\s*\w+,\s*R\d+", operands) else "shared"
            shapes[f"{found[1]} {a}"] = shapes.get(f"{found[1]} {a}", 0) + 1
    return {"ops": ops, "hgmma": shapes}


def wide_share(ops, kind):
    """Bytes that 16-byte accesses to global memory move, of all of `kind` ("LDG", straight to shared memory too, or "STG")."""
    moved = {op: n * width(op) for op, n in ops.items() if re.match(rf"{kind}(STS)?\b", op)}
    return sum(n for op, n in moved.items() if ".128" in op) / sum(moved.values()) if moved else 1.0


def resident_blocks(registers, shared, warps):
    """Blocks of one kernel that an SM holds at once; registers go to warps in units of 256."""
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = SHARED_SIZE // (shared + 1024)
    return min(by_registers, by_shared, WARPS // warps)
