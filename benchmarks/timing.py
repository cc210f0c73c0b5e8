"""How long a call takes, by a protocol that is the same for ours and for every peer.

On a GPU: CUDA events around each call with the L2 flushed before it by *reading* a clean buffer (zeroing one would leave
dirty lines to be written back inside the timed region), everybody interleaved (ABAB) in one process; the host's time per
call; a CUDA graph of many calls over rotating inputs; one second back to back, with clocks and power read meanwhile.
On a CPU: medians of time.perf_counter, interleaved as well.
"""

import statistics
import subprocess
import time

import torch

L2_FLUSH_BYTES = 1 << 28  # twice the L2 of a B200, four times that of an H200
GRAPH_CALLS = 50
# Operations of the tensor cores per SM and clock, dense 16-bit, by compute capability.
FLOPS_PER_CLOCK = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}


def is_gpu(device):
    return device.type == "cuda"


def quantiles(samples):
    """(20 %, median, 80 %) of at least one sample."""
    ordered = sorted(samples)
    pick = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return pick(0.2), statistics.median(ordered), pick(0.8)


def cpu_times(calls, seconds):
    """{name: [microseconds]} of each call, interleaved, for about `seconds` altogether."""
    samples = {name: [] for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    while len(next(iter(samples.values()))) < 5 or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - began) * 1e6)
    return samples


def host_time(call, repeats=30):
    """Microseconds the host spends on one call, the device left to run behind (median; a queue of 30 never blocks)."""
    torch.cuda.synchronize()
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        samples.append((time.perf_counter() - began) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(samples)


def gpu_times(calls, seconds, device, max_samples=200, hide_host=True):
    """{name: [microseconds]} of device time with a cold L2, interleaved, for about `seconds` altogether.

    hide_host: the host is ahead when a call begins. Without it the device waits for the host as it does in life, which is what a
    model's many launches come to.
    """
    clean = torch.zeros(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    flush = lambda: torch.sum(clean)  # noqa: E731
    flush_us = statistics.median(one_event(flush) for _ in range(5))
    # The flush must outlast the host's side of the call, or the device would wait for it between the two events.
    hidden = lambda call: int(1.5 * host_time(call, 10) / flush_us) if hide_host else 0  # noqa: E731
    flushes = {name: 1 + hidden(call) for name, call in calls.items()}
    pairs = {name: [] for name in calls}
    start = time.perf_counter()
    while len(next(iter(pairs.values()))) < max_samples:
        for name, call in calls.items():
            for _ in range(flushes[name]):
                flush()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            call()
            after.record()
            pairs[name].append((before, after))
        torch.cuda.synchronize()
        if time.perf_counter() - start > seconds and len(next(iter(pairs.values()))) >= 5:
            break
    return {name: [a.elapsed_time(b) * 1e3 for a, b in events] for name, events in pairs.items()}


def one_event(call):
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) * 1e3


def graph_time(calls, stream, microseconds):
    """Microseconds a call inside one CUDA graph, captured on `stream`, that walks `calls` (distinct inputs) in turn.

    The graph has GRAPH_CALLS of them, fewer where these would take longer than 50 ms by `microseconds` a call.
    """
    count = max(1, min(GRAPH_CALLS, int(50_000 / microseconds)))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            calls[i % len(calls)]()
    graph.replay()
    return statistics.median(one_event(graph.replay) for _ in range(5)) / count


def sustained(call, seconds=1.0):
    """(microseconds a call back to back for `seconds`, SM clock in MHz, power in W; the last two None without nvidia-smi)."""
    estimate = max(one_event(call), 1.0)
    batch = max(1, int(20_000 / estimate))  # about 20 ms between looks at the clock
    for _ in range(batch):
        call()
    torch.cuda.synchronize()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start, count, reading, previous = time.perf_counter(), 0, None, before
    before.record()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(batch):
            call()
        count += batch
        if reading is None and elapsed > seconds / 3:
            reading = ask_clock()
        marker = torch.cuda.Event()
        marker.record()
        previous.synchronize()  # one batch stays queued: the GPU never waits, and the queue never grows
        previous = marker
    after.record()
    reading = reading or ask_clock()  # one batch took all the time: it is still running
    torch.cuda.synchronize()
    return before.elapsed_time(after) * 1e3 / count, *reading()


def ask_clock():
    """A function that gives (SM clock in MHz, power in W) as they are now; both are None where nobody knows."""
    try:
        seen = float(torch.cuda.clock_rate()), torch.cuda.power_draw() / 1e3
    except Exception:  # no pynvml, or a virtual machine that hides them
        process = ask_nvidia_smi()  # which takes a tenth of a second and more: its answer is read later
        return lambda: read_nvidia_smi(process)
    return lambda: seen


def ask_nvidia_smi():
    """A running nvidia-smi whose answer is read later, so that the clock is that of a busy GPU; None where it is missing."""
    index = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-i", f"GPU-{index}"]  # fmt: skip
    try:
        return subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def read_nvidia_smi(process):
    if process is None:
        return None, None
    try:
        clock, power = process.communicate(timeout=10)[0].split(",")
        return float(clock), float(power)
    except (ValueError, subprocess.TimeoutExpired):  # "[N/A]" in a virtual machine
        process.kill()
        return None, None


def peak_memory(call):
    """Bytes that a call needs beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def ceilings(device, nbytes=1 << 30, side=8192):
    """Measured on this GPU just now: TB/s of each mix of reads and writes, the fixed cost t0 of a launch, by a fit of
    T = t0 + bytes / rate to copies of 1/4096 to 1/16 of nbytes, and TFLOP/s of a bf16 matrix product.
    """
    from fastattn.benchmarks.ceilings import streams

    measured = {}
    for name, (read, written, movers) in streams(device, nbytes).items():
        best = min(statistics.median(gpu_times({"": mover}, 0.3, device)[""]) for mover in movers)
        measured[name] = (read + written) / best / 1e6
    points = []
    for size in (nbytes >> 12, nbytes >> 8, nbytes >> 6, nbytes >> 5, nbytes >> 4):
        read, written, movers = streams(device, size)["copy"]
        best = min(statistics.median(gpu_times({"": mover}, 0.05, device)[""]) for mover in movers)
        points.append(((read + written) / 1e6, best))
    measured["t0_us"] = (fit(points) or (0.0, 0.0))[0]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    microseconds, clock, power = sustained(lambda: a @ b)
    measured["matmul"] = 2 * side**3 / microseconds / 1e6
    return measured | {"matmul_sm_mhz": clock, "matmul_power_w": power}


def fit(points):
    """(t0, rate) of T = t0 + amount / rate through (amount, T), at least three; None where nothing grows."""
    n, mean_x, mean_y = len(points), *(sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0
    return (mean_y - slope * mean_x, 1 / slope) if n >= 3 and slope > 0 else None


def mix_rate(measured, work):
    """TB/s that memory gives to this mix of reads and writes, between the four measured ones."""
    written = work.write / (work.read + work.write)
    points = [
        (0.0, measured["read"]),
        (1 / 3, measured["add"]),
        (0.5, measured["copy"]),
        (1.0, measured["write"]),
    ]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if written <= x1:
            return y0 + (y1 - y0) * (written - x0) / (x1 - x0)
    return measured["write"]
