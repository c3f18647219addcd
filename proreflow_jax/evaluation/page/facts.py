"""A run as its page shows it, in one value. `jobs.run_facts` reads it from the run's files."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Line = Mapping[str, Any]  # of metrics.jsonl


class Drawing(NamedTuple):
    """What a student drew after so many steps."""

    step: int
    picture: str  # as data:, the student's half where the halves are known


class Stage(NamedTuple):
    """One stage of a run, as far as it is."""

    windows: int
    begun: bool  # whether its folder is there
    done: Mapping[str, Any]  # DONE.json; {}: the stage is not finished
    parent: str  # digest of the weights that it starts from; "": not known yet
    steps: int  # trained, of `total`
    total: int  # 0: not known
    lines: Sequence[Line] = ()
    drawings: Sequence[Drawing] = ()
    teacher: str = ""  # as data:, the base model's half; "": not known


class Table(NamedTuple):
    """An evaluation's table, every cell as text."""

    title: str
    heads: Sequence[str]
    better: Sequence[str]  # of each column "less", "more", or "": not compared
    cells: Sequence[Sequence[str]]
    compared: Sequence[int]  # rows of which the best is marked
    notes: Sequence[str] = ()
    picture: str = ""  # as data:; "": none


class Change(NamedTuple):
    """A config field that differs from its default."""

    field: str
    default: str
    value: str


class Run(NamedTuple):
    """All of the page."""

    name: str
    folder: str
    time: int | float  # of reading, in seconds since 1970
    fields: Mapping[str, Any]  # of the config, by dotted names
    progress: Mapping[str, Any] = {}  # progress.json
    stages: Sequence[Stage] = ()
    exports: Sequence[int] = ()  # windows of the exported students
    tables: Sequence[Table] = ()
    prompts: Sequence[str] = ()  # of the pictures, a row each
    halves: Mapping[str, Any] = {}  # samples.json: how both halves were drawn
    tile: int = 0  # pixels of one picture; 0: not known
    config_name: str = ""  # of the config that `changes` compares with
    changes: Sequence[Change] = ()
    disk: Mapping[str, int] = {}  # bytes by what they are
