"""What nvcc makes of csrc/*.cu on every architecture aimed at: registers, spills, shared memory, occupancy, instructions.

    python tests/cuda_costs.py          # the occupancy of every kernel on sm_90a, those below half of the warps first
    python tests/cuda_costs.py --write  # tests/data/cuda_resources.json and cuda_census.json anew, where a change is wanted

Each source is compiled once an architecture, to device code only (the extension's own build compiles the host side); the
tests share the result. No GPU is asked. Blocks and warps of an SM are those of kernels without dynamic shared memory.
"""

import argparse
import collections
import concurrent.futures
import fcntl
import hashlib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [p for p in (str(ROOT),) if p not in sys.path]

from fastattn.benchmarks import model  # noqa: E402

NVCC = shutil.which("nvcc")
ARCHS = ("80", "90a", "100a", "120")
ONLY = {"_sm90.cu": ("90a",)}
RESOURCES = ROOT / "tests" / "data" / "cuda_resources.json"
CENSUS = ROOT / "tests" / "data" / "cuda_census.json"
CENSUS_ARCH = "90a"
# Warps, blocks and bytes of shared memory that an SM holds (CUDA programming guide, compute capabilities).
SM = {"80": (64, 32, 167936), "90a": (64, 32, 233472), "100a": (64, 32, 233472), "120": (48, 24, 102400)}

# Elements that a thread has in hand, by the template arguments of a kernel: what its instructions are divided by.
rows = lambda T, kVec, kThreads, kHeld, *_: int(kVec) * max(1, int(kHeld))  # noqa: E731
ELEMENTS = {
    "softmax_fwd_kernel": rows,
    "softmax_bwd_kernel": rows,
    "softmax_fwd_across_kernel": lambda T, kVec, kHeld, *_: int(kVec) * int(kHeld),
    "softmax_bwd_across_kernel": lambda T, kVec, kHeld: int(kVec) * int(kHeld),
    "layer_norm_fwd_kernel": rows,
    "layer_norm_bwd_kernel": lambda T, kThreads, kHeld, kBlock: 16 // WIDTH[T] * max(1, int(kHeld)),
    "embeddings_fwd_kernel": rows,
    "embeddings_bwd_kernel": rows,
    "add_positional_encoding_fwd_kernel": lambda T, kVec: int(kVec),
    "add_positional_encoding_bwd_kernel": lambda T, kVec: int(kVec),
}
WIDTH = {"float": 4, "__half": 2, "__nv_bfloat16": 2}


def sources():
    """(source, architecture) of everything that is compiled."""
    return [
        (source, arch)
        for source in sorted((ROOT / "csrc").glob("*.cu"))
        for arch in next((archs for suffix, archs in ONLY.items() if source.name.endswith(suffix)), ARCHS)
    ]


def compile_device(source, arch, folder):
    """ptxas's text; folder gets out.cubin and the PTX."""
    command = [NVCC, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v"]
    command += ["-Werror", "all-warnings", "--keep", "--keep-dir", folder, "-cubin", source]
    done = subprocess.run([*command, "-o", folder / "out.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def complaints(text):
    """The kernels that spill or keep an array in local memory, and ptxas's remarks on lost performance."""
    bad, kernel = [], "?"
    for line in text.splitlines():
        kernel = (re.search(r"Function properties for (\S+)", line) or (None, kernel))[1]
        if re.search(r"\b[1-9]\d* bytes (stack frame|spill)", line):
            bad.append(f"{kernel}: {line.strip()}")
        if re.search(r"\(C75\d\d\)", line):
            bad.append(line.strip())
    return bad


def resources(text, ptx):
    """{mangled name: registers, shared, stack and spills in bytes, threads a block} of every kernel."""
    found = {}
    for part in text.split("Compiling entry function '")[1:]:
        number = lambda pattern, part=part: int((re.search(pattern, part) or (0, 0))[1])  # noqa: E731
        name = part[: part.index("'")]
        found[name] = {
            "registers": number(r"Used (\d+) registers"),
            "shared": number(r"(\d+) bytes smem"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            "threads": int(re.search(rf"\.entry {re.escape(name)}\b.*?\.maxntid (\d+)", ptx, re.S)[1]),
        }
    return found


def readable(names):
    """softmax_fwd_kernel<float, 4, 32, 8> for each mangled name."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    lines = done.stdout.replace("(anonymous namespace)::", "").splitlines()
    return {name: line.split("(")[0].removeprefix("void ") for name, line in zip(names, lines, strict=True)}


def nvdisasm():
    """The disassembler of the toolkit, or of triton's wheel; None without either."""
    places = [pathlib.Path(NVCC).resolve().parent]
    top = re.search(r"^#\$ TOP=(.+)$", subprocess.run([NVCC, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True,
                                                      text=True).stderr, re.M)  # fmt: skip
    places += [pathlib.Path(top[1].strip()) / "bin"] if top else []
    triton = importlib.util.find_spec("triton")
    places += [pathlib.Path(triton.origin).parent / "backends/nvidia/bin"] if triton else []
    return shutil.which("nvdisasm", path=os.pathsep.join(map(str, places)))


def census(cubin):
    """{mangled name: model.census and model.step} of every kernel of a cubin."""
    text = subprocess.run([nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\t\.section\t\.text\.(\w+),.*$", text, flags=re.M)
    return {
        name: model.census(sass) | {"step": model.step(sass)}
        for name, sass in zip(parts[1::2], parts[2::2], strict=True)
    }


def occupancy(arch, registers, shared, threads):
    """Blocks an SM holds at once, and the share of its warps they are. Registers go to warps in units of 256."""
    warps, blocks, bytes_ = SM[arch]
    of_block = -(-threads // 32)
    held = min(
        model.REGISTERS // (-(-registers * 32 // 256) * 256 * of_block),
        bytes_ // (shared + 1024),
        warps // of_block,
        blocks,
    )
    return held, round(held * of_block / warps, 3)


def one(source, arch):
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        text = compile_device(source, arch, folder)
        kernels = resources(text, "".join(p.read_text() for p in folder.glob("*.ptx")))
        seconds = time.perf_counter() - started
        sass = census(folder / "out.cubin") if arch == CENSUS_ARCH and nvdisasm() else {}
    names = readable(list(kernels))
    return {
        "source": source.name,
        "arch": arch,
        "seconds": round(seconds, 1),
        "complaints": complaints(text),
        "kernels": {names[name]: row | {"sass": sass.get(name)} for name, row in kernels.items()},
    }


def cached(source, arch):
    """one(source, arch), made once for this source and its headers however many test processes ask."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(f"{version} {nvdisasm()} {source.name} {arch}".encode())
    headers = [*sorted((ROOT / "csrc").glob("*.cuh")), ROOT / "csrc/launchers.h"]
    for path in [pathlib.Path(model.__file__), source, *headers]:
        digest.update(path.read_bytes())
    for function in (one, compile_device, complaints, resources, census):
        digest.update(inspect.getsource(function).encode())
    file = ROOT / ".pytest_cache" / f"cuda-{digest.hexdigest()[:16]}.json"
    file.parent.mkdir(exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            file.write_text(json.dumps(one(source, arch)))
    return json.loads(file.read_text())


def cached_report():
    """All of them, two at a time, the slow ones first."""
    order = sorted(sources(), key=lambda pair: -pair[0].stat().st_size)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda pair: cached(*pair), order))


def resource_table(report):
    """{kernel: {arch: [registers, shared, stack, spills]}}."""
    table = collections.defaultdict(dict)
    for part in report:
        for name, row in part["kernels"].items():
            table[name][part["arch"]] = [row[key] for key in ("registers", "shared", "stack", "spills")]
    return {
        name: dict(sorted(row.items(), key=lambda item: ARCHS.index(item[0])))
        for name, row in sorted(table.items())
    }


def elements(kernel):
    """How many elements a thread has in hand; None where a kernel's arguments do not say."""
    stem, _, arguments = kernel.partition("<")
    return ELEMENTS[stem](*arguments.rstrip(">").split(", ")) if stem in ELEMENTS and arguments else None


def vectors(kernel):
    """Whether a kernel's template arguments say that it moves 16-byte vectors of T; the sums of layer_norm are single numbers."""
    found = re.match(r"\w+<(float|__half|__nv_bfloat16), (\d+)\b", kernel)
    whole = bool(found) and WIDTH[found[1]] * int(found[2]) == 16
    return whole and not kernel.startswith(("layer_norm_bwd_kernel", "layer_norm_bwd_sums_kernel"))


def of_step(kernel, sass):
    """What the gate watches of a tile's step: instructions by pipe for an element of S, of which a lane has rows * others / 32."""
    tile = model.portable_tile(kernel)
    if tile is None:
        return {}
    ops = model.turns(sass["step"], "HMMA", tile.instructions()["HMMA"])
    of_lane = tile.rows * tile.others / 32
    by_pipe = {pipe: round(n / of_lane, 3) for pipe, n in model.pipes(ops).items()}
    return {"an S element": round(sum(model.pipes(ops).values()) / of_lane, 3)} | {
        f"{pipe} an S element": n for pipe, n in by_pipe.items()
    }


def census_table(report):
    """{kernel: what the gate watches of its code for sm_90a}; {} where nothing could disassemble it."""
    table = {}
    for part in report:
        for name, row in part["kernels"].items():
            if not row["sass"]:
                continue
            ops, loop = row["sass"]["all"], row["sass"]["loop"]
            count = lambda ops: sum(n for op, n in ops.items() if op != "NOP")  # noqa: E731
            blocks, share = occupancy(part["arch"], row["registers"], row["shared"], row["threads"])
            watched = {
                "instructions": count(ops),
                "longest loop": count(loop["ops"]) if loop else 0,
                "wide loads": round(model.wide_share(ops, "LDG"), 3),
                "wide stores": round(model.wide_share(ops, "STG"), 3),
                "blocks an SM": blocks,
                "share of warps": share,
            }
            if elements(name):
                watched["instructions an element"] = round(count(ops) / elements(name), 2)
            table[name] = watched | of_step(name, row["sass"])
    return dict(sorted(table.items()))


def worse(before, now):
    """Sentences on what is more than 3 % worse than committed; more wide accesses, blocks and warps are better."""
    found = []
    for kernel, row in now.items():
        if kernel not in before:
            found.append(f"{kernel} is not listed")
            continue
        for key, value in row.items():
            known = before[kernel].get(key)
            pairs = zip(value, known or [], strict=False) if isinstance(value, list) else [(value, known)]
            up_is_better = str(key).startswith(("wide", "blocks", "share"))
            if known is None or any(v < 0.97 * k if up_is_better else v > 1.03 * k for v, k in pairs):
                found.append(f"{kernel}, {key}: {value}, was {known}")
    return found


def write(path, table):
    path.write_text(
        "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items()) + "\n}\n"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    report = cached_report()
    for name in sorted({part["source"] for part in report}):
        spent = {part["arch"]: part["seconds"] for part in report if part["source"] == name}
        print(f"{name}: {', '.join(f'{seconds} s for sm_{arch}' for arch, seconds in spent.items())}")
    if options.write:
        write(RESOURCES, resource_table(report))
        if table := census_table(report):
            write(CENSUS, table)
        else:
            print("no nvdisasm in the toolkit or in triton: the census is as it was")
        return
    kernels = {k: row for part in report if part["arch"] == CENSUS_ARCH for k, row in part["kernels"].items()}
    shares = {
        k: occupancy(CENSUS_ARCH, row["registers"], row["shared"], row["threads"])
        for k, row in kernels.items()
    }
    for kernel in sorted(kernels, key=lambda k: (shares[k][1], k)):
        (blocks, share), row = shares[kernel], kernels[kernel]
        print(
            f"{share:4.0%} of the warps, {blocks:2} blocks of {row['threads']:4}, {row['registers']:3} registers: {kernel}"
        )
    below = sum(share < 0.5 for _, share in shares.values())
    print(f"{below} of {len(kernels)} kernels hold less than half of an SM's warps")


if __name__ == "__main__":
    main()
