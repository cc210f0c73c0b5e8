"""Builds fastattn._C, the CUDA extension. Metadata is in pyproject.toml.

No torch header and no torch library go in and cudart is linked statically: one build serves every torch, and
building needs neither torch nor a GPU. Two environment variables steer it:

FASTATTN_CUDA        auto (default): build where nvcc and pybind11 are found, else go on without the extension
                     and say so; 0: never; 1: build or fail; emulated: as auto for fastattn._C_emulated, the same
                     sources as plain C++ that runs on the CPU, for tests; CXXFLAGS are added
FASTATTN_CUDA_ARCHS  such as "80;90a"; default: the GPUs of this machine, else 80;90a. PTX of the lowest is
                     added, so that newer GPUs run it.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# A file so named uses what one architecture alone has; the others are compiled for the whole list.
ONLY_ARCH = {"_sm90.cu": "90a"}
# Two cores that begin with these have nothing long left when one of them is done.
LONGEST = ("attention_backward.cu", "layer_norm.cu")
GO_ON = "built without the CUDA extension; the Triton and torch backends remain"


def say(sentence):
    print(f"[fastattn] {sentence}", file=sys.stderr, flush=True)


def output(*command):
    """Standard output and error of a command; empty where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout + done.stderr


def find_nvcc():
    """In CUDA_HOME if it is set; else on PATH, in the usual place, in pip's nvidia packages."""
    if "CUDA_HOME" in os.environ:
        places = [f"{os.environ['CUDA_HOME']}/bin"]
    else:
        pip = [f"{p}/nvidia/{d}/bin" for p in sys.path for d in ("cu13", "cuda_nvcc")]
        places = [*os.get_exec_path(), "/usr/local/cuda/bin", *pip]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def toolkit_root(nvcc):
    """The compiler's own word for it, since the nvcc found may be a wrapper script."""
    top = re.search(r"^#\$ TOP=(.+)$", output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.M)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parents[1]


def find_headers():
    """The CUDA toolkit's include folder: an nvcc's, else that of pip's packages; None without either."""
    nvcc = find_nvcc()
    pip = [Path(p) / "nvidia" / d / "include" for p in sys.path for d in ("cu13", "cuda_runtime")]
    places = ([toolkit_root(nvcc) / "include"] if nvcc else []) + pip
    needed = ("cuda_bf16.h", "cuda_runtime_api.h", "crt/host_defines.h")
    return next((place for place in places if all((place / name).exists() for name in needed)), None)


def find_pybind11():
    """The include folder of pybind11, or of the copy inside a torch wheel."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin and (Path(spec.origin).parent / "include/pybind11/pybind11.h").exists():
            return Path(spec.origin).parent / "include"
    return None


def find_ninja():
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    return shutil.which("ninja")


def number(arch):
    return int(re.match(r"\d+", arch)[0])


def cuda_archs(nvcc):
    """The architectures to compile for, lowest first. A GPU 9.0 gets `90a`, which sm_90 alone understands."""
    asked = re.findall(r"\d+[a-z]?", os.environ.get("FASTATTN_CUDA_ARCHS", "").replace(".", ""))
    if not asked:
        gpus = re.findall(
            r"^(\d+)\.(\d)$", output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"), re.M
        )
        known = re.findall(r"compute_(\d+)", output(nvcc, "--list-gpu-arch"))
        asked = ["90a" if gpu == "90" else gpu for gpu in map("".join, gpus) if gpu in known]
    return sorted(set(asked) or {"80", "90a"}, key=number)


def extensions():
    wish = os.environ.get("FASTATTN_CUDA", "auto").lower()
    if wish not in ("auto", "0", "1", "emulated"):
        raise SystemExit(f"[fastattn] FASTATTN_CUDA={wish}: it takes auto, 0, 1 or emulated")
    if wish == "0":
        say(f"FASTATTN_CUDA=0: {GO_ON}")
        return []
    cuda = {"nvcc (on PATH or in CUDA_HOME)": find_nvcc()}
    if wish == "emulated":
        cuda = {
            "CUDA headers (of nvcc, or of pip install nvidia-cuda-runtime nvidia-cuda-crt)": find_headers()
        }
    tools = cuda | {"pybind11": find_pybind11()}
    missing = " and ".join(name for name, found in tools.items() if not found)
    if missing and wish == "1":
        raise SystemExit(f"[fastattn] FASTATTN_CUDA=1, but {missing} not found")
    if missing:
        say(f"{missing} not found: {GO_ON}")
        return []
    sources, name = [*ROOT.glob("csrc/*.cu"), *ROOT.glob("csrc/*.cpp")], "fastattn._C"
    if wish == "emulated":
        sources, name = [*sources, *ROOT.glob("csrc/emulation/*.cpp")], "fastattn._C_emulated"
    sources = sorted(sources, key=lambda s: (s.name not in LONGEST, s.suffix != ".cu", s))
    return [Extension(name, [str(s.relative_to(ROOT)) for s in sources], language="c++")]


class BuildCuda(build_ext):
    def build_extension(self, ext):
        temp = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name.endswith("_emulated"):
            temp /= "emulated"
            temp.mkdir(parents=True, exist_ok=True)
            run(emulated_steps(ext.sources, temp, target), temp)
        else:
            temp.mkdir(parents=True, exist_ok=True)
            run(cuda_steps(ext.sources, temp, target), temp)


CXX = os.environ.get("CXX", "g++")
ENGINE = ("engine.cpp", "sm90.cpp")  # of csrc/emulation
# Bindings read a call's arguments: -O3 compiles them half as long again and finds nothing to do.
KERNELS, BINDINGS = ["-std=c++17", "-O3"], ["-std=c++17", "-O1"]
HOST = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]


def cuda_steps(sources, temp, target):
    nvcc = find_nvcc()
    top, archs = toolkit_root(nvcc), cuda_archs(nvcc)
    libs = next((d for d in (top / "lib64", top / "lib") if (d / "libcudart_static.a").exists()), None)
    if not libs:
        raise SystemExit(f"[fastattn] no libcudart_static.a below {top}; FASTATTN_CUDA=0 builds without CUDA")
    say(f"CUDA extension for {';'.join(archs)} with {nvcc} (toolkit {top})")

    def compiler(source):
        if source.suffix == ".cu":
            command = [nvcc, *KERNELS, *gencode(source.name, archs), "-lineinfo", "-Xfatbin=-compress-all"]
            return [*command, "-Werror", "all-warnings", "-Xcompiler", ",".join(HOST)]
        return [CXX, *BINDINGS, *HOST, *foreign(top / "include"), f'-DFASTATTN_ARCHS="{";".join(archs)}"']

    static = [f"-L{libs}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
    return steps_of(sources, temp, target, compiler, static)


def emulated_compiler(source):
    # A GPU contracts a * b + c; x86-64 can where it has the instruction.
    native = output(CXX, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    fused = ["-ffp-contract=fast", *(["-mfma"] if "__FMA__" in native else [])]
    # A tensor map is aligned to 64 bytes, which g++ remarks on. Kernels get their warnings from nvcc's build: g++ does not know their pragmas, nor that two masks agree.
    host = [*HOST[:2], "-w", "-x", "c++"] if source.suffix == ".cu" else HOST
    defined = ["-DFASTATTN_EMULATION", '-DFASTATTN_ARCHS="emulated"', *foreign(find_headers())]
    fixed = ["-fno-strict-aliasing", "-fno-ipa-icf", "-Wno-psabi"]
    return [CXX, "-std=c++17", "-O1", "-g1", *fused, *fixed, *defined, *host]


def emulated_steps(sources, temp, target):
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    say(f"CUDA extension emulated on the CPU with {CXX} {' '.join(extra)}")

    def compiler(source):
        # Sanitizers look at kernels and at what runs them: bindings take a minute more. To TSAN the engine says in words
        # what a barrier orders; what it does to make it so is not looked at.
        engine = source.name in ENGINE
        races = engine and "-fsanitize=thread" in extra and "-DFASTATTN_RECORD" not in extra
        if source.suffix == ".cu" or (engine and "-fsanitize=thread" not in extra):
            return [*emulated_compiler(source), *extra]
        plain = [flag for flag in extra if "-fsanitize" not in flag]
        return [*emulated_compiler(source), *plain, *(["-DFASTATTN_TSAN"] if races else [])]

    libraries = [*extra, "-lpthread"]
    if "-DFASTATTN_RECORD" in extra:  # the engine itself is what such kernels call
        libraries = ["-lpthread"]
    return steps_of(sources, temp, target, compiler, libraries)


def foreign(cuda):
    return [f"-isystem{f}" for f in (cuda, find_pybind11(), sysconfig.get_path("include"))]


def steps_of(sources, temp, target, compiler, libraries):
    steps = []
    for source in (ROOT / s for s in sources):
        out = f"{temp}/{source.name}.o"
        steps.append(
            (out, [source], [*compiler(source), "-MD", "-MF", f"{out}.d", "-c", str(source), "-o", out])
        )
    objects = [out for out, _, _ in steps]
    return [*steps, (target, objects, [CXX, "-shared", *objects, *libraries, "-o", str(target)])]


def gencode(name, archs):
    for suffix, only in ONLY_ARCH.items():
        if name.endswith(suffix):
            return [f"-gencode=arch=compute_{only},code=sm_{only}"]
    # The letter of 90a gives such a file no other code, and without it one pass of the front end serves code and PTX.
    numbers = sorted({number(a) for a in archs})
    lowest = f"compute_{numbers[0]}"
    return [
        *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers),
        f"-gencode=arch={lowest},code={lowest}",
    ]


def run(steps, folder):
    """Steps are (output, inputs, command). ninja runs them side by side and leaves out what is up to date."""
    ninja = find_ninja()
    commands = [[ninja, "-C", str(folder)]] if ninja else [command for _, _, command in steps]

    def path(p):
        return re.sub(r"([$ :])", r"$\1", str(p))

    lines = ["rule run", "  command = $command", "  depfile = $out.d", "  deps = gcc", "  description = $out"]
    lines += ["rule link", "  command = $command", "  description = $out"]
    for out, inputs, command in steps:
        rule = "run" if "-c" in command else "link"
        lines.append(f"build {path(out)}: {rule} {' '.join(map(path, inputs))}")
        lines.append(f"  command = {shlex.join(command).replace('$', '$$')}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    for command in commands:
        if subprocess.run(command).returncode:
            raise SystemExit(
                "[fastattn] the CUDA extension did not compile; FASTATTN_CUDA=0 builds without it"
            )


if __name__ == "__main__":  # tests take the compiler's flags from here
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildCuda})
