"""plan's classes of memory against the arrays that are alive on the devices while jobs of a tiny model run.

An array is counted if plan lists one of its shape, dtype and share of a device. Uncounted may be only SMALL bytes a device:
keys, counters, the numbers of a step.
"""

import gc
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import made_coco
import pytest
import verb

from proreflow_jax.evaluation import judges
from proreflow_jax.jobs import pairs, score_coco, train
from proreflow_jax.perf import resident
from proreflow_jax.perf.jobs import Job, jobs
from proreflow_jax.run import open
from proreflow_jax.run.outlook import Outlook
from proreflow_jax.run.stages import find_stage
from proreflow_jax.runtime.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("quick")
SMALL = 1024
Kind = tuple[tuple[int, ...], str, int]  # shape, dtype, bytes on one device
Arrays = Counter[Kind]
FULL = {"mesh__data": 2, "mesh__fsdp": 4, "train__steps": 2}
LORA = {"student__lora__rank": 2, "pairs__mode": "online", "train__steps": 2}


class Reached(Exception):
    """The program would be called now: all that a test wants to know."""


def kind(leaf: Any) -> Kind:
    key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    shape, dtype = ((*leaf.shape, 2), "uint32") if key else (leaf.shape, str(leaf.dtype))
    return tuple(shape), dtype, resident.bytes_on_device(leaf)


def alive() -> dict[int, Kind]:
    """What lies on the first device, each piece of its memory once: {address: kind}."""
    gc.collect()
    pieces = {}
    for array in jax.live_arrays():
        if array.is_deleted():
            continue
        for shard in array.addressable_shards:
            if shard.device == jax.devices()[0] and shard.data.nbytes:
                pieces[shard.data.unsafe_buffer_pointer()] = (array.shape, str(array.dtype), shard.data.nbytes)
    return pieces


def size(arrays: Arrays) -> int:
    return sum(count * each[2] for each, count in arrays.items())


def snapshot(module: Any, name: str, job: Callable[[], Any], run: bool, before: set[int]) -> Arrays:
    """Arrays alive when a job calls the program that `module.name` makes, but for those at the addresses `before`.

    The job ends there, unless `run` is true.
    """
    snapshots, real = [], getattr(module, name)

    def make(*arguments: Any, **options: Any) -> Callable:
        program = real(*arguments, **options)

        def call(*inputs: Any) -> Any:
            snapshots.append(Counter(each for address, each in alive().items() if address not in before))
            if not run:
                raise Reached
            return program(*inputs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, make)
        with nullcontext() if run else pytest.raises(Reached):
            job()
    return snapshots[-1]


def counted(job: Job) -> tuple[Arrays, Arrays]:
    """What plan counts of a job: all of it, and the part that is there for moments only (a second batch, unread outputs)."""
    trees = [*job.classes.values(), *job.beside.values()]
    passing = [tree for name, tree in job.beside.items() if name in (resident.BATCH, resident.OUTPUTS)]
    return Counter(map(kind, jax.tree.leaves(trees))), Counter(map(kind, jax.tree.leaves(passing)))


def check(job: Job, arrays: Arrays) -> None:
    """What is alive is what plan counts, up to SMALL bytes; of what it counts only what passes by may be missing."""
    expected, passing = counted(job)
    uncounted, missing = arrays - expected, expected - arrays - passing
    assert size(uncounted) <= SMALL, f"{job.name} of stage {job.windows}: alive and not counted: {uncounted}"
    assert size(missing) <= SMALL, f"{job.name} of stage {job.windows}: counted and not alive: {missing}"
    assert sum(resident.sum_classes(job.classes, job.beside).values()) == size(expected)


class Chain:
    """A run of the tiny model, whose jobs are begun in turn as their verbs begin them."""

    def __init__(self, folder: Path, model: Path, outline: Path, fields: dict) -> None:
        self.folder, self.model, self.outline, self.fields = folder, model, outline, fields

    def begin(self, name: str, windows: int, run: bool = False, **fields: Any) -> tuple[Job, Arrays]:
        """(a job of a stage as plan sees it, arrays that are alive when its program is called)."""
        fields, before = self.fields | fields, set(alive())
        config = verb.tiny_config(self.folder, self.model, **fields)
        outlook = Outlook(config)
        real = open.open_experiment(config, checked=outlook.begin)
        stage = find_stage(real.stages, windows)
        module, maker, job = {
            "pairs": (pairs, "jit_pairs", lambda: pairs.make_stage_pairs(real, stage, outlook)),
            "train": (train, "jit_step", lambda: train.train_stage(real, stage, outlook)),
            "sample": (score_coco, "jit_draw", lambda: score_coco.score_coco(real)),
        }[name]
        arrays = snapshot(module, maker, job, run, before)
        shapes = open.open_outline(verb.tiny_config(self.folder, self.outline, **fields), jax.devices())
        return jobs(shapes, find_stage(shapes.stages, windows))[name], arrays


@pytest.fixture(scope="module")
def full(tmp_path_factory, model, outline_only) -> tuple[Chain, dict[str, tuple[Job, Arrays]]]:
    """All weights are trained: the chain after its first stage, and what was alive in that stage's jobs."""
    chain = Chain(tmp_path_factory.mktemp("full"), model, outline_only, FULL)
    return chain, {name: chain.begin(name, 4, run=True) for name in ("pairs", "train")}


@pytest.mark.parametrize("name", ["pairs", "train"])
def test_plan_counts_what_is_alive_in_the_first_stage(full, name):
    check(*full[1][name])


def test_plan_counts_what_is_alive_while_a_student_makes_pairs(full):
    check(*full[0].begin("pairs", 2))


def test_plan_counts_what_is_alive_while_a_student_teaches_online(full, monkeypatch):
    """The parent is the teacher too: it is read once, and without its moments."""
    leaves, real = [], Checkpoints._read_leaves
    monkeypatch.setattr(Checkpoints, "_read_leaves", lambda self, step, *a: leaves.append([*a[0]]) or real(self, step, *a))
    check(*full[0].begin("train", 2, pairs__mode="online", pairs__teacher="previous", model__teacher_dtype="bfloat16"))
    (names,) = leaves
    assert names and not [name for name in names if "opt_state" in name]


def test_plan_counts_what_is_alive_while_students_are_judged(full, tmp_path, monkeypatch):
    captions, images = made_coco.write_coco(tmp_path)
    (tmp_path / "inception.safetensors").touch()
    clip = made_coco.write_clip(tmp_path / "clip")
    network, params = made_coco.small_network(tmp_path, "")
    sized = lambda resize="": network._replace(shapes={n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in params.items()})
    monkeypatch.setattr(judges, "feature_network", made_coco.small_network)
    monkeypatch.setattr(judges, "make_inception", sized)
    files = dict(captions=captions, images=images, inception=tmp_path / "inception.safetensors", clip=clip)
    fields = {f"evaluate__{name}": str(path) for name, path in files.items()}
    fields |= {"evaluate__protocol": "coco2017-5k", "evaluate__teacher_steps": (), "evaluate__student_steps": ((4, 4),)}
    check(*full[0].begin("sample", 4, **fields))


def test_plan_counts_what_is_alive_while_low_rank_factors_are_trained(tmp_path, model, outline_only):
    lora = Chain(tmp_path, model, outline_only, LORA)
    check(*lora.begin("train", 4, run=True))
    check(*lora.begin("pairs", 2, pairs__mode="stored", pairs__teacher="previous"))
