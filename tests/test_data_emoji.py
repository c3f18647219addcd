"""The emoji: captions and hold-outs by name, the dataset's files, and its making from tiny packages without a network."""

import io
import json
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from proreflow_jax.data import emoji, emoji_packages, emoji_pairs, training_set
from proreflow_jax.data.emoji import Concept, Picture

WAFFLE = Concept("1f9c7", "waffle", ("breakfast", "sweet"), "food-drink")
STYLES = [one.name for one in emoji_packages.STYLES]


def pictures(count: int = 3000) -> list[Picture]:
    """Every concept in all styles."""
    return [Picture(Concept(f"{i:x}", f"thing {i}", (), "objects"), style) for i in range(count) for style in STYLES]


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("waffle", "a waffle"),
        ("octopus", "an octopus"),
        ("unicorn", "a unicorn"),
        ("women holding hands", "women holding hands"),
        ("glasses", "glasses"),
        ("face with hearts", "a face with hearts"),
        ("glass", "a glass"),
        ("flag: Guernsey", "the flag of Guernsey"),
        ("woman: curly hair", "a woman with curly hair"),
        ("keycap: 7", "a keycap 7"),
        ("1st place medal", "1st place medal"),
    ],
)
def test_names_are_spoken(label, text):
    assert emoji.thing(emoji.plain_name(label)) == text


def test_a_picture_has_captions_with_and_without_its_style():
    lines = emoji.wordings(Picture(WAFFLE, "fluent-3d"))
    assert len(lines) == len(emoji.WORDINGS)
    assert {"a waffle, fluent 3d style", "a waffle", "food and drink: waffle, fluent 3d style"} <= set(lines)
    assert any("breakfast" in line for line in lines)
    styled = sum("fluent 3d" in line for line in lines)
    assert len(lines) / 2 < styled < len(lines) - 3
    assert emoji.prompt(Picture(WAFFLE, "noto")) == lines[0].replace("fluent 3d", "noto")
    assert emoji.prompt(Picture(WAFFLE, "noto"), styled=False) == "a waffle"


def test_captions_depend_on_the_name_alone():
    assert emoji.wordings(Picture(WAFFLE, "noto")) == emoji.wordings(Picture(WAFFLE, "noto"))
    odd = Picture(Concept("0023", "hash", (), "symbols"), "noto")  # without keywords
    assert all(line.strip() for line in emoji.wordings(odd))


def test_a_tenth_is_held_out_whatever_the_order_and_every_concept_stays():
    all_of_them = pictures()
    mask = emoji.hold_out(all_of_them)
    assert 0.08 < mask.mean() < 0.12
    order = np.random.default_rng(0).permutation(len(all_of_them))
    np.testing.assert_array_equal(emoji.hold_out([all_of_them[i] for i in order]), mask[order])
    assert {p.concept.hex for p, out in zip(all_of_them, mask, strict=True) if not out} == {p.concept.hex for p in all_of_them}


def test_both_fluent_styles_are_held_out_together():
    all_of_them = pictures()
    mask = emoji.hold_out(all_of_them)
    by_name = {p.name: bool(out) for p, out in zip(all_of_them, mask, strict=True)}
    pairs = [(by_name[f"{i:x}/fluent-3d"], by_name[f"{i:x}/fluent-flat"]) for i in range(3000)]
    assert all(a == b for a, b in pairs) and any(a for a, _ in pairs)


def test_a_concept_in_one_style_alone_is_never_held_out():
    assert not emoji.hold_out([Picture(Concept(f"{i:x}", "x", (), "objects"), "noto") for i in range(500)]).any()


# --- the dataset made from packages -----------------------------------------------------------------------------------

CODES = ("1F9C7", "1F419", "0023-FE0F-20E3")
LABELS = ("waffle", "octopus", "keycap: #")


def png(colour: str, size: tuple[int, int] = (64, 64), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", size, colour).save(file, kind)
    return file.getvalue()


def package(cache: Path, name: str, version: str, members: dict) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz", "w:gz") as tar:
        for path, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            item = tarfile.TarInfo(f"package/{path}")
            item.size = len(data)
            tar.addfile(item, io.BytesIO(data))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder with all packages, tiny: three concepts, of which SVG sets have one or two."""
    folder = tmp_path / "npm"
    rows = [{"hexcode": code, "label": label, "tags": ["tag"], "group": 0} for code, label in zip(CODES, LABELS, strict=True)]
    unknown = [{"hexcode": "1FAEA", "label": "too new", "group": 0}, {"hexcode": "1F1E6", "label": "a letter"}]
    codes = {f"en/shortcodes/{name}.json": {"1F419": ["eight_arms"]} for name in emoji_packages.SHORTCODES}
    captions = {"en/data.json": rows + unknown, "meta/groups.json": {"groups": {"0": "food-drink"}}, **codes}
    package(folder, *emoji_packages.CAPTIONS, captions)
    icon = {"body": '<rect width="8" height="16" fill="#00f"/>'}
    for style in emoji_packages.STYLES:
        if style.package.startswith("@iconify-json/"):
            by_code = style.name == "fluent-flat"
            icons = {"width": 16, "height": 16, "icons": {"eight-arms": icon, "keycap-pound": icon}}
            members = {"icons.json": icons, "chars.json": {"1f419": "eight-arms"} if by_code else {}}
        elif style.name == "fluent-3d":
            members = {"assets/1f9c7.webp": png("#ff000080", (128, 64), "WEBP")}
        else:
            members = {f"img/x/64/{code.lower()}.png": png("green") for code in CODES}
            members |= {"emoji.json": [{"unified": code} for code in CODES], "img/x/64/1f44d-1f3fb.png": png("red")}
        package(folder, style.package, style.version, members)
    return folder


def test_the_dataset_is_made_from_packages(tmp_path, cache):
    pytest.importorskip("resvg_py")
    folder = tmp_path / "data"
    assert emoji_packages.make(folder, cache, 16) == 12
    dataset = emoji.load_emoji(folder, 16)
    names = [picture.name for picture in dataset.pictures]
    assert [name for name in names if "1f9c7" in name] == ["1f9c7/noto", "1f9c7/twemoji", "1f9c7/fluent-3d"]
    assert [name.split("/")[1] for name in names if "1f419" in name][2:] == ["fluent-flat", "noto-v1", "fxemoji", "emojione"]
    assert "0023-fe0f-20e3/emojione" in names  # by exception
    image = dict(zip(names, dataset.images, strict=True))
    assert (image["1f9c7/noto"] == (0, 128, 0)).all()
    half = image["1f9c7/fluent-3d"]  # a wide picture: white above and below
    assert (half[0] == 255).all() and np.abs(half[8, 8].astype(int) - (255, 127, 127)).max() < 4
    blue = image["1f419/noto-v1"]
    assert tuple(blue[8, 3]) == (0, 0, 255) and tuple(blue[8, 12]) == (255, 255, 255)
    info = json.loads((folder / "emoji16.json").read_text())
    assert {row["licence"] for row in info["credits"]} == {"Apache-2.0", "CC-BY-4.0", "MIT"}
    assert all(row["author"] in emoji_packages.credits_table() for row in info["credits"])


def test_groups_are_what_the_whole_has_of_them(tmp_path, cache, monkeypatch):
    pytest.importorskip("resvg_py")
    emoji_packages.make(tmp_path / "whole", cache, 16)
    real = emoji_packages.read_concepts

    def read(*archives: Path) -> tuple[list, dict]:
        concepts, names = real(*archives)
        return [one | {"group": "objects"} if one["label"] == "waffle" else one for one in concepts], names

    monkeypatch.setattr(emoji_packages, "read_concepts", read)
    assert emoji_packages.make(tmp_path / "part", cache, 16, ["food-drink"]) == 9
    whole, part = (emoji.load_emoji(tmp_path / name, 16) for name in ("whole", "part"))
    theirs = whole.take(np.array([picture.concept.label != "waffle" for picture in whole.pictures]))
    assert theirs.pictures == part.pictures
    np.testing.assert_array_equal(theirs.images, part.images)


def test_npm_is_asked_once(tmp_path, monkeypatch):
    calls = []

    def npm(command, **_):
        calls.append(command)
        package(tmp_path, "@a/b", "1.0.0", {})

    monkeypatch.setattr(subprocess, "run", npm)
    assert emoji_packages.fetch(tmp_path, "@a/b", "1.0.0") == emoji_packages.fetch(tmp_path, "@a/b", "1.0.0")
    assert len(calls) == 1 and calls[0][-1] == "@a/b@1.0.0" and "--ignore-scripts" in calls[0]


@pytest.mark.parametrize(
    ("error", "words"),
    [(FileNotFoundError(), "npm is not installed"), (subprocess.CalledProcessError(1, "npm", stderr="404\nno"), "404 no")],
)
def test_a_package_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch, error, words):
    def npm(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", npm)
    with pytest.raises(ValueError, match=words) as caught:
        emoji_packages.fetch(tmp_path, "a", "1")
    assert "\n" not in str(caught.value)


def test_a_damaged_package_or_dataset_is_one_line(tmp_path):
    (tmp_path / "a.tgz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"a\.tgz is damaged"):
        emoji_packages.read_members(tmp_path / "a.tgz", bool)
    with pytest.raises(FileNotFoundError, match="make_emoji"):
        emoji.load_emoji(tmp_path, 64)
    np.savez(tmp_path / "emoji64.npz", images=np.zeros((1, 8, 8, 3), np.uint8), style=[0], concept=[0])
    (tmp_path / "emoji64.json").write_text(json.dumps({"styles": ["noto"], "concepts": [WAFFLE._asdict()]}))
    with pytest.raises(ValueError, match="64 pixels"):
        emoji.load_emoji(tmp_path, 64)
    (tmp_path / "emoji64.npz").write_bytes((tmp_path / "emoji64.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match="no emoji dataset"):
        emoji.load_emoji(tmp_path, 64)


def test_pairs_to_judge_by_are_the_same_in_any_order_and_do_not_meet():
    rows = pictures(400)
    order = np.random.default_rng(0).permutation(len(rows))
    chosen, moved = (emoji_pairs.choose_pairs(each, 50) for each in (rows, [rows[i] for i in order]))
    hidden = emoji.hold_out(rows)
    for name, held in (("seen", False), ("held-out", True)):
        pairs = chosen[name]
        assert len(pairs.rows) == len(pairs.others) == len({*pairs.rows, *pairs.others}) / 2 == 50
        np.testing.assert_array_equal(hidden[[*pairs.rows, *pairs.others]], held)
        assert [rows[i].name for i in pairs.rows] == [rows[order[i]].name for i in moved[name].rows]
    fewer = emoji_pairs.choose_pairs(rows, 20)["seen"].rows
    np.testing.assert_array_equal(fewer, chosen["seen"].rows[:20])


def test_a_concept_of_one_family_is_not_judged():
    alone = [
        Picture(Concept(f"a{i:x}", "x", (), "objects"), style) for i in range(50) for style in ("fluent-3d", "fluent-flat")
    ]
    chosen = emoji_pairs.choose_pairs(pictures(100) + alone, 10_000)
    assert len(chosen["seen"].rows) + len(chosen["held-out"].rows) == len(pictures(100))
    with pytest.raises(ValueError, match="make_emoji"):
        emoji_pairs.choose_pairs(alone, 10)


def test_labels_number_concepts_families_and_groups():
    rows = pictures(3)
    labels = emoji_pairs.labels_of(rows)
    assert len(set(labels.concept)) == 3 and len(set(labels.family)) == len({one.family for one in rows})
    assert all(len({labels.family[i] for i, one in enumerate(rows) if one.style == style}) == 1 for style in STYLES)


def test_known_prompts_are_those_of_pictures_that_training_saw(tmp_path):
    arrays, table = emoji.paths(tmp_path, 8)
    concepts = [WAFFLE._replace(hex=f"{i:x}", label=f"thing {i}")._asdict() for i in range(40)]
    style, concept = np.repeat([0, 1], 40), np.tile(np.arange(40), 2)
    np.savez(arrays, images=np.zeros((80, 8, 8, 3), np.uint8), style=style, concept=concept)
    table.write_text(json.dumps({"styles": ["noto", "twemoji"], "concepts": concepts}))
    dataset = emoji.load_emoji(tmp_path, 8)
    hidden = emoji.hold_out(dataset.pictures)
    lines = training_set.known_prompts(SimpleNamespace(kind="emoji", path=str(tmp_path), resolution=8))
    assert hidden.sum() > 0 and len(lines) == (~hidden).sum()
    for i, (line, row) in enumerate(zip(lines, np.flatnonzero(~hidden), strict=True)):
        assert line == emoji.wordings(dataset.pictures[row])[i % len(emoji.WORDINGS)]
    assert training_set.known_prompts(SimpleNamespace(kind="digits")) == []
