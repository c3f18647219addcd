"""The command `proreflow`, the names that --config takes, and all that is said before jax is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from verb import ROOT, run

from proreflow_jax import MissingFile, UserError, __version__
from proreflow_jax.run import verbs
from proreflow_jax.run.config_files import importable, locate, own_names

VERBS = sorted(path.stem for path in (ROOT / "proreflow_jax").glob("[a-z]*.py"))


def test_the_list_has_every_verb_with_its_first_line(capsys):
    assert verbs.main([]) == 0
    page = capsys.readouterr().out
    assert verbs.main(["--help"]) == 0 and capsys.readouterr().out == page
    rows = dict(line.split(maxsplit=1) for line in page.splitlines() if line.startswith("  ") and not line.startswith("    "))
    assert sorted(rows) == VERBS
    for verb, line in rows.items():
        assert (ROOT / "proreflow_jax" / f"{verb}.py").read_text().startswith(f'"""{line}')


def test_the_version_is_the_package_s(capsys):
    assert verbs.main(["--version"]) == 0 and capsys.readouterr().out == f"proreflow {__version__}\n"


@pytest.mark.parametrize(("word", "needle"), [("smaple", "did you mean sample?"), ("xyz", "must be one of distill, sample")])
def test_a_verb_that_is_none_is_refused(capsys, word, needle):
    assert verbs.main([word, "--stage=2"]) == 2
    line = capsys.readouterr().err
    assert f"{word!r} is no verb" in line and needle in line and line.count("\n") == 1


LIGHT = """
import contextlib, io, json, runpy, sys
said = {}
for verb in json.loads(sys.argv[1]):
    for word in ("--help", "--stgae=2", "--config=digist"):
        sys.argv = [verb, verb, word]
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                runpy.run_module("proreflow_jax", run_name="__main__")
        except SystemExit as end:
            said[f"{verb} {word}"] = [end.code, out.getvalue()]
heavy = [name for name in ("jax", "jaxlib", "flax", "orbax", "numpy", "huggingface_hub") if name in sys.modules]
print(json.dumps([said, heavy]))
"""


def test_help_and_misspelt_words_import_no_jax():
    """So they take a moment: tests/start_times.py prints how long."""
    command = [sys.executable, "-c", LIGHT, json.dumps(VERBS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    said, heavy = json.loads(done.stdout)
    assert heavy == [] and len(said) == 3 * len(VERBS)
    for words, (code, text) in said.items():
        assert code == (0 if "--help" in words else 2), (words, text)
        assert "Flags and their defaults" in text if "--help" in words else text.count("\n") == 1, text


def test_a_wrong_field_and_a_number_out_of_range_import_no_jax():
    code = "import sys\nfrom proreflow_jax.{0} import {0}\nfrom proreflow_jax.run import cli\n"
    code += "try:\n    cli.start({0}, '', 'digits')\nfinally:\n    print('jax' in sys.modules)"
    for word in ("--config.train.bach=3", "--config.train.batch=0"):
        command = [sys.executable, "-c", code.format("distill"), word]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (2, "False\n") and word.split("=")[0][-4:] in done.stderr, done


def test_a_config_is_found_by_its_name_and_by_its_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert locate("digits") == str(ROOT / "configs" / "digits.py")
    assert locate("reproduce:quick") == f"{ROOT / 'configs' / 'reproduce.py'}:quick"
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "digits").write_text("")  # a name is a name, whatever lies in the folder
    assert locate("mine.py") == locate("./mine.py:x").removesuffix(":x") == str(tmp_path / "mine.py")
    assert locate("digits") == str(ROOT / "configs" / "digits.py")
    assert {"digits", "sd15", "sd21", "sdxl", "finetune"} <= set(own_names()) and "common" not in own_names()


@pytest.mark.parametrize(
    ("value", "kind", "needle"),
    [
        ("digist", UserError, "--config=digist must be one of digits, "),
        ("", UserError, "--config is empty"),
        ("mine.py", MissingFile, "--config=mine.py is not there"),
        ("configs/digits.py", MissingFile, "is not there; --config=digits is the package's own"),
    ],
)
def test_a_config_that_is_not_there_is_refused(monkeypatch, tmp_path, value, kind, needle):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as error:
        locate(value)
    assert needle in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["--config", "digits"], ["-config=digits"], ["--config.train.batch=64", "--config=digits"]])
def test_a_config_s_word_may_stand_anywhere(words):
    ended = run("distill", *words, "--config.stages=(7,)")
    assert ended.code == 2 and "7 windows" in ended.err


MINE = """
from configs.common import stable_diffusion
from neighbour import NAME

def get_config():
    c = stable_diffusion(NAME)
    c.seed = -1
    return c
"""


def test_a_file_of_one_s_own_has_the_package_s_blocks_and_its_neighbours_and_nothing_else_is_on_the_path(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "neighbour.py").write_text("import sys\nNAME = sys.path[0]\nPATH = list(sys.path)\n")
    code = "import sys\nbefore = list(sys.path)\nfrom proreflow_jax.distill import distill\nfrom proreflow_jax.run import cli\n"
    code += "try:\n    cli.start(distill, '', 'digits')\nfinally:\n    import configs.common\n"
    code += "    assert sys.path == before and sys.modules['neighbour'].PATH == [NAME, *before], sys.path\n"
    code = code.replace("NAME", repr(str(tmp_path)))
    command = [sys.executable, "-P", "-c", code, f"--config={tmp_path / 'mine.py'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--config.seed=-1 must be in" in done.stderr, done.stderr


def test_a_copied_folder_of_configs_is_read_before_the_package_s(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "common.py").write_text("in_form = optimizer = stable_diffusion = asset = 'mine'\n")
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "configs"}
    try:
        with importable(folder / "mine.py"):
            from configs import digits, sd15

            assert digits.asset == sd15.optimizer == "mine" and Path(sd15.__file__) == ROOT / "configs" / "sd15.py"
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
            del sys.modules[name]
        sys.modules.update(modules)
