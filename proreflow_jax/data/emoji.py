"""Emoji pictures with captions: the dataset's two files, the wordings of a picture, and the pictures that are held out.

A picture is a concept ("waffle") in a style ("noto"). Captions and hold-outs depend on the picture's name alone, never on the
order of a dataset, so a rebuilt dataset has the same ones.
"""

import hashlib
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from proreflow_jax import MissingFile, UserError
from proreflow_jax.storage import atomic

HOLD_OUT = 0.1  # share of (concept, family of styles) pairs that training does not see
FAMILIES = {"fluent-3d": "fluent", "fluent-flat": "fluent"}  # near copies, held out together; any other style is its own
GROUPS = {  # the group of a concept, in words of a prompt
    "activities": "activity",
    "animals-nature": "nature",
    "component": "component",
    "flags": "flag",
    "food-drink": "food and drink",
    "objects": "object",
    "people-body": "person",
    "smileys-emotion": "smiley",
    "symbols": "symbol",
    "travel-places": "travel and places",
}
VOWEL_SOUND = re.compile(r"[aeiou](?!ni[cft]|ne\b|we\b|uro)|hour", re.IGNORECASE)  # "an octopus", "an hourglass", "a unicorn"
PLURAL = re.compile(r"(?<![suaio])s$|\b(?:people|men|women)$")  # "glasses", not "glass", "octopus", "canvas", "tennis"
BEHIND_NOUN = re.compile(r" (?:with|without|in|of|behind|on|from|over|blowing|holding|lifting|raising|showing)\b.*")
WORDINGS = (  # one of them is drawn each time a picture is seen; a line that stands twice is drawn twice as often
    "{thing}, {style} style",
    "{thing}, {style} style",
    "{thing}, {style} style",
    "{thing}, {style} style",
    "{name}, {style} style",
    "{name} in {style} style",
    "{style} emoji of {thing}",
    "{thing}, {first}, {style} style",
    "{group}: {name}, {style} style",
    "{first}, {second}, {style} style",
    "{thing}",
    "{thing}",
    "{thing}",
    "{name}",
    "{name}, {group}, {first}",
    "{second}, {first}",
)


class Concept(NamedTuple):
    """What a picture shows: code points in hex, a name, keywords, one of GROUPS."""

    hex: str
    label: str
    tags: tuple[str, ...]
    group: str


class Picture(NamedTuple):
    """A concept in a style."""

    concept: Concept
    style: str

    @property
    def name(self) -> str:
        """Such as "1f9c7/noto"; it decides hold-out and keywords."""
        return f"{self.concept.hex}/{self.style}"

    @property
    def family(self) -> str:
        """The styles that are held out together."""
        return FAMILIES.get(self.style, self.style)


class Emoji(NamedTuple):
    """A dataset in memory, one picture a row."""

    images: UInt8[np.ndarray, "n size size 3"]
    pictures: list[Picture]

    def take(self, rows: Bool[np.ndarray, " n"]) -> "Emoji":
        """The pictures where `rows` is True."""
        return Emoji(self.images[rows], [self.pictures[i] for i in np.flatnonzero(rows)])


def paths(folder: str | os.PathLike, size: int) -> tuple[Path, Path]:
    """The dataset's files of `size` pixels: pictures (.npz), and what they show, with credits (.json)."""
    stem = Path(folder).expanduser() / f"emoji{size}"
    return stem.with_suffix(".npz"), stem.with_suffix(".json")


def load_emoji(folder: str | os.PathLike, size: int, flag: str = "--config.data.path") -> Emoji:
    """Reads the dataset; `flag` names the folder, for messages.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: a file is damaged, or the two do not belong together.
    """
    arrays, table = paths(folder, size)
    for path in (arrays, table):
        if not path.is_file():
            raise MissingFile(f"{path} is missing: run `python -m proreflow_jax.make_emoji`, or set {flag}")
    try:
        with np.load(arrays, allow_pickle=False) as columns:
            images, style, concept = columns["images"], columns["style"], columns["concept"]
        info = atomic.read_json(table)
        concepts = [_concept(row) for row in info["concepts"]]
        pictures = [Picture(concepts[c], info["styles"][s]) for c, s in zip(concept, style, strict=True)]
    except (KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{arrays} and {table.name} are no emoji dataset ({atomic.one_line(error)}): make it anew") from error
    if images.shape != (len(pictures), size, size, 3) or images.dtype != np.uint8:
        raise UserError(f"{arrays} has images {images.dtype}{images.shape} for {len(pictures)} pictures of {size} pixels")
    return Emoji(images, pictures)


def _concept(row: dict[str, Any]) -> Concept:
    return Concept(row["hex"], row["label"], tuple(row["tags"]), row["group"])


def hold_out(pictures: Sequence[Picture]) -> Bool[np.ndarray, " n"]:
    """Which pictures training must not see: HOLD_OUT of the (concept, family) pairs, by hash.

    A concept is never held out as a whole: where the hash says so of all its families, the family with the largest stays.
    """
    families = defaultdict(set)
    for picture in pictures:
        families[picture.concept.hex].add(picture.family)
    hidden = {
        (code, family)
        for code, names in families.items()
        for family in names
        if _share(code, family) < HOLD_OUT and family != max(names, key=lambda name: (_share(code, name), name))
    }
    return np.array([(picture.concept.hex, picture.family) in hidden for picture in pictures], bool)


def _share(code: str, family: str) -> float:
    """A number in [0, 1) from a (concept, family) pair's name."""
    return int.from_bytes(hashlib.sha256(f"{code}/{family}".encode()).digest()[:8]) / 2**64


def wordings(picture: Picture) -> list[str]:
    """The captions of a picture, as many for each as WORDINGS has lines.

    Keywords are drawn by the picture's name, anew for each line, so that styles of one concept have differing ones.
    """
    name = plain_name(picture.concept.label)
    words = {"name": name, "thing": thing(name), "style": style_words(picture.style)}
    words["group"] = GROUPS.get(picture.concept.group, picture.concept.group)
    tags = [tag for tag in picture.concept.tags if tag != picture.concept.label] or [name]
    seed = np.frombuffer(hashlib.sha256(picture.name.encode()).digest(), np.uint32)
    raw = np.random.Philox(np.random.SeedSequence(seed.tolist())).random_raw(2 * len(WORDINGS)).reshape(-1, 2)
    pairs = [_two(tags, int(a), int(b)) for a, b in raw]
    return [line.format(first=one, second=two, **words) for line, (one, two) in zip(WORDINGS, pairs, strict=True)]


def prompt(picture: Picture, styled: bool = True) -> str:
    """The plainest caption: "a waffle, noto style", or "a waffle"."""
    text = thing(plain_name(picture.concept.label))
    return f"{text}, {style_words(picture.style)} style" if styled else text


def style_words(style: str) -> str:
    """A style's name as prompts have it: "fluent-3d" -> "fluent 3d"."""
    return style.replace("-", " ")


def plain_name(label: str) -> str:
    """A concept's name as it is spoken: "flag: Guernsey" -> "flag of Guernsey", "man: curly hair" -> "man with curly hair"."""
    kind, colon, rest = label.partition(": ")
    if not colon:
        return label
    join = {"flag": "of", "family": "of", "man": "with", "woman": "with", "person": "with"}.get(kind, "")
    return " ".join(part for part in (kind, join, rest) if part)


def thing(name: str) -> str:
    """A name with its article: "an octopus", "the flag of Guernsey"; none before a plural or a number."""
    if name.startswith("flag of "):
        return f"the {name}"
    if not name[0].isalpha() or PLURAL.search(BEHIND_NOUN.sub("", name)):
        return name
    return f"{'an' if VOWEL_SOUND.match(name) else 'a'} {name}"


def _two(tags: Sequence[str], a: int, b: int) -> tuple[str, str]:
    """Two keywords by two random numbers; different ones where there are two."""
    first = a % len(tags)
    second = (first + 1 + b % (len(tags) - 1)) % len(tags) if len(tags) > 1 else first
    return tags[first], tags[second]
