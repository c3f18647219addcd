"""The house stands as designed: its floors, what the library folders never contain, configs that explain themselves."""

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "proreflow_jax"
FLOORS = {  # folder -> folders of ours that it may import beside itself
    "flow": set(),
    "models": set(),
    "data": set(),
    "runtime": set(),
    "reflow": {"flow", "models", "runtime"},
    "evaluation": {"flow", "models", "runtime"},
}
HEAVY = ("torch", "tensorflow", "diffusers", "transformers", "sklearn")
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
WORDS = ("TODO", "FIXME", "XXX", "torch.load", "allow_pickle=True")
BLOCKS = ("ConfigDict", "optimizer")  # calls that make a block of fields
NAMED = re.compile(r"(?<![\w/.])((?:proreflow_jax|configs|tests|launch)/[\w/.-]*\w\.(?:py|md|json|sh|yaml))\b")
MEGABYTE = 1 << 20


def imports(path: Path, package: str) -> set[str]:
    """Dotted names that a file imports, `package` being the dotted name of its folder; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def library(root: Path) -> Iterator[tuple[str, Path, set[str]]]:
    """(folder, file, what it imports) of every file in a folder of the package."""
    for folder in FLOORS:
        for path in sorted((root / PACKAGE / folder).rglob("*.py")):
            yield folder, path, imports(path, ".".join(path.parent.relative_to(root).parts))


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def layering(root: Path) -> list[str]:
    """Every breach of the floors and of who may import flax, orbax and jax, one line each."""
    found = []
    for folder, path, names in library(root):
        where = str(path.relative_to(root))
        ours = {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")}
        found += [f"{where} imports {room}" for room in sorted(ours - FLOORS[folder] - {folder})]
        found += [f"{where} imports {PACKAGE} itself" for name in names if name == PACKAGE]
        found += [f"{where} imports flax" for _ in top(names) & {"flax"} if folder != "models"]
        keeper = (folder, path.name) == ("runtime", "checkpoint.py")
        found += [f"{where} imports orbax" for _ in top(names) & {"orbax"} if not keeper]
        found += [f"{where} imports {name}" for name in sorted(top(names) & {"jax", "jaxlib"}) if folder == "data"]
    for path in sorted((root / PACKAGE).glob("*.py")):
        found += [f"{path.name} imports {name}" for name in sorted(top(imports(path, PACKAGE)) & {"flax", "orbax"})]
    for path in sorted((root / "configs").glob("*.py")):
        ours = {n for n in imports(path, "configs") if n.split(".")[0] == PACKAGE}
        found += [f"configs/{path.name} imports {n}" for n in sorted(ours)]
    return found


def forbidden(root: Path) -> list[str]:
    """Every pickle, torch.load, bare except, print and unfinished note in the library folders, one line each."""
    found = []
    for _, path, names in library(root):
        where = str(path.relative_to(root))
        found += [f"{where} imports {name}" for name in sorted(top(names) & PICKLES)]
        text = path.read_text(encoding="utf-8")
        found += [f"{where} holds {word}" for word in WORDS if word in text]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                found.append(f"{where}:{node.lineno} bare except")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "eval", "exec"):
                found.append(f"{where}:{node.lineno} {node.func.id}")
    return found


def uncommented(path: Path) -> list[str]:
    """Fields of a config file (c.a.b = value, or name=value inside dict(...)) whose line holds no comment.

    Lines that only open a block (`c.a = ConfigDict()`) or take a commented one from configs.common need none.
    """
    with tokenize.open(path) as file:
        commented = {token.start[0] for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT}
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            block = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in BLOCKS
            if not block and node.end_lineno not in commented:
                found.append(f"{path.name}:{node.lineno} {ast.unparse(node.targets[0])}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
            lines = [(word.value.lineno, word.arg) for word in node.keywords]
            found += [f"{path.name}:{line} {name}" for line, name in lines if line not in commented]
    return found


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


def test_the_floors_hold():
    assert layering(ROOT) == []
    assert len(list(library(ROOT))) > 30  # the walk sees the house


@pytest.mark.parametrize(
    ("name", "text", "breach"),
    [
        ("proreflow_jax/flow/a.py", "from proreflow_jax.models import unet\n", "proreflow_jax/flow/a.py imports models"),
        ("proreflow_jax/flow/a.py", "if 1:\n    import proreflow_jax.runtime\n", "proreflow_jax/flow/a.py imports runtime"),
        ("proreflow_jax/models/a.py", "from ..reflow import loop\n", "proreflow_jax/models/a.py imports reflow"),
        ("proreflow_jax/runtime/a.py", "from proreflow_jax import data\n", "proreflow_jax/runtime/a.py imports data"),
        ("proreflow_jax/reflow/a.py", "from proreflow_jax.data import loader\n", "proreflow_jax/reflow/a.py imports data"),
        ("proreflow_jax/evaluation/a.py", "from proreflow_jax import cli\n", "proreflow_jax/evaluation/a.py imports cli"),
        ("proreflow_jax/reflow/a.py", "from flax import nnx\n", "proreflow_jax/reflow/a.py imports flax"),
        ("proreflow_jax/runtime/mesh.py", "import orbax.checkpoint\n", "proreflow_jax/runtime/mesh.py imports orbax"),
        ("proreflow_jax/train.py", "import orbax.checkpoint\n", "train.py imports orbax"),
        ("proreflow_jax/data/a.py", "import jax.numpy as jnp\n", "proreflow_jax/data/a.py imports jax"),
        ("configs/a.py", "from proreflow_jax.flow import windows\n", "configs/a.py imports proreflow_jax.flow.windows"),
    ],
)
def test_a_broken_floor_is_seen(tmp_path, name, text, breach):
    write(tmp_path, name, text)
    assert layering(tmp_path) == [breach]


def test_permitted_imports_are_no_breach(tmp_path):
    write(tmp_path, "proreflow_jax/reflow/a.py", "import jax\nfrom proreflow_jax.flow import windows\nfrom . import step\n")
    write(tmp_path, "proreflow_jax/models/a.py", "from flax import nnx\nfrom proreflow_jax.models import unet\n")
    write(tmp_path, "proreflow_jax/runtime/checkpoint.py", "import orbax.checkpoint\n")
    write(tmp_path, "proreflow_jax/data/a.py", "from jaxtyping import UInt8\nfrom . import files\n")
    write(tmp_path, "configs/a.py", "from configs.common import optimizer\nfrom configs.digits import get_config\n")
    assert layering(tmp_path) == []


def test_the_library_contains_nothing_forbidden():
    assert forbidden(ROOT) == []


@pytest.mark.parametrize(
    ("text", "breach"),
    [
        ("import pickle\n", "imports pickle"),
        ("x = torch.load('a')\n", "holds torch.load"),
        ("try:\n    f()\nexcept:\n    pass\n", ":3 bare except"),
        ("def f():\n    print('x')\n", ":2 print"),
        ("x = 1  # TODO\n", "holds TODO"),
    ],
)
def test_what_is_forbidden_is_seen(tmp_path, text, breach):
    write(tmp_path, "proreflow_jax/data/a.py", text)
    (line,) = forbidden(tmp_path)
    assert breach in line


def test_every_field_of_every_config_is_explained():
    assert [line for path in sorted((ROOT / "configs").glob("*.py")) for line in uncommented(path)] == []


def test_an_unexplained_field_is_seen(tmp_path):
    write(tmp_path, "a.py", "c.a = 1  # one\nc.b = 2\nc.d = ConfigDict()\nd = dict(\n    e=1,  # e\n    f=2,\n)\n")
    assert uncommented(tmp_path / "a.py") == ["a.py:2 c.b", "a.py:6 f"]


def test_the_training_install_is_free_of_torch_and_tensorflow():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    names = {re.match(r"[A-Za-z0-9_-]+", requirement)[0].lower() for requirement in ast.literal_eval(lists["TRAINING"])}
    assert "jax" in names
    assert names.isdisjoint({*HEAVY, "scikit-learn", "tensorflow-cpu", "torchvision", "accelerate"})
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup")
    install = next(word.value for word in call.keywords if word.arg == "install_requires")
    assert ast.unparse(install) == "TRAINING"


def test_the_jobs_start_where_torch_and_tensorflow_are_not_installed():
    verbs = ("distill", "make_pairs", "train", "sample", "export", "merge", "upload", "evaluate", "pretrain", "reproduce")
    verbs += ("plan", "cache", "bench", "make_emoji")
    block = f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); "  # None there: importing it raises ImportError
    code = block + f"import {', '.join(f'{PACKAGE}.{verb}' for verb in verbs)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


ALONE = {f"{PACKAGE}/{name}.py": {"torch", "diffusers"} for name in ("replay", "bench_torch", "windowed_scheduler")}


def test_only_what_runs_beside_diffusers_imports_torch():
    wanted = {str(path.relative_to(ROOT)): top(imports(path, PACKAGE)) & set(HEAVY) for path in (ROOT / PACKAGE).rglob("*.py")}
    wanted = {name: heavy - {"sklearn"} for name, heavy in wanted.items()}  # sklearn: inside functions, for the digits alone
    assert {name: heavy for name, heavy in wanted.items() if heavy} == ALONE


def test_the_embedded_model_is_small_and_holds_no_code():
    folder = ROOT / PACKAGE / "assets" / "digits"
    if not folder.is_dir():
        pytest.skip("the base model is not embedded yet")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) <= 12 * MEGABYTE
    assert {path.suffix for path in paths} <= {".safetensors", ".json", ".txt", ".md"}


@pytest.fixture
def readme() -> str:
    path = ROOT / "README.md"
    if not path.is_file():
        pytest.skip("there is no README yet")
    return path.read_text(encoding="utf-8")


def test_the_file_map_is_the_house(readme):
    found = re.search(r"## File map\n+```\n(.*?)```", readme, re.DOTALL)
    assert found, "the README has no file map"
    folders = set(re.findall(r"^ *(\w+)/", found[1], re.MULTILINE))
    files = {name for line in found[1].splitlines() for name in re.match(r" *((?:\w+\.py *)*)", line)[1].split()}
    there = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"assets"} == (there | {PACKAGE, "configs", "docs", "launch", "tests"}) - {"assets"}
    assert files == {path.name for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__.py"}


def test_the_readme_names_paths_that_exist(readme):
    assert sorted(name for name in set(NAMED.findall(readme)) if not (ROOT / name).exists()) == []
