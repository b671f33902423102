"""How the benchmarks of cost measure: time and memory of a few ways to compute the same thing, side by side.

Time: the ways take turns, once each in a round, after one round that does not count; tables show the median of the
rounds. With one thread on a CPU it is the time of the process on the CPU, which does not run while other programs
have it; with more threads, or a GPU, that of the clock.

Memory of a computation: the most that is allocated at once beyond what was there before, in a run of its own. It is
read from the allocator: on a CPU from the events that torch's profiler keeps of every tensor made and freed, on a GPU
from `torch.cuda.max_memory_allocated`. So it does not depend on what else the machine does, nor on memory that was
freed and is used again; scratch space inside a library, such as that of a convolution, is not in it.

Memory of the process: the most that it held in RAM (VmHWM of Linux, set back before the run), with all libraries.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def arguments(about: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """A command line with the options that all of these benchmarks have; ``about`` is the text of its help."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="rounds; tables show the median (default: %(default)s)"
    )
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda (default: %(default)s)")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given; torch's threads are set."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def seconds(ways: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each way, measured in turns."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(repeats + 1):
        for name, run in ways.items():
            _wait(device)
            start = clock()
            run()
            _wait(device)
            if n:
                taken[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_allocated(run: Callable[[], Any], device: torch.device) -> float:
    """MiB allocated at most at one time while ``run`` runs, beyond what was allocated before."""
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    recorded = profiler.profiler.kineto_results.events()
    now = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]"):
        now += size
        peak = max(peak, now)
    return peak / MIB


def peak_resident(run: Callable[[], Any]) -> tuple[float, float]:
    """MiB that the process held before ``run``, and at most while it ran."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    run()
    return before, _resident("VmHWM")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
