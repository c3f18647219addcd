"""R10: bad inputs by the hundred, through a verb: one line, exit code 2, not a byte written.

The verb is `train` in a folder without pairs, which refuses even a good input: so whatever was spoilt, this is its end.
"""

import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from reliability import chance, number, report
from test_configs import flat
from verb import PROMPTS, run, tiny_config, tiny_flags

pytestmark = [pytest.mark.reliability, pytest.mark.usefixtures("quick")]
COUNT = number("INPUTS", 300)
FLAGS = (
    "nan",
    "-inf",
    "1e400",
    "-1",
    "0",
    "",
    "None",
    "[]",
    "()",
    "(1,",
    "{}",
    "True",
    "x" * 300,
    "0x10",
    "1_0",
    "ä",
    "\u202e",
    "'",
)
VALUES = (None, True, -1, 0, 1.5, 1e400, float("nan"), 10**30, "", "x", "4", [], [1], [[1]], {}, {"a": 1}, "\u0000", "../x")
JSON = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
JSON += ("tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "model_index.json")
GARBAGE = (
    b"",
    b"\x00" * 512,
    b"\x80\x04.",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"{" * 5000,
    b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ",
)

DATA_FILES = ("plan.json", "MANIFEST.json", "dataset_info.json", "features.json", "metadata.jsonl", "a.tar")


def bad_flag(rng: random.Random, model: Path, folder: Path) -> tuple[list[str], str]:
    field = rng.choice(sorted(flat(tiny_config(folder, model))))
    value = rng.choice(FLAGS)
    return [*tiny_flags(folder, model), f"--config.{field}={value}"], f"{field}={value[:20]}"


def bad_field(rng: random.Random, model: Path, folder: Path) -> tuple[list[str], str]:
    broken = Path(shutil.copytree(model, folder / "model"))
    path = broken / rng.choice(JSON)
    held = json.loads(path.read_text())
    name, value = rng.choice(sorted(held)), rng.choice(VALUES)
    path.write_text(json.dumps({**held, name: value}))
    return tiny_flags(folder, broken), f"{path.relative_to(broken)}: {name}={value!r:.20}"


def bad_file(rng: random.Random, model: Path, folder: Path) -> tuple[list[str], str]:
    broken = Path(shutil.copytree(model, folder / "model"))
    path = rng.choice(sorted(path for path in broken.rglob("*") if path.is_file()))
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        data = rng.choice(GARBAGE)
    else:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
    path.write_bytes(data)
    return tiny_flags(folder, broken), f"{path.relative_to(broken)}: {bytes(data[:20])!r}"


def bad_data(rng: random.Random, model: Path, folder: Path) -> tuple[list[str], str]:
    kind = rng.choice(["prompts", "webdataset", "parquet", "folder", "tfds", "cached"])
    path = folder / rng.choice(["data.txt", "data.tar", "data.parquet", "data"])
    path.write_bytes(rng.choice([*GARBAGE, rng.randbytes(600), "\n".join(PROMPTS).encode()]))
    if rng.random() < 0.3:
        path.unlink()
        path.mkdir()
        for name in rng.sample(
            ["plan.json", "MANIFEST.json", "dataset_info.json", "features.json", "metadata.jsonl", "a.tar"], 3
        ):
            (path / name).write_bytes(rng.choice(GARBAGE))
    return tiny_flags(folder, model, data__kind=kind, data__path=path), f"{kind} {path.name}"


MAKERS = (bad_flag, bad_field, bad_file, bad_data)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_whatever_is_bad_is_one_line_and_nothing_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, counts, wrong, longest = chance("R10"), Counter(), [], 0.0
    monkeypatch.chdir(tmp_path)
    for k in range(COUNT):
        folder = tmp_path / str(k)
        folder.mkdir()
        maker = rng.choice(MAKERS)
        words, what = maker(rng, model, folder)
        before, began = names(folder), time.monotonic()
        try:
            ended = run("train", *words, "--stage=4")
            lines = ended.err.splitlines()
            fault = "" if (ended.code, ended.out, len(lines)) == (2, "", 1) else f"code {ended.code}: {ended.err[-300:]}"
        except BaseException as error:  # a traceback for the user
            fault = f"{type(error).__name__}: {error!s:.300}"
        longest = max(longest, time.monotonic() - began)
        if extra := names(folder) - before:
            fault += f" wrote {sorted(extra)[:4]}"
        counts[maker.__name__] += 1
        if fault:
            wrong.append(f"{what}: {fault}")
        shutil.rmtree(folder)
    report("R10", inputs=COUNT, kinds=dict(counts), faults=len(wrong), longest_s=round(longest, 1))
    assert not wrong, "\n".join(wrong)
