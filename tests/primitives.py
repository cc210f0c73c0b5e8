"""Does the emulation compute what a GPU does? Single instructions, each in a process of its own, which may hang.

    python tests/primitives.py [--write]

Runs csrc/emulation/tests/primitives.cu on the GPU and compares with what PTX's manual and CUDA's guide say, by numpy, and
with the emulation. --write keeps what the GPU said in tests/data/primitives.json, which the tests hold the emulation to.
What needs sm_90a is left out, by name, on a GPU that is not.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc/emulation/tests/primitives.cu"
SAID = ROOT / "tests/data/primitives.json"
SECONDS = 20  # after which a process hangs

spec = importlib.util.spec_from_file_location("fastattn_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

# What each function of one number is, and its largest error in units in the last place: the guide's, of a GPU alone.
FUNCTIONS = {
    "powers_of_two": (np.exp2, 2),
    "powers_of_two_near_0": (np.exp2, 2),
    "exponentials": (np.exp, 1),
    "logarithms": (np.log, 1),
    "logarithms_of_two": (np.log2, 1),
    "quotients": (lambda v: 3 / v, 2),
}
PRODUCTS = ("products_half", "products_bfloat")


def emulated_program(folder, source=SOURCE, *flags, engine_flags=(), link_flags=None):
    """A program of csrc/emulation/tests with the engine."""
    objects = []
    engine = [ROOT / "csrc/emulation" / name for name in build.ENGINE]
    for part, more in ((source, flags), *((part, engine_flags or flags) for part in engine)):
        objects.append(folder / f"{part.stem}.o")
        command = [*build.emulated_compiler(part), "-Wno-unknown-pragmas", *more, "-c", part]
        subprocess.run([*command, "-o", objects[-1]], check=True)
    link_flags = flags if link_flags is None else link_flags
    subprocess.run(
        [build.CXX, *objects, *link_flags, "-lpthread", "-ldl", "-o", folder / source.stem], check=True
    )
    return folder / source.stem


def gpu_program(folder, arch):
    """arch: as in "90a"."""
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = ["nvcc", "-std=c++17", "-O3", code, "-Werror=all-warnings", SOURCE, "-o", folder / "on_gpu"]
    subprocess.run(command, check=True)
    return folder / "on_gpu"


def names(program):
    """{primitive: the architecture that alone has it, or ""}"""
    lines = subprocess.run([program], stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return dict(line.split(" ") for line in lines)


def words(program, name, *order_and_seed):
    """What a primitive leaves, as uint32."""
    command = [program, name, *map(str, order_and_seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(done.stderr or f"{name}: exit status {done.returncode}")
    return np.array([int(word, 16) for word in done.stdout.split()], np.uint32)


def floats(found):
    return found.view(np.float32).astype(np.float64)


def numbers_of(found, name):
    """16-bit numbers, two to a word, as float64: (..., 2)."""
    halves = np.stack([found & 0xFFFF, found >> 16], -1).astype(np.uint16)
    if name == "products_half":
        return halves.view(np.float16).astype(np.float64)
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def products(found, name):
    """(what mma.m16n8k16 left, the exact sums, the sums of sizes) of its eight steps, by the fragments of PTX's manual."""
    left, exact, size = [], [], []
    c = np.zeros((16, 8))
    lane = np.arange(32)
    row, pair = lane // 4, lane % 4 * 2
    for step in found.reshape(8, 10, 32):
        a, b = np.zeros((16, 16)), np.zeros((16, 8))
        for i, word in enumerate(numbers_of(step[:6], name)):
            for half in (0, 1):
                if i < 4:
                    a[row + i % 2 * 8, pair + i // 2 * 8 + half] = word[:, half]
                else:
                    b[pair + (i - 4) * 8 + half, row] = word[:, half]
        exact.append(c + a @ b)
        size.append(abs(c) + abs(a) @ abs(b))
        c = np.zeros((16, 8))
        for i, values in enumerate(floats(step[6:])):
            c[row + i // 2 * 8, pair + i % 2] = values
        left.append(c)
    return np.stack(left), np.stack(exact), np.stack(size)


@functools.cache
def given():
    """The words that every primitive gets: xorshift32 (Marsaglia, "Xorshift RNGs", 2003)."""
    state, kept = 2463534242, []
    for _ in range(2048):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        kept.append(state)
    return np.array(kept, np.uint32)


def swizzled(address, row):
    """Where the byte at `address` lies, of tiles whose rows of 16, 32, 64 or 128 bytes are swizzled by as many (16: none).

    Of the 8 pieces of 16 bytes in 128, piece p of 128 bytes number r is at p ^ (r mod row / 16): within its row."""
    piece, line = address // 16 % 8, address // 128
    return line * 128 + (piece ^ line % (row // 16)) * 16 + address % 16


def box(tensor, sizes, strides, start, shape):
    """The box of a tensor (16-bit elements; the innermost dimension last) that starts there, zeros outside of it."""
    at = np.stack(
        np.meshgrid(*[np.arange(f, f + n) for f, n in zip(start, shape, strict=True)], indexing="ij"), -1
    )
    inside = ((at >= 0) & (at < sizes)).all(-1)
    element = (at * strides).sum(-1) // 2
    return np.where(inside, tensor[np.where(inside, element, 0)], 0), inside, element


def tile_of(rows, row):
    """Rows of bytes, one below the other, as they lie in shared memory."""
    flat = rows.reshape(-1).view(np.uint8)
    tile = np.empty_like(flat)
    tile[swizzled(np.arange(flat.size), row)] = flat
    return tile


def loaded(name):
    columns = {"load_none": 64, "load_32": 16, "load_64": 32}.get(name, 64)
    row = 16 if name == "load_none" else 2 * columns
    tensor = given().view(np.uint16)
    if name == "load_4d":
        at, shape = (2, 1, -2, 76 - columns), (2, 2, 4, columns)
        found = box(tensor, (3, 5, 3, 70), (2160, 144, 720, 2), at, shape)
    else:
        found = box(tensor, (3, 9, 70), (1296, 144, 2), (2, -2, 76 - columns), (2, 8, columns))
    return tile_of(found[0].astype(np.uint16), row).view(np.uint32)


def stored(name):
    row = 16 if name == "store_none" else 128
    left = np.full(2 * 1376, 0xFFFF, np.uint16)
    memory = given().view(np.uint8)
    for at, out, sizes, strides, start, shape in (
        (0, left[:1024], (2, 6, 68), (864, 144, 2), (1, -1, 8), (1, 8, 64)),
        (2048, left[1024:], (2, 4, 3, 68), (1728, 144, 576, 2), (1, 0, 0, 8), (1, 2, 2, 64)),
    ):
        _, inside, element = box(out, sizes, strides, start, shape)
        tile = memory[at + swizzled(np.arange(2 * inside.size), row)].view(np.uint16).reshape(shape)
        out[element[inside]] = tile[inside]
    return left.view(np.uint32)


def small(index):
    """The index-th of the whole numbers from -8 to 8 that the words are taken for."""
    halves = given().view(np.uint16).astype(np.int64)
    return halves[index % 4096] % 17 - 8


def operand(start, count, row, leading, stride, across):
    """(count, 16) numbers out of wgmma_shared's memory: addresses by the manual's canonical layouts."""
    i, k = np.arange(count)[:, None], np.arange(16)[None]
    if row == 16:
        inner = i % 8 * 2 + k % 8 * 16 if across else i % 8 * 16 + k % 8 * 2
        address = inner + i // 8 * stride + k // 8 * leading
    elif across:
        line = row // 2
        address = i % line * 2 + i // line * leading + k % 8 * row + k // 8 * stride
    else:
        address = i // 8 * stride + i % 8 * row + k * 2
    at = swizzled(start + address, row) // 2
    return small(at + at // 4096)


def accumulators(d):
    """d (64, n) by threads, two 16-bit whole numbers to a word."""
    lane = np.arange(128)
    i = np.arange(d.shape[1] // 2)
    row = lane // 32 * 16 + lane % 32 // 4
    of_thread = d[row[:, None] + i // 2 % 2 * 8, i // 4 * 8 + lane[:, None] % 4 * 2 + i % 2]
    return of_thread.astype(np.int16).view(np.uint32).reshape(-1)


def of_shared_memory(name):
    _, direction, swizzle = name.split("_")
    row, across = {"none": 16}.get(swizzle) or int(swizzle), direction == "across"
    atom, atoms = 8 * row, 64 * 2 // row  # atoms: that 64 numbers across k take
    if row == 16:
        a, b = (128, 256), (1024, 128)
    elif across:
        a, b = (2 * atom, atom), (atom, atoms * atom)
    else:
        a, b = (16, atom), (16, 2 * atom)
    on = 0 if across or row < 64 else 32
    steps = [(operand(at, 64, row, *a, across), operand(8192 + at, 64, row, *b, across)) for at in (0, on)]
    return accumulators(sum(x @ y.T for x, y in steps))


def of_registers(name):
    across, columns = name.endswith("across"), 128 if name.endswith("across") else 64
    lane, i = np.arange(128)[:, None], np.arange(columns // 2)
    d = np.zeros((64, columns), np.int64)
    row = lane // 32 * 16 + lane % 32 // 4
    d[row + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2] = i
    for k in (0, 1):
        a = np.zeros((64, 16), np.int64)
        for word in range(4):
            for half in (0, 1):
                column = lane % 4 * 2 + half + word // 2 * 8
                a[row + word % 2 * 8, column] = small(16 * lane + 8 * k + 2 * word + half)
        d += a @ operand(k * (2048 if across else 32), columns, 128, 8192, 1024, across).T
    return accumulators(d)


def of_tiles(name):
    x = small(np.arange(4096)).reshape(64, 64)
    other = np.concatenate([x[8:], np.zeros((8, 64), np.int64)])
    return accumulators(x @ (other if "across" in name else other.T))


def handed_over(name):
    """By two warps five times, or by 64 threads five times: a sum in threes of what the other had at another place."""
    width, turn = (32, lambda t: 31 - t) if name == "mbarriers" else (64, lambda t: t ^ 33)
    rounds, kept = given()[: 5 * width].reshape(5, width), np.zeros(width, np.uint32)
    for of_round in rounds:
        kept = kept * np.uint32(3) + of_round[turn(np.arange(width))]
    # a phase of two arrivals: parities of what is over after 0 to 6 of them
    phases = [int(arrived // 2 % 2 != parity) for arrived in range(7) for parity in (0, 1)]
    return np.concatenate([np.array(phases, np.uint32), kept]) if name == "mbarriers" else kept


def written(name):
    """What a primitive of ptx_sm90.cuh leaves, to the bit; None for others."""
    of = {"load": loaded, "store": stored, "tiles": of_tiles, "mbarriers": handed_over, "named": handed_over,
          "registers": lambda _: given()[:384] + np.uint32(1),
          "wgmma": of_registers if "registers" in name else of_shared_memory}.get(name.split("_")[0])  # fmt: skip
    return of and of(name)


def broken(name, found, beside):
    """A sentence if what a GPU left, `found`, is not what is written, or not what the emulation left, else None."""
    if (known := written(name)) is not None:
        beside = known
    if name in FUNCTIONS:
        exactly, most = FUNCTIONS[name]
        at, ours = floats(found).reshape(-1, 2).T
        if not np.array_equal(found[::2], beside[::2]):
            return "the numbers asked for differ"
        exact = exactly(at)
        normal = abs(exact) >= 2.0**-126
        spacing = np.spacing(abs(exact[normal]).astype(np.float32)).astype(np.float64)
        ulps = (abs(ours[normal] - exact[normal]) / spacing).max()
        if ulps > most:
            return f"off by {ulps:.2f} units in the last place, {most} are allowed"
        below = abs(ours[~normal])
        return f"{below.max():.3g} where the result is below 2^-126" if below.any() else None
    if name in PRODUCTS:
        # Addends are aligned to the largest and cut off: a unit of fp32 each, at most, of 17.
        left, exact, size = products(found, name)
        worst = (abs(left - exact) / size).max() * 2**23
        return f"off by {worst:.1f} units of fp32 of the sum of sizes, 17 are allowed" if worst > 17 else None
    nothing = [np.isnan(floats(w)) for w in (found, beside)] if name == "ends_of_powers" else [False, False]
    differ = (found != beside) & ~(nothing[0] & nothing[1])
    return (
        f"{differ.sum()} of {found.size} words differ, first word {differ.argmax()}" if differ.any() else None
    )


@functools.cache
def said():
    """{"gpu": name, "left_out": primitives, "words": {primitive: uint32 words}} that a GPU left, or None where none has spoken yet."""
    if not SAID.exists():
        return None
    kept = json.loads(SAID.read_text())
    found = {
        name: np.array([int(w, 16) for w in text.split()], np.uint32) for name, text in kept["words"].items()
    }
    return kept | {"words": found}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch, kept, left_out, failed = f"{major}{minor}" + "a" * (major >= 9), {}, [], 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        emulated, on_gpu = emulated_program(folder), gpu_program(folder, arch)
        for name, needs in names(emulated).items():
            if needs not in ("", f"sm_{arch}"):
                left_out.append(name)
                print(f"{name:24}left out: needs {needs}", flush=True)
                continue
            try:
                kept[name] = words(on_gpu, name)
                found = broken(name, kept[name], words(emulated, name))
            except (RuntimeError, subprocess.TimeoutExpired) as e:
                found = str(e)
            failed += found is not None
            print(f"{name:24}{found or 'right'}", flush=True)
    gpu = torch.cuda.get_device_name()
    if asked.write:
        text = {name: " ".join(f"{w:08x}" for w in found) for name, found in kept.items()}
        SAID.write_text(json.dumps({"gpu": gpu, "left_out": left_out, "words": text}, indent=1) + "\n")
    print(f"{len(kept)} primitives on {gpu}, {failed} not as written, {len(left_out)} left out")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
