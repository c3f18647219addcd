"""Every command in README and docs: it names a verb, target, script or extra that exists, with flags that are read.

The slow proof runs those that a trial on the tiny model can carry out, and prints the list with what came of each.
"""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from verb import ROOT, TINY, run

from proreflow_jax import UserError
from proreflow_jax.run import cli, command_line, config_files

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:proreflow|python -m proreflow_jax\.\w+|make|pip|tensorboard) [^`<]*)`")
COMMAND = re.compile(  # whatever else stands in a block is output
    r"([A-Z_]+=\S+ )*(proreflow|\S*python3?|make|pip|launch/\w+\.sh|tests/\w+|tensorboard|git|\.|cat|gcloud|unzip|export) \S"
)
OTHERS = {"tensorboard", "git", ".", "cat", "gcloud", "unzip"}  # of other people, and the shell's own
LEFT_OUT = {  # verbs and words that a trial on the tiny model cannot carry out here, and why
    "plan": "compiles for TPUs (tests/test_perf_plan.py)",
    "serve --": "waits for a browser, and needs gradio (tests/test_jobs_gallery.py)",
    "upload": "sends to the hub (tests/test_verbs_upload.py)",
    "watch --run": "serves until Ctrl-C (tests/test_page_serve.py)",
    "reproduce": "trains many models (tests/test_verbs_reproduce.py)",
    "gs://": "a bucket (tests/test_storage_gcs.py)",
    "coco2017": "published networks (tests/test_verbs_scores.py)",
    "evaluate   --config=digits": "the digits' judge (tests/test_verbs_chain.py)",
    "--study": "minutes of a real model (tests/test_jobs_study_flow.py)",
    "webdataset": "a dataset (tests/test_verbs_data.py)",
    "--against": "torch beside it (tests/test_verbs_bench.py)",
    "--check": "torch beside it (tests/test_verbs_exports.py)",
    "start=data": "a dataset (tests/test_verbs_data.py)",
    "reproduce:": "a grid's config (tests/test_verbs_reproduce.py)",
    "MY_SD3": "another kind of network (tests/test_verbs_sd3.py)",
    "make_emoji": "packages of pictures (tests/test_verbs_emoji.py)",
}


def commands(page: Path) -> list[str]:
    """The commands of a page, with the block's own variables filled in and without comments and environment."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for language, block in BLOCK.findall(text):
        lines += _block_commands(block) if language in ("", "bash", "sh") else []
    return lines + [line for inline in INLINE.findall(text) if (line := " ".join(inline.split())) and "..." not in line]


VARIABLES: dict[str, str] = {}


def _block_commands(block: str) -> list[str]:
    block = re.sub(r'^([A-Z])="([^"]*)"', lambda m: f'{m[1]}="{" ".join(m[2].split())}"', block, flags=re.MULTILINE)
    block = re.sub(r"<<END\n.*?^END$", "", block.replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
    lines = []
    for line in block.splitlines():
        line = re.sub(r"^\$ ", "", line).strip()
        for part in re.split(r" && | \| ", line):
            if setting := re.match(r'^([A-Z])=(?:"(.*)"|(\S+))$', part):
                VARIABLES[setting[1]] = filled(setting[2] or setting[3])
            elif part := filled(part):
                lines.append(part)
    return lines


def filled(line: str) -> str:
    return re.sub(r"\$([A-Z])\b", lambda name: VARIABLES[name[1]], line)


def words_of(line: str) -> list[str]:
    """A command's words, without comment and environment."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words


def all_commands() -> list[tuple[str, str]]:
    rows = []
    for page in PAGES:
        VARIABLES.clear()
        for line in commands(page):
            if COMMAND.match(line):
                rows.append((page.name, line))
    return rows


ROWS = list(dict.fromkeys(all_commands()))


def verb_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(verb, its words), if it is one of ours."""
    if words[0] in ("proreflow", ".venv/bin/proreflow") and len(words) > 1:
        return words[1], words[2:]
    if len(words) > 2 and words[0].endswith("python") and words[1] == "-m" and words[2].startswith("proreflow_jax."):
        return words[2].removeprefix("proreflow_jax."), words[3:]
    return None


def check_flags(verb: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb exists, and its command line takes these words."""
    if verb.startswith("-"):
        assert verb in ("--help", "--version")
        return
    taken = {}

    def start(function: Any, about: str, config: str, options: Any = None, pod: bool = False) -> None:
        monkeypatch.setattr(sys, "argv", [verb, *words])
        try:
            taken["values"] = command_line.read(verb, about, config, dict(options or {}))
        except command_line.Help:
            taken["values"] = None
        finally:
            sys.modules.pop("config_config", None)

    with monkeypatch.context() as patch:
        patch.setattr(cli, "start", start)
        runpy.run_module(f"proreflow_jax.{verb}", run_name="__main__")
    assert "values" in taken


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("page", "line"), ROWS, ids=[f"{page}: {line[:60]}" for page, line in ROWS])
def test_a_command_names_what_there_is(page, line, monkeypatch, capsys):
    words = words_of(line)
    if "--" in words and words[0].startswith("launch/"):
        assert subprocess.run(["bash", "-n", ROOT / words[0]], check=False).returncode == 0
        words = words[words.index("--") + 1 :]
        if words == ["..."]:
            return
    if ours := verb_of(words):
        check_flags(*ours, monkeypatch)
    elif words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif words[0] == "pip" or words[:3] == ["python", "-m", "pip"]:
        extras = set(re.findall(r"\[(\w[\w-]*)\]", line))
        assert extras <= set(re.findall(r'^        "([\w-]+)": \w+,$', (ROOT / "setup.py").read_text(), re.MULTILINE))
    elif words[0].startswith("launch/"):
        assert (ROOT / words[0]).is_file()
    elif words[0] in ("python", "python3"):
        assert words[1] in ("-m", "-c") or (ROOT / words[1]).is_file()
    else:
        assert words[0] in (*OTHERS, "export", "proreflow"), line


def test_the_pages_hold_commands_of_every_verb():
    verbs = {verb for _, line in ROWS if (ours := verb_of(words_of(line))) for verb in [ours[0]]}
    public = {path.stem for path in (ROOT / "proreflow_jax").glob("*.py") if not path.stem.startswith("_")}
    assert public - verbs <= {"make_emoji", "pretrain"}, public - verbs


def test_every_page_is_in_the_index_and_no_link_is_dead():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in PAGES if page.parent.name == "docs" and page.name != "README.md" and f"({page.name})" not in index
    ] == []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for link, anchor in re.findall(r"\]\(([^)#:\s]*)#([\w-]+)\)", text):
            target = (page.parent / link if link else page).read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.*)$", target, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}, (
                f"{page.name}: {link}#{anchor}"
            )


OWN = """
from configs.whole import get_config as digits
from proreflow_jax.run.check_config import changed

def get_config(form=""):
    return changed(digits(), {values!r}).copy_and_resolve_references()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_every_command_runs_on_a_trial(chain, model, tmp_path, monkeypatch):
    """In the order of the pages, in one folder with a finished run; every config is the tiny one under its name."""
    own = shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (own / "digits.py").rename(own / "whole.py")
    read = lambda value: eval(value) if isinstance(value, str) and value[0] == "(" else value
    values = {name: read(value) for name, value in TINY.items()}
    prompts = Path((chain / "prompts.at").read_text())
    shutil.copy(prompts, tmp_path / "prompts.txt")
    tiny.write_model(tmp_path / "MY_FINE_TUNE")
    for name in [path.stem for path in own.glob("*.py") if path.stem not in ("__init__", "common", "whole")] + ["digits"]:
        fields = values | {"name": name, "model.path": str(model), "data.path": str(prompts), "stages": (4, 2)}
        (own / f"{name}.py").write_text(OWN.format(values=fields))
        shutil.copytree(chain / "runs" / "tiny", tmp_path / "runs" / name)
    monkeypatch.setattr(config_files, "own_folder", lambda: own)
    monkeypatch.chdir(tmp_path)
    ended, wrong = [], []
    for page, line in ROWS:
        words = words_of(line)
        words = words[words.index("--") + 1 :] if "--" in words else words
        if not (ours := verb_of(words)) or ours[0].startswith("-") or len(words) == 2:  # the last: a verb's name in a sentence
            continue
        verb, flags = ours
        why = next((reason for sign, reason in LEFT_OUT.items() if sign in line.replace(f"proreflow {verb}", verb)), None)
        if why is None:
            end = run(verb, *trial(flags, model))
            ended.append(f"{end.code}  {page}: {line[:100]}")
            if end.code:
                wrong.append(f"{line}\n    {end.err.splitlines()[-1:]}")
        else:
            ended.append(f"-  {page}: {line[:100]}  ({why})")
    sys.stdout.write("\n".join(ended) + "\n")
    assert wrong == [], "\n".join(wrong)


def trial(flags: list[str], model: Path) -> list[str]:
    """The same flags for the tiny model: it has 4 and 2 windows, and needs few steps."""
    flags = [re.sub(r"^(--config\.model\.path)=.*(safetensors|owner/name|sd15)$", rf"\1={model}", flag) for flag in flags]
    flags = [
        flag.replace("stage-8", "stage-4").replace("--stage=8", "--stage=4").replace("--steps=25", "--steps=4")
        for flag in flags
    ]
    return [
        flag
        for flag in flags
        if not flag.startswith(
            (
                "--config.train.",
                "--config.pairs.",
                "--config.stages",
                "--config.export",
                "--config.data.",
                "--config.mesh",
                "--config.student",
            )
        )
    ]


def test_a_wrong_flag_would_be_noticed(monkeypatch):
    with pytest.raises(UserError, match="bach"):
        check_flags("distill", ["--config=digits", "--config.train.bach=3"], monkeypatch)
    with pytest.raises(ImportError):
        check_flags("distil", [], monkeypatch)
