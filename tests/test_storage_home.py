"""`~` is the home in every path that a user names."""

from pathlib import Path

import pytest
import tiny
from verb import CONFIG, run, tiny_flags

from proreflow_jax.storage import paths

pytestmark = pytest.mark.usefixtures("quick")


def test_a_path_below_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.parse_path("~/runs") == tmp_path / "runs"
    assert paths.parse_path("~") == tmp_path
    assert paths.parse_path("a/~/b") == Path("a/~/b")
    with pytest.raises(ValueError, match="--out=~nobody-of-this-name/x: no such user's home"):
        paths.parse_path("~nobody-of-this-name/x", "--out")


def test_verbs_read_and_write_below_the_home(monkeypatch, tmp_path):
    """Model, prompts, runs, pictures and the config file itself."""
    home, here = tmp_path / "home", tmp_path / "here"
    tiny.write_model(home / "model")
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "configs").mkdir()
    for file in (CONFIG, CONFIG.with_name("common.py")):
        (home / "configs" / file.name).write_bytes(file.read_bytes())
    _, *words = tiny_flags(home, Path("~/model"), root="~/runs", data__path="~/prompts.txt")
    words = ["--config=~/configs/digits.py", *words]
    ended = run("sample", *words, "--stage=0", "--steps=1", "--count=1", "--prompts=~/prompts.txt", "--out=~/x.png")
    assert ended.code == 0 and (home / "x.png").is_file(), ended.err
    ended = run("make_pairs", *words, "--stage=4")
    assert ended.code == 0 and (home / "runs" / "tiny" / "stage-4" / "pairs" / "MANIFEST.json").is_file(), ended.err
    assert list(here.iterdir()) == []
