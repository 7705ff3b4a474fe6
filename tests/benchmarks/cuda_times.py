"""What rules cost on the device, as parts of its memory's bandwidth."""

from collections.abc import Callable
from copy import deepcopy
from statistics import median
from time import perf_counter
from typing import Any

import torch
from harness import Table
from on_cuda import Section, synchronize
from rules import COMPILED, RULES
from torch import Tensor

from lightning_byzantine.aggregators import CAF, CTMA, NNM, Aggregator, CenteredClipping, GeometricMedian

MORE: dict[str, Aggregator] = {
    "CAF": CAF(),
    "NNM(GeometricMedian)": NNM(GeometricMedian()),
    "CenteredClipping": CenteredClipping(),
}
SMALL_SIZES = [(17, 1_000), (17, 100_000), (256, 1_000), (1024, 1_000)]
# Kernels are counted in calls that take no more seconds than this: a profile of very many takes long.
BRIEF = 0.05
# Rules that take more seconds than this are not tried with more workers.
LONG = 0.2


def run(section: Section) -> None:
    dimension = 100_000 if section.small else 20_000_000
    with section.attempt("the large matrix"):
        large(section, dimension)
    with section.attempt("profile"):
        profile(section, dimension)
    with section.attempt("small matrices"):
        small(section)


def rules() -> dict[str, Aggregator]:
    """Return new ones, because some have state."""
    compiled = {f"{name}, compiled": rule for name, rule in COMPILED.items()}
    return deepcopy({name: rule for name, (rule, _) in RULES.items()} | MORE | compiled)


def large(section: Section, dimension: int) -> None:
    vectors = torch.randn(17, dimension, device=section.device)
    size = vectors.numel() * vectors.element_size()
    bandwidth = 2 * size / seconds_of(section, lambda: vectors.clone())
    read = seconds_of(section, lambda: vectors.norm(dim=1))
    print(f"copy: {bandwidth / 1e9:.0f} GB/s read and written; one read: {1e3 * read:.2f} ms\n", flush=True)
    columns = {"17 x " + f"{dimension:,}": "`{}`", "ms": "{:.2f}", "reads": "{:.1f}", "share of bandwidth": "{:.2f}"}
    table = section.table(columns | {"peak memory, matrices": "{:.2f}"}, "_large")
    contenders: dict[str, Callable[[], Any]] = {
        "norm": lambda: vectors.norm(dim=1),
        "torch.mean": lambda: vectors.mean(0),
        "torch.median": lambda: vectors.median(0).values,
        "torch.cdist": lambda: torch.cdist(vectors, vectors),
        "vectors @ vectors.T": lambda: vectors @ vectors.T,
    }
    for name, rule in rules().items():
        contenders[name] = lambda rule=rule: rule(vectors, 8)
    for name, call in contenders.items():
        with section.attempt(name):
            call()  # compiles it
            if section.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if section.device.type == "cuda" else 0
            seconds = seconds_of(section, call)
            peak = torch.cuda.max_memory_allocated() - before if section.device.type == "cuda" else 0
            # What can't be avoided: to read all rows once and to write one.
            share = (size + size / 17) / seconds / bandwidth
            table.add(name, 1e3 * seconds, seconds / read, share, peak / size)


def small(section: Section) -> None:
    columns = {"workers": "{}", "dimension": "{}", "rule": "`{}`", "ms": "{:.3f}", "kernels": "{}"}
    table = section.table(columns, "_small")
    long: set[str] = set()
    for num_workers, dimension in SMALL_SIZES[:2] if section.small else SMALL_SIZES:
        vectors = torch.randn(num_workers, dimension, device=section.device)
        contenders: dict[str, Callable[[], Any]] = {
            "torch.mean": lambda vectors=vectors: vectors.mean(0),
            "torch.median": lambda vectors=vectors: vectors.median(0).values,
            "torch.cdist": lambda vectors=vectors: torch.cdist(vectors, vectors),
        }
        for name, rule in rules().items():
            # With few columns, a compiled rule is the same as one that is not; compiling for many rows takes long.
            if "compiled" not in name:
                contenders[name] = lambda rule=rule, vectors=vectors: rule(vectors, (len(vectors) - 1) // 2)
        for name, call in contenders.items():
            if name in long:
                continue
            with section.attempt(f"{name} on {num_workers} x {dimension}"):
                seconds = seconds_of(section, call)
                if seconds > LONG:
                    long.add(name)
                kernels = num_kernels(call) if section.device.type == "cuda" and seconds <= BRIEF else ""
                table.add(num_workers, dimension, name, 1e3 * seconds, kernels)


def seconds_of(section: Section, call: Callable[[], object]) -> float:
    """Return the median of a few calls, with what they make the processor wait for, after two that don't count."""
    times = []
    for _ in range(7):
        synchronize(section.device)
        if section.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            synchronize(section.device)
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = perf_counter()
            call()
            times.append(perf_counter() - begin)
        if sum(times) > 1:
            break
    return median(times[2:] or times[-1:])


def profile(section: Section, dimension: int) -> None:
    """Show which kernels the default rule spends its time in."""
    if section.device.type != "cuda":
        print("the profile of the kernels needs a GPU")
        return
    vectors = torch.randn(17, dimension, device=section.device)
    table = section.table({"rule": "`{}`", "kernel": "{}", "calls": "{}", "ms": "{:.3f}"}, "_kernels")
    for rule in (CTMA(NNM(GeometricMedian())), RULES["Mean"][0], RULES["CoordinateWiseMedian"][0]):
        with section.attempt("kernels"):
            add_kernels(table, rule, vectors)


def add_kernels(table: Table, rule: Aggregator, vectors: Tensor) -> None:
    rule(vectors, 8)
    for event in kernels_of(lambda: rule(vectors, 8))[:6]:
        table.add(type(rule).__name__, event.key[:90].replace("|", ""), event.count, event.self_device_time_total / 1e3)


def num_kernels(call: Callable[[], object]) -> int:
    """Return how many kernels and copies a call launches on the GPU."""
    return sum(event.count for event in kernels_of(call))


def kernels_of(call: Callable[[], object]) -> list[Any]:
    """Return the kernels and copies of a call, those that take longest first."""
    with gpu_profiler() as profiler:
        call()
        torch.cuda.synchronize()
    return kernels_in(profiler)


def gpu_profiler() -> torch.profiler.profile:
    """Return a profiler that looks at the GPU only."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


def kernels_in(profiler: torch.profiler.profile) -> list[Any]:
    """Return the kernels and copies in a profile, those that take longest first."""
    kernels = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(kernels, key=lambda event: -event.self_device_time_total)
