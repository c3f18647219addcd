"""R4: a thousand corruptions of what a run writes and reads: the right value, the step before by name, or one line."""

import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from made_images import LAYOUTS, originals
from ml_collections import ConfigDict
from reliability import chance, number, report
from verb import run, tiny_config, tiny_flags

from proreflow_jax.data import cached, records
from proreflow_jax.exports.write_merge import write_merge
from proreflow_jax.pretrained import hub, pipeline, sources
from proreflow_jax.run import base_identity, cli, open, stages
from proreflow_jax.runtime.checkpoint import Checkpoints
from proreflow_jax.storage import sealed

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # of reads that orbax gave up
]
COUNT = number("DAMAGES", 1000)
SHORT = {"stages": "(4,)", "export__stages": "(4,)", "train__steps": 4, "optimizer__warmup_steps": 1, "pairs__examples": 32}
UNREAD = (".lock",)
Reader = Callable[[Path], Any]  # the value that a folder holds, comparable by ==


def flip(data: bytearray, rng: random.Random) -> bytearray:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def zero(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data))
    count = min(len(data) - start, rng.choice([1, 16, 512, 4096]))
    data[start : start + count] = bytes(count)
    return data


def truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.choice([0, rng.randrange(len(data))])]


def append(data: bytearray, rng: random.Random) -> bytearray:
    return data + rng.choice([rng.randbytes(rng.randint(1, 64)), bytes(512), bytes(data)])


CHANGES = {"flip": flip, "zero": zero, "truncate": truncate, "append": append}
KINDS = (*CHANGES, "flip", "delete", "swap")


def damage(folder: Path, rng: random.Random) -> str:
    """Spoils one file below a folder; says which, and how. The bytes do change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNREAD)
    while True:
        kind, path = rng.choice(KINDS), rng.choice(files)
        before, other = path.read_bytes(), rng.choice(files)
        if kind == "delete":
            path.unlink()
        elif kind == "swap" and other.read_bytes() != before:
            path.write_bytes(other.read_bytes())
            other.write_bytes(before)
        elif kind in CHANGES and before and (after := bytes(CHANGES[kind](bytearray(before), rng))) != before:
            path.write_bytes(after)
        else:
            continue
        return f"{kind} {path.relative_to(folder)}"


def outcome(read: Reader, folder: Path, right: Any) -> str:
    """What a reader makes of a spoilt folder: "right", "refused", "before", or what is wrong with it."""
    try:
        value = read(folder)
    except Exception as error:
        line = cli.message(error)
        code = cli.exit_code(error)
        return "refused" if code == 2 and line else f"exit code {code}: {type(error).__name__}: {line}"
    if value == right:
        return "right"
    return value if value == "before" else f"wrong value {value!s:.300}"


def attack(promise: str, whole: Path, read: Reader, count: int, tmp_path: Path) -> None:
    rng, counts, wrong = chance(promise), Counter(), []
    right = read(whole)
    assert outcome(read, Path(shutil.copytree(whole, tmp_path / "copied", symlinks=True)), right) == "right"
    for k in range(count):
        spoilt = Path(shutil.copytree(whole, tmp_path / "spoilt", symlinks=True))
        what = damage(spoilt, rng)
        came = outcome(read, spoilt, right)
        counts[came if came in ("right", "refused", "before") else "WRONG"] += 1
        if came not in ("right", "refused", "before"):
            wrong.append(f"{k}: {what}: {came}")
        shutil.rmtree(spoilt)
    report(promise, corruptions=count, outcomes=dict(counts))
    assert not wrong, "\n".join(wrong)


def plain(tree: Any) -> Any:
    """Arrays as bytes with their dtype and shape."""
    return jax.tree.map(lambda x: (str(np.asarray(x).dtype), np.shape(x), np.asarray(x).tobytes()), tree)


# Checkpoints.


def state(step: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    shapes = {"large": (200, 200), "small": (7,), "half": (33,), "count": ()}
    dtypes = {"half": jnp.bfloat16, "count": np.int32}
    return {name: jnp.asarray(9 * rng.standard_normal(s), dtypes.get(name, np.float32)) for name, s in shapes.items()}


def test_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"position": step})
    before = plain(state(1))

    def read(folder: Path) -> Any:
        caplog.clear()
        with caplog.at_level(logging.WARNING), Checkpoints(folder, read_only=True) as checkpoints:
            restored = checkpoints.restore(None, state(0))
        if restored.step == 1:
            told = "step 2" in caplog.text and plain(restored.state) == before and restored.meta == {"position": 1}
            return "before" if told else f"step 1 in silence: {caplog.text}"
        return restored.step, plain(restored.state), restored.meta

    attack("R4 checkpoints", tmp_path / "c", read, COUNT * 30 // 100, tmp_path)


# What a run writes.


@pytest.fixture(scope="module")
def chain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of one stage, its exports, and a cache of images; tests only read it."""
    folder = tmp_path_factory.mktemp("chain")
    assert run("distill", *tiny_flags(folder, model, **SHORT)).code == 0
    for form in ("delta", "lora", "single-file"):
        ended = run("export", *tiny_flags(folder, model, **SHORT), "--stage=4", f"--form={form}", f"--out={folder / form}")
        assert ended.code == 0, ended.err
    (folder / "images").mkdir()
    images = {f"data__{name}": value for name, value in LAYOUTS["jsonl"](folder / "images", originals({})).items()}
    ended = run("cache", *tiny_flags(folder, model, **{**SHORT, **images, "cache__shard_size": 4}), f"--out={folder / 'cache'}")
    assert ended.code == 0, ended.err
    return folder


def test_pairs(chain: Path, tmp_path: Path) -> None:
    def read(folder: Path) -> Any:
        pairs = records.PairRecords(folder)
        return pairs.plan, [plain(pairs[i]) for i in range(len(pairs))]

    attack("R4 pairs", chain / "runs/tiny/stage-4/pairs", read, COUNT * 15 // 100, tmp_path)


def test_cached_latents(chain: Path, tmp_path: Path) -> None:
    def read(folder: Path) -> Any:
        source = cached.Cached(folder)
        examples = [plain({**source[i], "caption": np.frombuffer(source[i]["caption"].encode(), np.uint8)}) for i in range(7)]
        return len(source), source.plan, examples, cached.cache_identity(folder)

    attack("R4 cached latents", chain / "cache", read, COUNT * 10 // 100, tmp_path)


def test_records_of_done(chain: Path, model: Path, tmp_path: Path) -> None:
    stage = open.open_experiment(tiny_config(tmp_path, model, stages=(4,))).stages[0]
    (tmp_path / "done").mkdir()
    shutil.copy(chain / "runs/tiny/stage-4/DONE.json", tmp_path / "done")

    def read(folder: Path) -> Any:
        return stages.read_done(stage._replace(folder=folder))._asdict()

    attack("R4 records of done", tmp_path / "done", read, COUNT * 20 // 100, tmp_path)


# Models.


def opened(folder: Path) -> Any:
    """All that is used of a model's folder: weights, configs, schedule, tokens, and whether it is a student."""
    return told(sources.open_folder(folder), tiny_config(folder.parent, folder))


def told(source: sources.ModelSource, config: ConfigDict) -> Any:
    read = pipeline.load_pipeline(source)
    flow = open.base_flow(config, read)
    configs = {name: base_identity._described(network.config) for name, network in read.networks.items()}
    schedule = [read.scheduler.get(name) for name in base_identity.SCHEDULE]
    return plain(read.params), configs, schedule, read.tokenizer.encode(list(tiny.CAPTIONS)).tobytes(), flow


def test_exports(chain: Path, tmp_path: Path) -> None:
    attack("R4 exported folders", chain / "runs/tiny/export/stage-4", opened, COUNT * 10 // 100, tmp_path)


def test_deltas(chain: Path, model: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model)

    def read(folder: Path) -> Any:
        write_merge(config, folder, tmp_path / "merged", 1.0)
        try:
            return opened(tmp_path / "merged"), sealed.read_record(tmp_path / "merged")["lineage"]
        finally:
            shutil.rmtree(tmp_path / "merged")

    attack("R4 exported deltas", chain / "delta", read, COUNT * 3 // 100, tmp_path)


def test_single_files(chain: Path, model: Path, tmp_path: Path) -> None:
    (name,) = (path.name for path in (chain / "single-file").glob("*.safetensors"))

    def read(folder: Path) -> Any:
        return told(sources.open_file(folder / name, model), tiny_config(tmp_path, folder / name))

    attack("R4 exported single files", chain / "single-file", read, COUNT * 3 // 100, tmp_path)


def test_base_models(model: Path, tmp_path: Path) -> None:
    """As `pretrain` writes them."""
    whole = Path(shutil.copytree(model, tmp_path / "whole"))
    sealed.seal(whole, {"model": "tiny"})
    attack("R4 base models of ours", whole, opened, COUNT * 5 // 100, tmp_path)


def test_base_models_of_a_run(chain: Path, model: Path, tmp_path: Path) -> None:
    """A stranger's folder has no record: its run knows what it began with."""
    (tmp_path / "prompts.txt").write_bytes((chain / "prompts.txt").read_bytes())
    plain_fields = {"root": str(chain / "runs"), "data.path": str(chain / "prompts.txt"), "stages": (4,)}
    plain_fields |= {"train.steps": 4, "optimizer.warmup_steps": 1, "pairs.examples": 32}

    def read(folder: Path) -> Any:
        config = tiny_config(tmp_path, folder)
        with config.unlocked():
            config.update_from_flattened_dict(plain_fields)
        begun = open.open_experiment(config)
        open.check_ready(begun, begun.stages)
        return opened(folder)

    attack("R4 base models of a run", model, read, COUNT * 4 // 100, tmp_path)


def test_loras(chain: Path, tmp_path: Path) -> None:
    """Nothing of ours draws with them: `upload`, and whoever replaces them, compare them with their record."""

    def read(folder: Path) -> Any:
        hub.contents(folder)
        sealed.check_undamaged(folder, record := sealed.read_record(folder), "export it again")
        return record["flow"], record["lora"]

    attack("R4 exported LoRAs", chain / "lora", read, COUNT * 2 // 100, tmp_path)
