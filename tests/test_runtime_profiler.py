"""A trace of chosen steps is there and names them and no others; compiled programs are found by the next start."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_gcs
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from verb import ROOT, tiny_flags

from proreflow_jax.runtime.metrics import STEP, Trace, check_traced_steps
from proreflow_jax.runtime.programs import keep_programs
from proreflow_jax.storage import gcs, paths

HIT = "/jax/compilation_cache/cache_hits"
WORK = jax.jit(lambda x: x + 1)


def traced_steps(folder: Path) -> list[list[int]]:
    """The numbers of the steps in each trace below a folder, as jax's own reader finds them."""
    files = sorted(folder.glob("plugins/profile/*/*.xplane.pb"))
    return [sorted(step_numbers(file)) for file in files]


def step_numbers(file: Path) -> list[int]:
    lines = [line for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines]
    events = [event for line in lines for event in line.events if event.name.startswith(STEP)]
    return [int(value) for event in events for name, value in event.stats if name == "step_num"]


def run(folder: Path, steps: tuple[int, ...], total: int, start: int = 0) -> None:
    """Steps start + 1 to total, as the loop makes them."""
    with Trace(folder, steps) as trace:
        for number in range(start + 1, total + 1):
            with trace.step(number):
                result = WORK(jnp.float32(number))
            trace.sent(number, result)


def test_the_chosen_steps_are_traced_and_no_others(tmp_path):
    run(tmp_path / "a", (3, 4), 6)
    assert traced_steps(tmp_path / "a") == [[3, 4]]
    run(tmp_path / "b", (3, 9), 5, start=3)  # a run that goes on in the middle, and ends before the last
    assert traced_steps(tmp_path / "b") == [[4, 5]]
    run(tmp_path / "c", (), 6)
    run(tmp_path / "c", (2, 4), 6, start=4)
    assert not (tmp_path / "c").exists()


def test_a_trace_ends_also_when_the_run_breaks(tmp_path):
    with pytest.raises(RuntimeError, match="no device"), Trace(tmp_path, (1, 5)) as trace, trace.step(1):
        raise RuntimeError("no device")
    assert len(traced_steps(tmp_path)) == 1
    jax.profiler.start_trace(tmp_path / "another")  # would raise while one is under way
    jax.profiler.stop_trace()


@pytest.mark.parametrize("steps", [(3,), (4, 3), (0, 2), (1.0, 2), (1, 2, 3), ("1", 2)])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(ValueError, match="--config.profile.steps=") as caught:
        check_traced_steps(steps)
    assert "\n" not in str(caught.value)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """jax's events, while programs of any size are kept; its settings are given back."""
    wanted = {"jax_enable_compilation_cache": True, "jax_persistent_cache_min_compile_time_secs": 0.0}
    names = (*wanted, "jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
    before, events = {name: jax.config.values[name] for name in names}, []
    listen = lambda event, **_: events.append(event)
    jax.monitoring.register_event_listener(listen)
    for name, value in wanted.items():
        jax.config.update(name, value)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_listener(listen)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def compiled(folder: str) -> float:
    """Compiles a program anew, as far as this process knows."""
    keep_programs(folder)
    return float(jax.jit(lambda x: x * 2.5)(jnp.float32(4)))


def test_a_program_is_found_by_the_next_start(tmp_path, watched):
    folder = tmp_path / "new" / "programs"
    assert compiled(str(folder)) == 10 and watched.count(HIT) == 0
    kept = sorted(folder.glob("*-cache"))
    assert compiled(str(folder)) == 10 and watched.count(HIT) == len(kept) > 0
    assert sorted(folder.glob("*-cache")) == kept


@pytest.mark.slow
def test_the_next_process_compiles_nothing_anew(tmp_path, model):
    programs_of = lambda: sorted((tmp_path / "programs").glob("*-cache"))
    flags = tiny_flags(tmp_path, model, compilation_cache=tmp_path / "programs")
    command = [sys.executable, "-m", "proreflow_jax.sample", *flags, "--stage=0", f"--out={tmp_path / 'a.png'}"]
    settings = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for _ in range(2):
        kept = programs_of()
        ended = subprocess.run(command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, ended.stderr
    assert programs_of() == kept and len(kept) > 3


@pytest.mark.slow  # ten seconds, most of them imports of what speaks to the store
def test_in_a_bucket_both_are_found_too(tmp_path, monkeypatch, watched):
    with fake_gcs.serve("bucket") as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        gcs.client.cache_clear()
        run(paths.parse_path("gs://bucket/run/profile"), (1, 1), 1)
        (name,) = [n for n in store.names("gs://bucket/run/profile/plugins/profile/") if n.endswith(".xplane.pb")]
        (tmp_path / "a.xplane.pb").write_bytes(store.data(f"gs://bucket/{name}"))
        assert step_numbers(tmp_path / "a.xplane.pb") == [1]

        assert compiled("gs://bucket/programs") == 10 and watched.count(HIT) == 0
        kept = store.names("gs://bucket/programs/")
        assert compiled("gs://bucket/programs") == 10 and watched.count(HIT) >= 1
        assert store.names("gs://bucket/programs/") == kept != []
    gcs.client.cache_clear()


def test_a_folder_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--config.compilation_cache=") as caught:
        keep_programs(str(tmp_path / "file" / "below"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="s3://"):
        keep_programs("s3://bucket/programs")
    before = jax.config.jax_compilation_cache_dir
    keep_programs("")
    assert jax.config.jax_compilation_cache_dir == before
