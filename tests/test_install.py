"""The wheel holds all that the verbs need, from any folder; messages and pages name what can be installed."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml
from verb import ROOT

from proreflow_jax import __version__

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "proreflow_jax", "configs")
PIP = re.compile(r"pip install ([^\n`\"(),#|&]*)(?:\(the extra `([\w-]+)`\))?")
INSTALLER = "uv"  # which launch/ puts onto a bare machine


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, folder / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", folder / "dist", folder], check=True, timeout=300)
    (path,) = (folder / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """A folder in which the wheel is installed, in the place of site-packages."""
    folder = wheel.parent.parent / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_the_wheel_holds_package_configs_and_assets(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {path for room in ("proreflow_jax", "configs") for path in (ROOT / room).rglob("*") if path.is_file()}
    files = {str(path.relative_to(ROOT)) for path in ours if path.parent.name != "__pycache__"}
    moved = {re.sub("^configs/", "proreflow_jax/configs/", name) for name in files}
    assert {name for name in names if ".dist-info/" not in name} == moved
    assert "proreflow_jax/py.typed" in names and "proreflow_jax/configs/common.py" in names


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith("/METADATA"))
        (commands,) = (name for name in file.namelist() if name.endswith("/entry_points.txt"))
        about = HeaderParser().parsestr(file.read(metadata).decode())
        assert "proreflow = proreflow_jax.run.verbs:main" in file.read(commands).decode()
    assert about["Version"] == __version__ and about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload().startswith("# proreflow_jax") and "Typing :: Typed" in about.get_all("Classifier")
    assert {"all", "cuda", "dev", "tensorboard", "tpu", "wandb"} <= set(about.get_all("Provides-Extra"))
    assert all(
        "==" not in word.partition(";")[0] for word in about.get_all("Requires-Dist") if word.startswith(("torch", "libtpu"))
    )


def test_the_pages_about_the_package_name_its_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    assert citation["title"].startswith("ProReflow") and len(citation["authors"]) == 10


READ = """
import json, sys
from proreflow_jax.run import command_line, config_files
models = {}
for name in config_files.own_names():
    sys.argv = ["sample", f"--config={name}"]
    sys.modules.pop("config_config", None)
    config, _ = command_line.read("sample", "", "digits", {})
    models[name] = config.get("model", {}).get("path", "")
import configs.common
print(json.dumps([models, configs.common.__file__, "jax" in sys.modules]))
"""


def test_every_config_is_read_from_the_wheel_in_any_folder(site, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", READ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    models, common, heavy = json.loads(done.stdout)
    assert {"digits", "sd15", "sdxl"} <= set(models) and not heavy
    assert Path(common) == site / "proreflow_jax" / "configs" / "common.py"
    assert Path(models["digits"]) == site / "proreflow_jax" / "assets" / "digits" and Path(models["digits"]).is_dir()


def test_a_verb_of_the_wheel_draws_in_an_empty_folder(site, tmp_path):
    words = ["sample", "--config=digits", "--stage=0", "--steps=1", "--count=1", "--prompt=a handwritten seven"]
    environment = {**os.environ, "PYTHONPATH": str(site), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "proreflow_jax", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["samples.png"], done.stderr


def extras() -> dict[str, set[str]]:
    """{extra: names of its packages} of setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists: dict[str, list[str]] = {}
    for node in (node for node in tree.body if isinstance(node, ast.Assign)):
        lists[node.targets[0].id] = eval(ast.unparse(node.value), {}, lists)
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup")
    table = next(word.value for word in call.keywords if word.arg == "extras_require")
    rows = {key.value: lists[value.id] for key, value in zip(table.keys, table.values, strict=True)}
    return {extra: {re.match(r"[\w.-]+", word)[0] for word in words} for extra, words in rows.items()}


def astray(root: Path, known: dict[str, set[str]]) -> list[str]:
    """Every word behind a `pip install` that is neither a path, with extras of ours, nor a package of the extra named there."""
    lines = []
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("launch/*"), *root.glob("proreflow_jax/**/*.py")]
    for path in sorted(path for path in pages if path.is_file()):
        for words, extra in PIP.findall(path.read_text(encoding="utf-8")):
            for word in (word.strip("'") for word in words.split() if not word.startswith("-")):
                place, _, wanted = word.rstrip("]").partition("[")
                ours = place == "." or "/" in place or place.endswith(".whl")
                right = set(wanted.split(",")) <= {"", *known} if ours else word in known.get(extra, {INSTALLER})
                lines += [] if right else [f"{path.relative_to(root)}: pip install {word}"]
    return lines


def test_nobody_is_sent_to_a_name_on_the_index_that_is_not_ours():
    assert astray(ROOT, extras()) == []


@pytest.mark.parametrize(
    "text",
    [
        "pip install proreflow_jax",
        "pip install 'proreflow_jax[demo]'",
        "pip install numpi (the extra `demo`)",
        "pip install matplotlib",
        "pip install -e '.[dmo]'",
    ],
)
def test_a_wrong_name_is_seen(tmp_path, text):
    (tmp_path / "README.md").write_text(f"pip install -e '.[demo]'\n{text}\n")
    assert len(astray(tmp_path, extras())) == 1
