"""Memory, work and time of a job on a TPU slice, by compiling it; results are cached in a folder.

The cache key is a hash of all that a result depends on: the config except fields that change no program, the base model's
config.json files, the slice, the versions of jax and the TPU compiler, and this package's code.
"""

import hashlib
import importlib.metadata
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from proreflow_jax import RunFailed
from proreflow_jax.perf import chips, hlo_cost, jobs, resident, tpu_compile
from proreflow_jax.perf.jobs import Job
from proreflow_jax.run import find_model
from proreflow_jax.run.check_config import changed, has_field
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.open import open_outline
from proreflow_jax.run.stages import find_stage
from proreflow_jax.run.train_state import warn_of_whole_weights
from proreflow_jax.storage import atomic
from proreflow_jax.storage.atomic import json_digest

log = logging.getLogger(__name__)
FREE = (  # fields of the config that change no program
    *("name", "root", "seed", "compilation_cache", "export.", "profile.", "evaluate.study.", "train.log_every"),
    *("model.path", "model.student", "model.vae"),  # the networks' configs are hashed
    *(f"data.{name}" for name in ("path", "split", "image_key", "caption_key", "max_bad", "threads", "cache")),
)
PLAIN = {"model.attention": "xla", "train.remat": "none"}  # no kernels and no recomputation: FLOPs can be counted
TICK = 30.0  # seconds between lines of the log while a program compiles
PACKAGE = Path(__file__).parent.parent
PROGRAMS = (  # files of this package that make, compile or read programs
    *("flow/*.py", "models/*.py", "reflow/*.py", "runtime/*.py", "run/*.py", "jobs/*.py", "perf/*.py", "pretrained/*.py"),
    *("evaluation/protocols.py", "evaluation/judges.py", "evaluation/clip_score.py", "data/kinds.py"),
)


class Target(NamedTuple):
    """The slice to compile for, and the folder of cached results."""

    slice: str
    chip: chips.Chip
    count: int  # chips, of all slices
    cache: Path | None


def target(name: str, cache: str, slices: int = 1) -> Target:
    """The target by the flags; an empty `cache` means no cache. Raises ValueError if the slice is not known."""
    return Target(name, chips.slice_chip(name), slices * chips.chip_count(name), Path(cache).expanduser() if cache else None)


def opener(config: ConfigDict, place: Target) -> Callable[[], tuple[Experiment, Experiment]]:
    """A function that returns `outlines` on the slice's devices, opened at the first call: cached results do not need them."""
    opened: list[tuple[Experiment, Experiment]] = []

    def both() -> tuple[Experiment, Experiment]:
        if not opened:
            opened.append(outlines(config, tpu_compile.devices(place.slice, config.mesh.slices)))
        return opened[0]

    return both


def outlines(config: ConfigDict, devices: Sequence[jax.Device]) -> tuple[Experiment, Experiment]:
    """The experiment on these devices, its model in shapes; and the same without kernels, whose FLOPs can be counted."""
    change = {field: value for field, value in PLAIN.items() if has_field(config, field)}
    experiment = open_outline(config, devices)
    warn_of_whole_weights(config, experiment.mesh, experiment.base.denoiser.shapes)
    return experiment, open_outline(changed(config, change), devices) if change else experiment


def estimate(config: ConfigDict, place: Target, opened: Callable[[], tuple], windows: int, name: str) -> dict[str, Any]:
    """The numbers of one job (see `measured`), from the cache or by compiling, which takes minutes for a real model."""
    cached = place.cache / f"{_key(config, place, windows, name)}.json" if place.cache else None
    if cached and cached.is_file():
        return atomic.read_json(cached)
    experiment, plain = opened()
    stage = find_stage(experiment.stages, windows)
    job = jobs.jobs(experiment, stage, plain)[name]
    with ticking(f"stage {windows}, {name}: compiling for {place.slice}"):
        compiled = tpu_compile.compile_for(job.jitted, job.arguments, place.chip, partial(_say_early, job, place))
    result = measured(job, compiled, place) | {"storage": jobs.storage(experiment, stage)}
    result["mesh"] = dict(experiment.mesh.shape)
    if cached:
        cached.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(cached, result)
    return result


def _say_early(job: Job, place: Target, size: int) -> None:
    """One line, minutes before the time is known. size: bytes of the program and its arguments, filled up to tiles, at most."""
    needed, limit = size + sum(resident.sum_classes(job.beside).values()), place.chip.memory
    verdict = "fits" if needed <= limit else "may not fit"
    sizes = f"at most {needed / chips.GIB:.2f} of {limit / chips.GIB:.2f} GiB a chip"
    log.info("stage %d, %s: %s, %s; the time is known when it is compiled", job.windows, job.name, sizes, verdict)


def measured(job: Job, compiled: tpu_compile.Compiled, place: Target) -> dict[str, Any]:
    """A compiled job as numbers: bytes and cycles of one chip; FLOPs of all; seconds of one call, and of one image.

    Without the program's text there are no cycles and no seconds, and `no_time` says why; memory is known all the same.
    """
    arrays = resident.sum_classes(job.classes, job.beside)
    arguments, state = resident.bytes_on_device(job.arguments), arrays[resident.STATE]
    result = {
        "stage": job.windows,
        "job": job.name,
        "slice": place.slice,
        "images": job.images,
        "at_once": job.at_once,
        "calls": job.calls,
        "memory": memory(arrays, arguments, compiled.memory, place.chip),
        "useful_flops": job.useful(),
        "compile_seconds": compiled.seconds,
        "saving": sum(arrays.values()) + state,  # the state by torch names, beside its stacks
    }
    needed = max(result["memory"]["total"], result["saving"])
    result["fits"] = needed <= place.chip.memory and not compiled.too_large
    if compiled.cost is None:
        return result | {"no_time": compiled.no_cost}
    return result | times(result["useful_flops"], job, compiled.cost, place)


def memory(arrays: Mapping[str, int], arguments: int, compiled: tpu_compile.Memory, chip: chips.Chip) -> dict[str, int]:
    """Bytes of one chip by class, which sum to `total`. `tiles` is what the compiler adds to arguments to fill up its tiles.

    Args:
      arrays: bytes of what lives on the chip, by class (see `resident`).
      arguments: bytes of the program's arguments among them, as counted from shapes.
      compiled: the compiler's account; of a program that is too large it holds no arguments.
    """
    parts = {
        **arrays,
        "tiles": compiled.arguments - arguments if compiled.arguments else 0,
        "temporaries": compiled.temporaries,
    }
    parts[resident.OUTPUTS] += compiled.outputs
    return parts | {"total": sum(parts.values()), "available": chip.memory}


def times(useful: float, job: Job, cost: hlo_cost.Cost, place: Target) -> dict[str, Any]:
    """Seconds by the compiler's cycles, the useful FLOPs as a share of the peak, and all that has no estimate."""
    chip = place.chip
    slow, fast = cost.seconds(chip)
    ideal = useful / place.count / chip.peak
    share = sum(cost.cycles.values()) or 1.0
    return {
        "seconds": slow,
        "seconds_if_streaming_is_faster": fast,
        "seconds_per_image": slow / job.images,
        "utilisation": ideal / slow,
        **_scheduled(ideal, cost, chip),
        "hours": slow * job.calls / 3600,
        "chip_hours": slow * job.calls / 3600 * place.count,
        "cycles": cost.cycles,
        "share": {kind: value / share for kind, value in sorted(cost.cycles.items(), key=lambda item: -item[1])},
        "kernels_at_their_floor": cost.kernels,
        "not_estimated": cost.unknown,
        "loops_of_unknown_length": cost.unread_loops,
        "sent_bytes": cost.communication,
        "sent_seconds": cost.communication / chip.links,
        "waited_bytes": cost.waited,
        "waited_seconds": cost.waited / chip.links,
        "links": chip.links,
    }


def _scheduled(ideal: float, cost: hlo_cost.Cost, chip: chips.Chip) -> dict[str, Any]:
    """Seconds by libtpu's last schedule, and what of them is estimated since its schedule is not known."""
    seconds = cost.scheduled_seconds(chip)
    if seconds is None:
        return {}
    return {
        "scheduled_seconds": seconds,
        "scheduled_utilisation": ideal / seconds,
        "scheduled_cycles": cost.scheduled,
        "unscheduled_seconds": cost.unscheduled / chip.clock,
    }


@contextmanager
def ticking(activity: str) -> Iterator[None]:
    """Logs an activity and, until it ends, the seconds so far: on one line of a terminal, or each half minute in a log."""
    start, shown = perf_counter(), sys.stderr.isatty()

    def tick() -> None:
        line = f"{activity}, {perf_counter() - start:.0f} s"
        if shown:
            sys.stderr.write(f"\r{line}")
            sys.stderr.flush()
        else:
            log.info(line)

    log.info(activity)
    try:
        with tpu_compile.meanwhile(1.0 if shown else TICK, tick):
            yield
    finally:
        if shown:
            sys.stderr.write("\r\033[K")


def _key(config: ConfigDict, place: Target, windows: int, name: str) -> str:
    """The cache key of a result."""
    source = find_model.find_base_model(config, configs_only=True)
    fields = json.loads(config.to_json_best_effort())
    fields = {key: value for key, value in _flat(fields) if not key.startswith(FREE)}
    about = {
        "config": fields,
        "model": {part: source.config(part) for part in (*source.components, "scheduler")} | {"index": source.index},
        "target": [place.slice, windows, name],
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
        "code": _code(),
    }
    return f"{place.slice.replace(':', '-')}-{windows}-{name}-{json_digest(about)[:24]}"


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _code() -> str:
    """A hash of the files of PROGRAMS. Raises RunFailed if a pattern matches no file."""
    code = hashlib.sha256()
    for pattern in PROGRAMS:
        paths = sorted(PACKAGE.glob(pattern))
        if not paths:
            raise RunFailed(f"{pattern} in perf/estimate.py matches no file of the package: name what took its place")
        for path in paths:
            code.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return code.hexdigest()
