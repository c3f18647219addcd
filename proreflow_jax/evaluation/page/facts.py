"""A run as its page shows it, in one value. `jobs.run_facts` reads it from the run's files."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Line = Mapping[str, Any]  # of metrics.jsonl


class Drawing(NamedTuple):
    """What a student drew after so many steps."""

    step: int
    picture: str  # as data:, the student's half where the halves are known


class Curves(NamedTuple):
    """A chart of one number of metrics.jsonl."""

    title: str
    number: str
    beyond_one: bool = False  # one minus the number
    note: str = ""


LOSS = Curves("loss", "loss")
COSINE = Curves("1 − cosine", "cosine", True, "of the student's and the teacher's velocity; 0: the same direction")


class Stage(NamedTuple):
    """One stage of a run, as far as it is; or one training of a base model."""

    windows: int  # 0: of a base model
    begun: bool  # whether its folder is there
    done: Mapping[str, Any]  # DONE.json; {}: the stage is not finished
    parent: str  # digest of the weights that it starts from; "": not known yet
    steps: int  # trained, of `total`
    total: int  # 0: not known
    lines: Sequence[Line] = ()
    drawings: Sequence[Drawing] = ()
    teacher: str = ""  # as data:, the base model's half; "": not known
    own_name: str = ""  # "": named by its windows
    curves: Sequence[Curves] = (LOSS, COSINE)
    sides: tuple[str, str] = ("base model", "student")  # of its pictures

    @property
    def name(self) -> str:
        """`stage 4`, or the name of its own."""
        return self.own_name or f"stage {self.windows}"


class Table(NamedTuple):
    """An evaluation's table, every cell as text; without heads its picture alone."""

    title: str
    heads: Sequence[str]
    better: Sequence[str]  # of each column "less", "more", or "": not compared
    cells: Sequence[Sequence[str]]
    compared: Sequence[int]  # rows of which the best is marked
    notes: Sequence[str] = ()
    picture: str = ""  # as data:; "": none
    best: Sequence[tuple[int, int]] | None = None  # (row, column) that is marked; None: by `better` and `compared`


class Change(NamedTuple):
    """A config field that differs from its default."""

    field: str
    default: str
    value: str


class Box(NamedTuple):
    """A thing in the drawing of the lineage."""

    title: str
    words: str
    digest: str = ""  # of its weights; "": not known
    fault: str = ""
    kind: str = "done"  # "done", "begun" or "waiting"


class Series(NamedTuple):
    """One curve of a chart."""

    name: str
    points: Sequence[tuple[int | float, int | float]]
    colour: int  # -1: the mean, in the text's colour
    spreads: Sequence[int | float] = ()  # of each point, up and down; (): not known


class Panel(NamedTuple):
    """A chart of numbers that are no steps of a training."""

    title: str
    series: Sequence[Series]
    ticks: Mapping[int | float, str]  # labels below it; the last is its end
    note: str = ""


class Study(NamedTuple):
    """What `evaluate --study` measured."""

    panels: Sequence[Panel]
    tables: Sequence[Table]
    notes: Sequence[str]


class Run(NamedTuple):
    """All of the page."""

    name: str
    folder: str
    time: int | float  # of reading, in seconds since 1970
    fields: Mapping[str, Any]  # of the config, by dotted names
    progress: Mapping[str, Any] = {}  # progress.json; `under_way`: names of what several processes do now
    stages: Sequence[Stage] = ()
    exports: Sequence[int] = ()  # windows of the exported students
    tables: Sequence[Table] = ()
    prompts: Sequence[str] = ()  # of the pictures, a row each
    halves: Mapping[str, Any] = {}  # samples.json: how both halves were drawn
    tile: int = 0  # pixels of one picture; 0: not known
    config_name: str = ""  # of the config that `changes` compares with
    changes: Sequence[Change] = ()
    disk: Mapping[str, int] = {}  # bytes by what they are
    study: Study | None = None
    panels: Sequence[Panel] = ()  # curves beside those of the stages
    boxes: Sequence[Box] = ()  # the lineage, where the stages do not say it
    counted: Sequence[tuple[str, str]] = ()  # costs that the job itself counted: (title, in words)
    pictured: str = ""  # how the pictures were drawn, in a sentence; "": as `halves` says
