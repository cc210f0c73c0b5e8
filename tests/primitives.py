"""Does the emulation compute what a GPU does? Single instructions, each in a process of its own, which may hang.

    python tests/primitives.py [--write]

Runs csrc/emulation/tests/primitives.cu on the GPU and compares with what PTX's manual and CUDA's guide say, by numpy, and
with the emulation. --write keeps what the GPU said in tests/data/primitives.json, which the tests hold the emulation to.
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
    for part, more in ((source, flags), (ROOT / "csrc/emulation/engine.cpp", engine_flags or flags)):
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
    return subprocess.run([program], stdout=subprocess.PIPE, text=True).stdout.split()


def words(program, name):
    """What a primitive leaves, as uint32."""
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=SECONDS)
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


def broken(name, found, beside):
    """A sentence if what a GPU left, `found`, is not what is written, or not what the emulation left, else None."""
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
    """{"gpu": name, "words": {primitive: uint32 words}} that a GPU left, or None where none has spoken yet."""
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
    arch, kept, failed = f"{major}{minor}" + "a" * (major >= 9), {}, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        emulated, on_gpu = emulated_program(folder), gpu_program(folder, arch)
        for name in names(emulated):
            try:
                kept[name] = words(on_gpu, name)
                found = broken(name, kept[name], words(emulated, name))
            except (RuntimeError, subprocess.TimeoutExpired) as e:
                found = str(e)
            failed += found is not None
            print(f"{name:24}{found or 'right'}", flush=True)
    if asked.write:
        text = {name: " ".join(f"{w:08x}" for w in found) for name, found in kept.items()}
        SAID.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "words": text}, indent=1) + "\n")
    print(f"{len(kept)} primitives on {torch.cuda.get_device_name()}, {failed} not as written")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
