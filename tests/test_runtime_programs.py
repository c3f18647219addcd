"""Compiled programs lie in the user's cache folder unless config or environment name another."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from test_runtime_profiler import HIT, compiled, watched  # noqa: F401

from proreflow_jax.runtime import programs
from proreflow_jax.runtime.programs import OFF, clear_old, keep_programs


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: list[str]) -> Iterator[Path]:  # noqa: F811
    """A user's cache folder, and nothing of jax's own settings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PROREFLOW_CACHE", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "cache"


def test_the_next_start_finds_its_programs_in_the_user_s_cache(home, watched):  # noqa: F811
    assert compiled("") == 10 and watched.count(HIT) == 0
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder.parent == home / "proreflow_jax" / "programs" and folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.glob("*-cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert compiled("") == 10 and watched.count(HIT) > 0


def test_the_folder_s_place_is_in_no_program_s_key(home, watched, tmp_path, monkeypatch):  # noqa: F811
    compiled("")
    moved = tmp_path / "elsewhere"
    home.rename(moved)
    monkeypatch.setenv("XDG_CACHE_HOME", str(moved))
    jax.config.update("jax_compilation_cache_dir", None)
    compiled("")
    assert watched.count(HIT) > 0


def test_config_then_environment_win_and_off_is_off(home, tmp_path):
    named = tmp_path / "named"
    keep_programs(str(named))
    assert jax.config.jax_compilation_cache_dir == str(named)
    keep_programs("")  # jax has it from the environment
    assert jax.config.jax_compilation_cache_dir == str(named) and not home.exists()
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs(OFF)
    assert not jax.config.jax_enable_compilation_cache and not home.exists()
    keep_programs("")
    assert jax.config.jax_compilation_cache_dir is None and not home.exists()


def test_a_home_that_cannot_be_written_costs_one_line(home, caplog):
    home.write_text("a file")
    keep_programs("")
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = caplog.messages
    assert "compiled programs are not kept" in line and "--config.compilation_cache" in line


def test_a_folder_that_others_may_write_to_is_not_used(home, caplog):
    keep_programs("")
    folder = Path(jax.config.jax_compilation_cache_dir)
    jax.config.update("jax_compilation_cache_dir", None)
    folder.chmod(0o777)
    keep_programs("")
    assert jax.config.jax_compilation_cache_dir is None and "others may write to it" in caplog.text


def test_what_was_not_read_for_longest_goes_first(tmp_path):
    for number in range(4):
        path = tmp_path / f"p{number}-cache"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 + number, 1000))
    os.utime(tmp_path / "p0-cache", (2000, 1000))  # read again
    clear_old(tmp_path, limit=250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p0-cache", "p3-cache"]
    assert programs.LIMIT > 2**30
