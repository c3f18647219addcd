"""docs/python.md and docs/notebook.ipynb run as they are written, with the tiny model in the place of the emoji."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from verb import ROOT, TINY

from proreflow_jax.run import config_files

pytestmark = pytest.mark.usefixtures("quick")
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
EMOJI = 'Path(proreflow_jax.__file__).parent / "assets" / "emoji"'
OWN = """
from pathlib import Path
from configs.whole import get_config as emoji
from proreflow_jax.run.check_config import changed

def get_config():
    return changed(emoji(), {values!r}).copy_and_resolve_references()
"""


def cells() -> list[str]:
    """The code of the notebook. The notebook is kept without outputs."""
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)
    return ["".join(cell["source"]) for cell in code]


@pytest.fixture
def smaller(chain: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a finished run "emoji", where the config "emoji" is the tiny one, a fraction of its work."""
    shutil.copytree(chain / "runs" / "tiny", tmp_path / "runs" / "emoji")
    read = lambda value: eval(value) if isinstance(value, str) and value[0] == "(" else value
    prompts = Path((chain / "prompts.at").read_text())
    values = {name: read(value) for name, value in TINY.items()} | {"model.path": str(model), "data.path": str(prompts)}
    values |= {"name": "emoji", "checkpoint.every": 20}
    shutil.copytree(ROOT / "configs", tmp_path / "own")
    (tmp_path / "own" / "emoji.py").rename(tmp_path / "own" / "whole.py")
    (tmp_path / "own" / "emoji.py").write_text(OWN.format(values=values))
    monkeypatch.setattr(config_files, "own_folder", lambda: tmp_path / "own")
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)  # and what is read from there goes with the test
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        del sys.modules[name]  # read from this folder; monkeypatch puts back what was there


def execute(blocks: list[str], model: Path | None = None) -> dict:
    names: dict = {"__name__": "page"}
    for block in blocks:
        exec(compile(block.replace(EMOJI, repr(str(model))) if model else block, "page", "exec"), names)
    return names


@pytest.mark.slow  # half a dozen programs
def test_every_block_of_the_page_runs(smaller, model):
    assert len(BLOCKS) == PAGE.count("```python") == 5
    names = execute(BLOCKS, model)
    assert (smaller / "out" / "octopuses.png").is_file() and (smaller / "octopus.png").is_file()
    assert names["pixels"].shape == (4, 8, 8, 3) and float(names["metrics"]["largest"]) > 0
    assert int(names["state"].step) == 3 and names["mine"].flow.windows == 4


def test_every_cell_of_the_notebook_runs(smaller, model):
    names = execute(cells(), model)
    assert names["student"].flow.windows == 4 and (smaller / "runs" / "notebook" / "stage-4" / "DONE.json").is_file()


@pytest.mark.slow
def test_the_notebook_runs_on_the_emoji(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert execute(cells())["student"].flow.windows == 4
