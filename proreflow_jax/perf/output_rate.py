"""How fast one process writes pair records, and how long the chips of a slice wait for that: measured rates, and a model.

The rates are this machine's, by the job's own writer and random records. The model replays `jobs.write_records` event by event.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proreflow_jax.data import records
from proreflow_jax.jobs.write_records import AHEAD
from proreflow_jax.perf.jobs import fetched_shapes
from proreflow_jax.reflow.pairs import RECORD
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.stages import Stage
from proreflow_jax.runtime.processes import host_arrays

CHIPS = (4, 16, 64, 256)  # of the slices that the model shows
CHIPS_A_HOST = 4  # of slices with several hosts: v5e, v5p, v6e
ROWS_A_CHIP = 8  # at least, where the model takes larger batches than the config's
TIMES = 3  # shards that are written, and batches that are fetched
MOST = 1 << 27  # bytes of such a shard


class Rates(NamedTuple):
    """Seconds of one process for one record."""

    fetch: float  # from a device
    write: float  # in the thread that writes
    finish: float  # of a shard's end, which is synced, counted, hashed


def output_rate(experiment: Experiment, stage: Stage, per_chip: float) -> dict[str, Any]:
    """Rates of a stage's pair records on this machine; the idle share by chips where a chip makes `per_chip` pairs a second.

    Writes to the folder for temporary files.
    """
    shapes, config = fetched_shapes(experiment, stage), experiment.config.pairs
    rows = {name: shapes[name] for name in RECORD}
    size = sum(int(np.prod(row.shape[1:])) * row.dtype.itemsize for row in rows.values())
    rates = Rates(_fetch(shapes), *_write(rows, max(1, min(config.shard_size, MOST // size))))
    idle = {chips: idle_share(rates, chips, per_chip, config) for chips in CHIPS}
    return {"bytes": size, **rates._asdict(), "shard_size": config.shard_size, "per_chip": per_chip, "idle": idle}


def idle_share(rates: Rates, chips: int, per_chip: float, config: Any) -> float:
    """The share of a stage's time in which the chips wait for their hosts.

    config: pairs.{batch, shard_size, examples}; batches grow to ROWS_A_CHIP rows a chip.
    """
    batch = config.batch * max(1, -(-ROWS_A_CHIP * chips // config.batch))
    rows = min(batch, config.shard_size)  # of a batch in one shard
    a_shard, together = -(-config.shard_size // rows), batch // rows
    shards = -(-config.examples // config.shard_size)
    computing = batch / (per_chip * chips)
    whole = -(-shards // together) * a_shard * computing
    return 1 - whole / _seconds(rates, chips, computing, Sizes(rows, a_shard, together, shards))


class Sizes(NamedTuple):
    """How a stage's records are cut."""

    rows: int  # of one batch in one shard
    a_shard: int  # batches of a shard; 1 where a batch holds several
    together: int  # shards of a batch
    shards: int


def _seconds(rates: Rates, chips: int, computing: float, sizes: Sizes) -> float:
    """Seconds of a whole stage. computing: of one batch."""
    written = [0.0] * max(1, chips // CHIPS_A_HOST)  # when each host's thread has done what it was given
    ready, landed = 0.0, [0.0] * (AHEAD + 1)
    for begin in range(0, sizes.shards, sizes.together):
        hosts = [shard % len(written) for shard in range(begin, min(begin + sizes.together, sizes.shards))]
        for place in range(sizes.a_shard):
            ready = max(ready, landed[-AHEAD - 1]) + computing
            at = max(landed[-1], ready + sizes.together * sizes.rows * rates.fetch)
            for host in hosts:
                at = at if place else max(at, written[host])  # a shard begins when the host's last one is done
                written[host] = max(at, written[host]) + sizes.rows * rates.write
                if place == sizes.a_shard - 1:
                    written[host] += sizes.a_shard * sizes.rows * rates.finish
            landed.append(at)
    return max(written)


def _fetch(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> float:
    """Seconds to bring a record of a batch from the devices."""
    places = {name: shape.sharding for name, shape in shapes.items()}
    make = jax.jit(lambda: {name: jnp.ones(shape.shape, shape.dtype) for name, shape in shapes.items()}, out_shardings=places)
    once = lambda arrays: _timed(lambda: host_arrays(arrays))
    return median(once(jax.block_until_ready(make())) for _ in range(TIMES)) / shapes["first"].shape[0]


def _write(rows: Mapping[str, jax.ShapeDtypeStruct], count: int) -> tuple[float, float]:
    """Seconds of a record to be written, and of its share of a shard's end."""
    draws = np.random.default_rng(0)
    states = draws.standard_normal((8, *rows["states"].shape[1:]), np.float32).astype(rows["states"].dtype)
    rest = {name: np.zeros(row.shape[1:], row.dtype) for name, row in rows.items() if name != "states"}
    plan, writing, ending = {"examples": count, "shard_size": count}, [], []
    for _ in range(TIMES):
        with tempfile.TemporaryDirectory() as folder:
            records.fix_plan(Path(folder), plan)
            block = records.open_shard(Path(folder), plan, 0)
            write = block.__enter__()
            writing.append(_timed(lambda write=write: [write({"states": states[i % 8], **rest}) for i in range(count)]))
            ending.append(_timed(lambda block=block: block.__exit__(None, None, None)))
    return median(writing) / count, median(ending) / count


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
