"""Would the tests notice? Every barrier, bound, stride, step, index, shuffle and early exit of the CUDA kernels is spoilt in turn.

    python tests/mutants.py [--sample N] [--jobs J] [--write]

One build has all mutants, each switched on by its number: `n < N` becomes `n < (mutant == 17) + N`. One is caught where a
call of tests/emulated_cases.py is wrong in some order, crashes or does not end, or else where the address or the thread
sanitizer complains, in builds of their own. Those that nothing catches must stand in tests/data/mutant_survivors.json with
the reason; --write adds the others, without one. --sample N takes every N-th.
"""

import argparse
import collections
import concurrent.futures
import ctypes
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib

ROOT = pathlib.Path(__file__).parents[1]
SURVIVORS = ROOT / "tests/data/mutant_survivors.json"
HEADERS = ("rt.cuh", "philox.cuh")
FUNCTIONS = {
    "layer_norm.cu": ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"),
    "softmax.cu": ("softmax", "log_softmax", "scaled_masked_softmax"),
    "position.cu": ("add_positional_encoding", "embeddings"),
}
RULE, ORDER, ERROR, ADDRESS, RACE = 1, 2, 3, 4, 5  # exit statuses of the process that runs a mutant
SECONDS = {"plain": 3, "address": 20, "race": 40}  # of one call's processor time
STATUS = {
    0: "not caught",
    RULE: "wrong",
    ORDER: "wrong in some order",
    ERROR: "reported by the emulation",
    ADDRESS: "reported by the address sanitizer",
    RACE: "races",
}
TIERS = {
    "plain": ("", (), {}),
    "address": (
        "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
        ("libasan", "libubsan"),
        {"ASAN_OPTIONS": f"detect_leaks=0:exitcode={ADDRESS}", "UBSAN_OPTIONS": f"exitcode={ADDRESS}"},
    ),
    "race": (
        "-fsanitize=thread",
        ("libtsan", "libubsan"),
        {"TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE}"},
    ),
}

# kind, what is looked for, and what is inserted before (or, with (n, text), around) its n-th group; {m} is 1 or 0
OPERATORS = [
    (kind, re.compile(pattern), before, after)
    for kind, pattern, before, after in (
        (
            "sync",
            r"(?:^|[;{)] *|\s)(__sync(?:threads|warp)\(|ptx::cp_async_(?:wait|commit)\b)",
            "if (!{m}) ",
            "",
        ),
        ("exit", r"\bif \((.+)\) (?:return|continue|break);", "!{m} && (", ")"),
        ("bound", r" (?:<|>=) ([\w(-][\w.]*)", "{m} + ", ""),
        ("bound", r" (?:<=|>) ([\w(-][\w.]*)", "-{m} + ", ""),
        ("equal", r" (?:==|!=) ([\w(-][\w.]*)", "{m} + ", ""),
        ("stride", r"\* ([\w.]*stride\w*|N|C|M|k[A-Z]\w*)\b", "({m} + ", ")"),
        ("share", r"[/%] (32|16|k[A-Z]\w*|[\w.]*inner)\b", "(", " >> {m})"),
        ("step", r"\+= ([\w(][\w.]*)(?=[^;]*\)(?: |$))", "{m} + ", ""),
        ("shuffle", r"__shfl_\w+\(\w+, [^,()]+(?:\[\w+\])?, (\w+)", "{m} + ", ""),
        ("index", r"\bs[A-Z]\w*(?:\[[^\]]+\])?\[([^\]]+)\]", "{m} + ", ""),
    )
]
NEVER = re.compile(r"constexpr|static_assert|template|SMEM_|^\s*#|\busing\b|__launch_bounds__|\basm\b")

spec = importlib.util.spec_from_file_location("fastattn_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def device_lines(text):
    """Numbers of the lines of functions and types that run on the device; namespaces are looked into."""
    chunk, depth, found = [], 0, set()
    for number, line in enumerate(text.splitlines()):
        code = line.partition("//")[0]
        if depth == 0 and re.match(r'namespace\b.*\{$|extern "C" \{$|\}  // namespace|#', line):
            continue
        chunk.append((number, code))
        depth += code.count("{") - code.count("}")
        if depth == 0 and code.rstrip().endswith((";", "}")):
            if any("__device__" in code or "__global__" in code for _, code in chunk):
                found.update(number for number, _ in chunk)
            chunk = []
    return found


def mutants_of(text):
    """(line number, key, [(column, insertion)]) of each; the key names it wherever its line moves to."""
    on_device, seen = device_lines(text), collections.Counter()
    for number, line in enumerate(text.splitlines()):
        code = line.partition("//")[0]
        if number not in on_device or NEVER.search(code):
            continue
        for kind, pattern, before, after in OPERATORS:
            for match in pattern.finditer(code):
                name = f"{kind} {match[0].strip()} in {code.strip()}"
                seen[name] += 1
                key = name + (f" ({seen[name]})" if seen[name] > 1 else "")
                yield number, key, [(match.start(1), before)] + [(match.end(1), after)] * bool(after)


class Mutants:
    """A copy of csrc/ in which each mutant has its switch. found: (file, key) by number, from 1."""

    def __init__(self, folder):
        self.folder, self.objects = folder, {}
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        with open(folder / "csrc/emulation/emulation.h", "a") as header:
            header.write("namespace emulation {\nextern int mutant;\n}\n")
        (folder / "csrc/mutant.cpp").write_text(
            'namespace emulation {\nint mutant = 0;\n}\nextern "C" __attribute__((visibility("default"))) '
            "void set_mutant(int number) { emulation::mutant = number; }\n"
        )
        files = [*HEADERS, *sorted(p.name for p in (ROOT / "csrc").glob("*.cu"))]
        texts = {name: (ROOT / "csrc" / name).read_text() for name in files}
        sites = {name: list(mutants_of(text)) for name, text in texts.items()}
        while True:
            self.found = []
            for name, text in texts.items():
                self.switch(folder / "csrc" / name, text, sites[name])
            # What stands where a constant must cannot have a switch: such lines are left alone.
            refused = self.lines_refused([name for name in files if name.endswith(".cu")])
            if not refused:
                break
            kept = {name: [s for s in found if (name, s[0]) not in refused] for name, found in sites.items()}
            if kept == sites:
                raise SystemExit(f"the kernels do not compile with switches: {sorted(refused)[:5]}")
            sites = kept

    def switch(self, path, text, sites):
        lines, insertions = text.splitlines(), []
        for number, key, edits in sites:
            self.found.append((path.name, key))
            on = f"(::emulation::mutant == {len(self.found)})"
            insertions += [(number, column, text.replace("{m}", on)) for column, text in edits]
        for number, column, inserted in sorted(insertions, key=lambda i: i[:2], reverse=True):
            lines[number] = lines[number][:column] + inserted + lines[number][column:]
        path.write_text("\n".join(lines) + "\n")

    def lines_refused(self, kernels):
        found = set()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for text in pool.map(self.syntax_errors, kernels):
                for name, number in re.findall(r"csrc/([\w.]+):(\d+):\d+: error", text):
                    found.add((name, int(number) - 1))
                if "error" in text and not found:
                    raise SystemExit(text[:3000])
        return found

    def syntax_errors(self, name):
        source = self.folder / "csrc" / name
        command = [*build.emulated_compiler(source), "-fsyntax-only", source]
        return subprocess.run(command, capture_output=True, text=True).stderr

    def extension(self, tier):
        """Path of an extension built for a tier; what a sanitizer does not look at is compiled once."""
        folder = self.folder / tier
        folder.mkdir()
        sources = [
            p
            for p in self.folder.glob("csrc/**/*")
            if p.suffix in (".cu", ".cpp") and p.parent.name != "tests"
        ]
        build.ROOT = self.folder
        os.environ["CXXFLAGS"] = TIERS[tier][0]
        *compile_steps, (target, objects, link) = build.emulated_steps(
            sources, folder, folder / "_C_emulated.so"
        )
        todo = []
        for out, _, command in compile_steps:
            key = tuple(word for word in command if not word.startswith(str(folder)))
            if key not in self.objects:
                self.objects[key] = out
                todo.append(command)
            link[link.index(out)] = self.objects[key]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda command: subprocess.run(command, check=True), todo))
        subprocess.run(link, check=True)
        return target

    def run(self, tier, numbers, jobs):
        """{number: exit status, or minus a signal} of the mutants, each in a process of its own."""
        _, libraries, env = TIERS[tier]
        preload = [
            subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
            for name in libraries
        ]
        chosen = {
            name: [n for n in numbers if self.found[n - 1][0] == name] for name in {f for f, _ in self.found}
        }
        command = [sys.executable, __file__, "--run", str(self.extension(tier)), tier, "--jobs", str(jobs)]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "LD_PRELOAD": " ".join(preload),
            **env,
        }
        done = subprocess.run(command, input=json.dumps(chosen), stdout=subprocess.PIPE, text=True, env=env)
        if done.returncode:
            raise SystemExit(f"the {tier} build: clean code fails, or its process ended: {done.stdout}")
        return {int(n): status for n, status in json.loads(done.stdout.splitlines()[-1]).items()}


def run(extension, tier, chosen, jobs):
    """Runs mutants, given by file, of the extension at a path; prints {number: status} as JSON."""
    import emulated_cases as tests
    import torch

    tests.load(extension)
    switch = ctypes.CDLL(str(extension)).set_mutant
    fifo, others = tests.ORDERS["fifo"], [tests.ORDERS[name] for name in ("reverse", "random", "pct")]
    known = {
        function: [[tests.Expectation(case, d) for case in tests.cases((function,))] for d in (torch.float32, torch.bfloat16)]
        for function in {f for name, numbers in chosen.items() if numbers for f in functions_of(name)}
    }  # fmt: skip
    statuses, running = {}, {}

    def status(n, calls):
        switch(n)
        for expected, orders in calls:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS[tier])  # ends a process that does not end
            found = tests.wrong(expected, orders)
            if found not in (None, "refused"):
                return RULE if "is above" in found else ORDER if "something else" in found else ERROR
        return 0

    def start(n, calls):
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                os._exit(status(n, calls))
            finally:
                os._exit(ERROR)
        running[pid] = n

    def finish():
        pid, code = os.wait()
        statuses[running.pop(pid)] = os.waitstatus_to_exitcode(code)

    for name, numbers in chosen.items():
        if not numbers:
            continue
        wide, half = ([e for f in functions_of(name) for e in known[f][i]] for i in (0, 1))
        plain = [e for e in wide if "as is" in e.case.label]
        calls = [(e, [others[0] if tier == "race" else fifo]) for e in wide + half]
        if tier == "plain":
            calls += [(e, [fifo, *others]) for e in plain]
        start(0, calls)
        while running:
            finish()
        if code := statuses.pop(0):
            raise SystemExit(f"{name}: {STATUS.get(code, code)} without any mutant")
        for n in numbers:
            if len(running) == jobs:
                finish()
            start(n, calls)
    while running:
        finish()
    print(json.dumps(statuses))


def functions_of(name):
    return FUNCTIONS.get(name) or [f for functions in FUNCTIONS.values() for f in functions]


def survivors(folder, sample=1, jobs=1):
    """(mutants tried as (file, key), those of them that nothing catches); prints who caught how many."""
    mutants = Mutants(folder)
    number_of = {found: n for n, found in enumerate(mutants.found, 1)}
    tried = [found for found in mutants.found if zlib.crc32(found[1].encode()) % sample == 0]
    alive = [number_of[found] for found in tried]
    for tier in TIERS:
        # a race takes two threads and something in between that is gone
        asked = [n for n in alive if tier != "race" or mutants.found[n - 1][1].startswith(("sync", "exit"))]
        statuses = mutants.run(tier, asked, jobs)
        said = collections.Counter(STATUS.get(status, "crash or no end") for status in statuses.values())
        print(
            f"{tier}: {len(asked)} mutants:",
            ", ".join(f"{count} {what}" for what, count in said.items()),
            flush=True,
        )
        alive = [n for n in alive if statuses.get(n, 0) == 0]
    return tried, [mutants.found[n - 1] for n in alive]


def listed():
    return json.loads(SURVIVORS.read_text()) if SURVIVORS.exists() else {}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run:
        run(pathlib.Path(asked.run[0]), asked.run[1], json.load(sys.stdin), asked.jobs)
        return
    with tempfile.TemporaryDirectory() as folder:
        tried, alive = survivors(pathlib.Path(folder), asked.sample, asked.jobs)
    known = listed()
    unknown = [(file, key) for file, key in alive if key not in known.get(file, {})]
    stale = [(file, key) for file, key in tried if key in known.get(file, {}) and (file, key) not in alive]
    for file, key in unknown:
        print(f"not caught, not listed: {file}: {key}")
        known.setdefault(file, {})[key] = ""
    for file, key in stale:
        print(f"listed, but caught: {file}: {key}")
        del known[file][key]
    if asked.write:
        SURVIVORS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"{len(tried)} mutants, {len(alive)} not caught, {len(unknown)} of them not listed")
    sys.exit(bool(unknown or stale))


if __name__ == "__main__":
    main()
