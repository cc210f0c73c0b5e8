"""Would the tests notice? Every barrier, bound, stride, step, index, shuffle and early exit of the CUDA kernels is spoilt in turn.

    python tests/mutants.py [--sample N] [--jobs J] [--write] [FILE ...]

One build has all mutants, each switched on by its number: `n < N` becomes `n < spoilt(17) + N`. A mutant is shown the calls
of tests/emulated_cases.py that come by it. It is caught where one is wrong, crashes or does not end, in other orders too where
threads may meet; or else where the address or the thread sanitizer complains, in builds of their own. What the plain build
does not catch must stand in tests/data/mutant_survivors.json, with the reason or as a sanitizer's; --write puts it there,
without a reason. --sample N takes every N-th, of attention, which has most, every 3 N-th; FILE, such as attention_decode.cu,
those of one source. The calls that caught most others come first.
"""

import argparse
import bisect
import collections
import concurrent.futures
import ctypes
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib

ROOT = pathlib.Path(__file__).parents[1]
SURVIVORS = ROOT / "tests/data/mutant_survivors.json"
ATTENTION = (
    "attention.cuh",
    "attention_rules.cuh",
    "attention.cu",
    "attention_backward.cu",
    "attention_decode.cu",
)
SPOILT = ("rt.cuh", "philox.cuh", "softmax.cu", "layer_norm.cu", "position.cu", *ATTENTION)
RULE, ORDER, ERROR, ADDRESS, RACE = 1, 2, 3, 4, 5  # exit statuses of the process that runs a mutant
ORDERED = ("sync", "exit", "equal", "share", "index")  # kinds that may let two threads meet
SANITIZERS = ("address sanitizer", "race sanitizer")  # as reasons
SANITIZED = 24  # calls of one mutant, evenly chosen, that a sanitizer is shown beside the widest
SECONDS = {"plain": 2, "address": 20, "race": 40}  # of one call's processor time
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


def compiled(*operators):
    return [(kind, re.compile(pattern), before, after) for kind, pattern, before, after in operators]


# kind, what is looked for, and what is inserted before (or, with (n, text), around) its n-th group; {m} is 1 or 0
OPERATORS = compiled(
    (
        "sync",
        r"(?:^|[;{)] *|\s)(__sync(?:threads|warp)\(|ptx::cp_async_(?:wait|commit)\b)",
        "if (!{m}) ",
        "",
    ),
    ("exit", r"\bif \((.+)\) (?:return|continue|break);", "!{m} && (", ")"),
    ("bound", r" (?:<|>=) ([\w(-][\w.]*)", "{m} + ", ""),
    ("bound", r" (?:<=|>) ([\w(-][\w.]*)", "-{m} + ", ""),
    ("equal", r" (?:==|!=) (?!BiasGradient)([\w(-][\w.]*)", "{m} + ", ""),
    ("stride", r"\* ([\w.]*stride\w*|N|C|M|k[A-Z]\w*)\b", "({m} + ", ")"),
    ("share", r"[/%] (32|16|k[A-Z]\w*|[\w.]*inner)\b", "(", " >> {m})"),
    ("step", r"\+= ([\w(][\w.]*)(?=[^;]*\)(?: |$))", "{m} + ", ""),
    ("shuffle", r"__shfl_\w+\(\w+, [^,()]+(?:\[\w+\])?, (\w+)", "{m} + ", ""),
    ("index", r"\bs[A-Z]\w*(?:\[[^\]]+\])?\[([^\]]+)\]", "{m} + ", ""),
)
# Attention addresses tiles and fragments by small functions and by registers: there every argument that is a number, every
# index, addend and mask of bits is spoilt too, each condition made false, and each wait told of one copy more under way.
OF_ATTENTION = compiled(
    ("wait", r"(ptx::cp_async_wait<(.+?)>)\(\)", "{m} ? ptx::cp_async_wait<1 + {2}>() : ", ""),
    (
        "share",
        r"[/%] (2|4|8|\(kD / [48]\)|[\w.]*(?:group|tiles\w*|splits|planes_h|S_new|S_q|H_kv|\bH|page_size))\b(?! \*)",
        "(",
        " >> {m})",
    ),
    ("bits", r"(?:[&^]=?|<<|>>) (\d+u?|0x\w+)\b", "(", " >> {m})"),
    ("addend", r"(?<=[\w)\]]) \+ ([\w(][\w.]*)(?![\w.>])", "{m} + ", ""),
    ("addend", r"(?<=[\w)\]]) - ([\w(][\w.]*)(?![\w.>])", "{m} - ", ""),
)
# their arguments that are numbers, by place
NUMBERS = {
    "swizzled": (0, 1), "onwards": (0, 1, 2), "copy_rows": (2, 3, 4, 5), "copy_row": (1, 4), "store_rows": (3, 4, 5, 6),
    "head": (1, 2, 3), "left_operand": (2, 3), "right_operands_of_rows": (2, 3), "right_operands": (2, 3), "each": (1, 2),
    "to_logits": (3, 4, 5), "exclude": (1, 2, 3, 4, 5, 6, 7), "kept": (2, 3), "Span::over": range(7), "Place at": (1,),
    "to_gradient": (5, 6, 7), "store_bias_gradient": (2, 3, 4, 5), "store_sums": (2, 3), "fetch": (0, 1), "arrive": (0,), "step": (0,),
    "position_at": (2, 3), "clean": (0,), "stats_of": (2,), "philox4x32_7": (1, 2, 3, 4), "total_length": (1,),
    "read_integer": (1,), "clamp": (0, 1, 2), "round_up": (0, 1), "min": (0, 1), "max": (0, 1), "cp_async_wait": (0,),
}  # fmt: skip
CALL = re.compile(
    rf"(?<![\w.])(?:\w+\.)?({'|'.join(sorted(NUMBERS, key=len, reverse=True))})(?:<[^<>()]*>)?\("
)
DECLARES = re.compile(r"\(&\w*\)\[|^\s*(?:float|u?int\d+_t|int) \w+(?:\[[^;=]*\])+;")
NEVER = re.compile(r"constexpr|static_assert|template|SMEM_|^\s*#|\busing\b|__launch_bounds__|\basm\b")

SWITCH = """
extern "C" {
extern int mutant;
extern unsigned char mutants_reached[];
}
namespace emulation {
inline bool spoilt(int number) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    mutants_reached[number] = 1;
#endif
    return mutant == number;
}
}  // namespace emulation
"""
SWITCHES = """
#define SHOWN __attribute__((visibility("default")))
extern "C" {
SHOWN int mutant = 0;
SHOWN unsigned char mutants_reached[4096] = {};
}
"""

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


def mutants_of(text, attention=False):
    """(line number, key, (first column, last, what is put before, after)) of each; the key names it wherever its line moves to."""
    on_device, seen = device_lines(text), collections.Counter()
    codes = [line.partition("//")[0] for line in text.splitlines()]
    further = collections.defaultdict(list)
    if attention:
        for number, *site in (*arguments(codes), *indices(codes), *conditions(codes)):
            further[number].append(site)
    for number, code in enumerate(codes):
        if number not in on_device or NEVER.search(code) or (attention and DECLARES.search(code)):
            continue
        found = [
            (kind, match[0], match.span(1), before.replace("{2}", match[match.re.groups]), after)
            for kind, pattern, before, after in (*OPERATORS, *(OF_ATTENTION if attention else ()))
            for match in pattern.finditer(code)
        ]
        found += [(kind, what, span, *around) for kind, what, span, *around in further[number]]
        for kind, what, (start, end), before, after in found:
            name = f"{kind} {what.strip()} in {code.strip()}"
            seen[name] += 1
            key = name + (f" ({seen[name]})" if seen[name] > 1 else "")
            yield number, key, (start, end, before, after)


def arguments(codes):
    """(line number, kind, what, columns) of each argument on one line that NUMBERS has; of calls, not of definitions."""
    starts = list(itertools.accumulate((len(code) + 1 for code in codes), initial=0))
    text = "\n".join(codes) + "\n"
    for call in CALL.finditer(text):
        depth, begin, parts = 0, call.end(), []
        for at in range(call.end(), len(text)):
            if text[at] in "([{":
                depth += 1
            elif text[at] in ")]}":
                depth -= 1
            if depth < 0 or (depth == 0 and text[at] == ","):
                parts.append((begin, at))
                begin = at + 1
            if depth < 0:
                break
        if re.search(r"\(float& v[^()]*int, int\)", text[call.end() : at]):
            continue  # nobody asks which pair it is
        for place in NUMBERS[call[1]]:
            whole = text[slice(*parts[place])] if place < len(parts) else ""
            value = whole.strip()
            if not value or "\n" in value or re.search(r"\w[*&>]? \w|^-?\d+$|^(?:r|at)$", value):
                continue  # a declaration, a constant, or another function of this name
            start = parts[place][0] + len(whole) - len(whole.lstrip())
            line = bisect.bisect_right(starts, start) - 1
            column = start - starts[line]
            yield line, "argument", f"{value} of {call[1]}", (column, column + len(value)), "{m} + (", ")"


def indices(codes):
    """The same of each index into registers and plain arrays."""
    declared = r"\b(?:float|int|u?int\d+_t|Stat|T|Fragment<[^>]*>)(?: [*&]*| [^;()]*, [*&]*)$"
    for number, code in enumerate(codes):
        for match in re.finditer(r"(?<=[\w\])])\[([^\][]+)\]", code):
            before = code[: match.start()]
            name = re.search(r"[\w.]*(?:\[[^\]]*\])*$", before).start()
            is_declared = re.search(declared, before[:name]) and before[:name].count("{") == before[
                :name
            ].count("}")
            is_declared = is_declared or re.match(r"(?:\[\w+\])* = \{", code[match.end() :])
            if not is_declared and not re.search(r"\bs[A-Z]\w*(?:\[[^\]]+\])?$", before):
                yield number, "index", f"{before[name:]}[{match[1]}]", match.span(1), "{m} + (", ")"


def conditions(codes):
    """The same of each condition of an if."""
    for number, code in enumerate(codes):
        for match in re.finditer(r"\bif \(", code):
            depth = 1
            for end in range(match.end(), len(code)):
                depth += {"(": 1, ")": -1}.get(code[end], 0)
                if depth == 0:
                    if not re.match(r"\) (?:return|continue|break)", code[end:]):
                        yield number, "if", code[match.end() : end], (match.end(), end), "!{m} && (", ")"
                    break


class Mutants:
    """A copy of csrc/ in which each mutant has its switch. found: their (file, key), number 1 first."""

    def __init__(self, folder, sample=1, spoilt=SPOILT, without=()):
        self.folder, self.objects, self.reached = folder, {}, {}
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        with open(folder / "csrc/emulation/emulation.h", "a") as header:
            header.write(SWITCH)
        (folder / "csrc/mutant.cpp").write_text(SWITCHES)
        self.texts = {name: (ROOT / "csrc" / name).read_text() for name in spoilt}
        sites = [
            (name, *site) for name, text in self.texts.items() for site in mutants_of(text, name in ATTENTION)
        ]
        self.sites = [
            site
            for site in sites
            if zlib.crc32(site[2].encode()) % (sample * 3 if sample > 1 and site[0] in ATTENTION else sample)
            == 0
            and (site[0], site[2]) not in without
        ]
        while True:
            self.switch(range(1, len(self.sites) + 1))
            # What stands where a constant must cannot have a switch: such lines are left alone.
            refused = self.lines_refused()
            if not refused:
                break
            kept = [site for site in self.sites if site[:2] not in refused]
            if kept == self.sites:
                raise SystemExit(f"the kernels do not compile with switches: {sorted(refused)[:5]}")
            self.sites = kept
        self.found = [(name, key) for name, _, key, _ in self.sites]

    def switch(self, numbers):
        """Writes the kernels with switches for these mutants."""
        for file, text in self.texts.items():
            lines, insertions = text.splitlines(), []
            for n in numbers:
                name, line, _, (start, end, before, after) = self.sites[n - 1]
                if name == file:
                    # pairs nest: at one column, what ends comes first, the inner ones before the outer ones
                    on = f"::emulation::spoilt({n})"
                    insertions.append(
                        (line, start, 1, -end if after else -len(lines[line]), n, before.replace("{m}", on))
                    )
                    if after:
                        insertions.append((line, end, 0, -start, -n, after.replace("{m}", on)))
            for line, column, *_, inserted in sorted(insertions, reverse=True):
                lines[line] = lines[line][:column] + inserted + lines[line][column:]
            (self.folder / "csrc" / file).write_text("\n".join(lines) + "\n")

    def lines_refused(self):
        found, kernels = set(), [name for name in SPOILT if name.endswith(".cu")]
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
        self.switch(numbers)
        _, libraries, env = TIERS[tier]
        preload = [
            subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
            for name in libraries
        ]
        files = {
            name: [n for n in numbers if self.found[n - 1][0] == name] for name in {f for f, _ in self.found}
        }
        ordered = [n for n in numbers if self.found[n - 1][1].startswith(ORDERED)]
        command = [sys.executable, __file__, "--run", str(self.extension(tier)), tier, "--jobs", str(jobs)]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "LD_PRELOAD": " ".join(preload),
            **env,
        }
        asked = json.dumps({"files": files, "ordered": ordered, "reached": self.reached})
        done = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, env=env)
        if done.returncode:
            raise SystemExit(f"the {tier} build: clean code fails, or its process ended: {done.stdout}")
        said = json.loads(done.stdout.splitlines()[-1])
        self.reached |= said["reached"]
        return {int(n): status for n, status in said["statuses"].items()}


def run(extension, tier, jobs, files, ordered, reached):
    """Runs the mutants of `files`, by their numbers, with those calls that come by them; prints what came of it as JSON.

    reached: {number: indices of calls}, which the plain build finds out. Other orders are for the numbers in `ordered`.
    """
    import emulated_cases as tests
    import torch

    tests.load(extension)
    library = ctypes.CDLL(str(extension))
    mutant = ctypes.c_int.in_dll(library, "mutant")
    passed = (ctypes.c_ubyte * 4096).in_dll(library, "mutants_reached")
    orders = [tests.ORDERS[name] for name in ("fifo", "reverse", "random", "pct")]
    # FIFO makes an asynchronous copy at once, REVERSE when it is waited for
    first = [orders[1:2]] * 2 if tier == "race" else [orders[0:1], orders[1:2]]
    calls, several = [], set()
    if not set(files) <= set(ATTENTION):
        cases = tests.cases(tests.OF_ROWS)
        calls += [
            tests.Expectation(case, dtype) for dtype in (torch.float32, torch.bfloat16) for case in cases
        ]
        several |= {i for i, call in enumerate(calls[: len(cases)]) if "as is" in call.case.label}
    if set(files) & {*ATTENTION, "rt.cuh", "philox.cuh"}:
        cases = tests.cases(tests.OF_ATTENTION)
        several |= set(range(len(calls), len(calls) + len(cases), 8))
        calls += [tests.Expectation(case, torch.float16) for case in cases]
        calls += [tests.Expectation(case, torch.bfloat16) for case in cases[::6]]
    several = several if tier == "plain" else set()
    caught = multiprocessing.RawArray(
        "i", len(calls)
    )  # how many mutants by each, the best of which come first
    statuses, running, clean = {}, {}, extension.parent / "clean.json"

    def wrong(call, orders, backward=True):
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS[tier])  # ends a process that does not end
        found = tests.wrong(call, orders, backward)
        if found in (None, "refused"):
            return 0
        return RULE if "is above" in found else ORDER if "something else" in found else ERROR

    def run_clean(indices):
        came, seconds = {}, {}
        for i in indices:
            ctypes.memset(passed, 0, 4096)
            begin = time.process_time()
            code = wrong(calls[i], first[i % 2])
            seconds[i] = time.process_time() - begin
            if code or (i in several and (code := wrong(calls[i], orders))):
                print(f"{calls[i].case.function} {calls[i].case.label}", file=sys.__stdout__, flush=True)
                return code
            for n, yes in enumerate(bytes(passed)):
                if yes:
                    came.setdefault(n, []).append(i)
        clean.write_text(json.dumps([came, seconds]))
        return 0

    def calls_of(n):
        mine = reached.get(str(n), [])
        if tier == "plain":
            return sorted(mine, key=lambda i: seconds[str(i)] / (1 + caught[i]))
        wide = [i for i in mine if "33000" in calls[i].case.label]  # the rows that are read in chunks
        return sorted({*mine[:: 1 + len(mine) // SANITIZED], *wide})

    def run_mutant(n):
        mutant.value = n
        mine = calls_of(n)
        shown = [(i, first[i % 2]) for i in mine]
        if n in ordered:
            shown += [(i, orders) for i in mine if i in several]
        backward = n not in files.get("attention.cu", ())  # what is wrong there shows in the outputs
        for i, order in shown:
            if code := wrong(calls[i], order, backward):
                caught[i] += 1
                return code
        return 0

    def start(n, body, *arguments):
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                os._exit(body(*arguments))
            finally:
                os._exit(ERROR)
        running[pid] = n

    def finish():
        pid, code = os.wait()
        statuses[running.pop(pid)] = os.waitstatus_to_exitcode(code)

    numbers = [n for name in files for n in files[name]]
    needed = range(len(calls)) if tier == "plain" else sorted({i for n in numbers for i in calls_of(n)})
    start(0, run_clean, needed)
    finish()
    if code := statuses.pop(0):
        raise SystemExit(f"{STATUS.get(code, code)} without any mutant")
    if tier == "plain":
        reached, seconds = json.loads(clean.read_text())
    for n in numbers:
        if len(running) == jobs:
            finish()
        start(n, run_mutant, n)
    while running:
        finish()
    print(json.dumps({"statuses": statuses, "reached": reached}))


def survivors(folder, sample=1, jobs=1, tiers=tuple(TIERS), **which):
    """The mutants tried, as (file, key), and who catches those that the plain build does not: {(file, key): tier or None}."""
    mutants = Mutants(folder, sample, **which)
    alive, caught_by = list(range(1, len(mutants.found) + 1)), {}
    for tier in tiers:
        # a race takes two threads and something in between that is gone
        asked = [n for n in alive if tier != "race" or mutants.found[n - 1][1].startswith(("sync", "exit"))]
        statuses = mutants.run(tier, asked, jobs) if asked else {}
        said = collections.Counter(STATUS.get(status, "crash or no end") for status in statuses.values())
        print(
            f"{tier}: {len(asked)} mutants:", ", ".join(f"{n} {what}" for what, n in said.items()), flush=True
        )
        caught_by |= {mutants.found[n - 1]: tier for n, status in statuses.items() if status}
        alive = [n for n in alive if statuses.get(n, 0) == 0]
        if tier == "plain":
            for n in alive:
                if str(n) not in mutants.reached:
                    print("no case comes to", *mutants.found[n - 1], flush=True)
    left = [found for found in mutants.found if caught_by.get(found) != "plain"]
    return mutants.found, {found: caught_by.get(found) for found in left}


def listed():
    return json.loads(SURVIVORS.read_text()) if SURVIVORS.exists() else {}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", metavar="FILE", help="of csrc/, which alone are spoilt")
    asked = parser.parse_args()
    if asked.run:
        run(pathlib.Path(asked.run[0]), asked.run[1], asked.jobs, **json.load(sys.stdin))
        return
    with tempfile.TemporaryDirectory() as folder:
        tried, left = survivors(pathlib.Path(folder), asked.sample, asked.jobs, spoilt=asked.files or SPOILT)
    known, wrong = listed(), 0
    for (file, key), tier in left.items():
        reason = known.setdefault(file, {}).get(key, "")
        if not reason or (tier is None) == (reason in SANITIZERS):
            known[file][key] = f"{tier} sanitizer" if tier else ""
            print(f"not caught by the plain build: {file}: {key}: {known[file][key] or 'nor by another'}")
            wrong += 1
    for file, key in tried:
        # what is out of bounds may be wrong as well, or not: that is up to the compiler
        if (file, key) not in left and known.get(file, {}).get(key, SANITIZERS[0]) not in SANITIZERS:
            print(f"listed, but caught: {file}: {key}")
            del known[file][key]
            wrong += 1
    if asked.write:
        SURVIVORS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"{len(tried)} mutants, {len(left)} not caught by the plain build; {wrong} not listed so")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
