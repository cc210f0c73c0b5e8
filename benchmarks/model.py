"""What an attention tile must cost on Hopper, from unit rates and from the instructions of its hot loop. No GPU is asked.

A step of the forward walk multiplies a BLOCK_M x D query tile with BLOCK_N keys and the BLOCK_M x BLOCK_N probabilities
with BLOCK_N values. Each unit of an SM needs so many clocks for it; the slowest bounds the step, and
what the tensor unit needs, divided by that, is the best share of its peak that the tile can reach. The rates are NVIDIA's
published ones for compute capability 9.0; that a step reaches its bound is an assumption that only a GPU can test.
"""

import dataclasses
import re

# What one SM does in a clock.
TENSOR_FLOP = 4096  # dense fp16 or bf16
SHARED_BYTES = 128
MUFU = 16  # exp2 and its like
LANES = 128  # issued: four warp instructions
REGISTERS = 65536
SHARED_SIZE = 233472  # bytes an SM has; a block takes 1 KiB more than it asks for
WARPS = 64


@dataclasses.dataclass
class Clocks:
    """Clocks of an SM for one step of one block, by unit."""

    tensor: float
    shared: float
    mufu: float
    issue: float = 0.0

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


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")
LABEL = re.compile(r"^(\.L_\w+):", re.M)


def census(sass):
    """Instruction counts of a kernel in nvdisasm's text: {"all": {op: n}, "loop": {"ops": {op: n}, "hgmma": {shape: n}}}.

    The loop is the innermost one with tensor-core work and the fewest instructions, which is the walk over tiles that
    need no checks; without tensor-core work the longest innermost loop; None without loops.
    """
    instructions, labels = [], {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.search(line):
            instructions.append((found[2], found[3]))
    loops = []
    for end, (op, operands) in enumerate(instructions):
        target = re.search(r"`\((\.L_\w+)\)", operands)
        if (
            op.startswith("BRA") and target and labels.get(target[1], end + 1) < end
        ):  # a jump to itself ends a kernel
            loops.append((labels[target[1]], end + 1))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    counted = [count(instructions[start:end]) for start, end in inner]
    tensor = [c for c in counted if any(op.startswith(("HGMMA", "HMMA")) for op in c["ops"])]
    size = lambda c: sum(c["ops"].values())  # noqa: E731
    loop = min(tensor, key=size) if tensor else max(counted, key=size, default=None)
    return {"all": count(instructions)["ops"], "loop": loop}


def count(instructions):
    ops, shapes = {}, {}
    for op, operands in instructions:
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
