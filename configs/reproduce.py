"""The paper's methods and their neighbours on the embedded digits model, at equal compute, over seeds: see docs/reproduce.md.

    python -m proreflow_jax.reproduce --config=configs/reproduce.py --workers=2         # hours; stop and go on as you like
    python -m proreflow_jax.reproduce --config=configs/reproduce.py:quick --workers=2   # under 20 minutes: five methods
    python -m proreflow_jax.distill --config=configs/reproduce.py:ProReflow-II          # one method by the verbs

A method is a set of fields in which it differs; all else is equal: data, network, optimizer, batch, seeds. Compute is counted
in forwards of the UNet on one image: a teacher's as they are, an update as three for each of its images (forward and backward).
Each stage of a method gets an equal share of it, and there `pair_share` goes to the teacher, the rest to updates.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.digits import get_config as digits

STEPS = 32  # of the diffusion teacher from noise to data, in every method [paper]
PAPER = {  # the paper's words where it has any
    "pairs.start": "data",  # a window starts at a noised image (PeRFlow, on which the paper builds)
    "pairs.teacher": "previous",  # the student of the stage before makes the pairs
    "pairs.substeps": 4,  # not in the paper: 32 steps of the 8-window student, as many as the diffusion teacher's
    "loss.space": "velocity",
    "loss.alpha": 1.0,  # not in the paper
    "loss.window_start_prob": 0.0,  # t is uniform
}


def method(*stages: int, **fields: Any) -> dict[str, Any]:
    """The paper's fields with these stages and whatever differs; block__field stands for block.field."""
    own = {name.replace("__", "."): value for name, value in fields.items()}
    return PAPER | {"stages": stages, "export.stages": stages, "pairs.steps": STEPS // stages[0]} | own


PLAIN = {"loss__alpha": 0.0}  # squared error of velocities alone
MATCHING = {"loss__space": "output", "loss__alpha": 0.0}  # PeRFlow's own: squared error of noises
DIFF = MATCHING | {"student__prediction": "diff_eps", "export__stages": ()}  # in PeRFlow's rescaled noise; no stock scheduler
FIRST = MATCHING | {"student__path": "first_order"}  # Rectified Diffusion's
AUTO = {"loss__balance": "auto"}
STARTS = {"loss__window_start_prob": 0.25}  # a quarter of the times is a window's start
TIMES = {"loss__window_start_prob": 1.0, "loss__start_steps": 4}  # only the times at which samplers of 2 and 4 steps stand
DIRECT = TIMES | AUTO | {"pairs__start": "noise"}  # one stage, whole trajectories of the base model, taught where it is asked

METHODS = (  # group, name, fields
    ("one window", "reflow-1", method(1, pairs__start="noise", **PLAIN)),
    ("one window", "2-reflow-guided", method(1, pairs__start="noise", pairs__guidance=2.0, **PLAIN)),
    ("PeRFlow", "PeRFlow-8-ddim_eps", method(8, **MATCHING)),
    ("PeRFlow", "PeRFlow-4-ddim_eps", method(4, **MATCHING)),
    ("PeRFlow", "PeRFlow-2-ddim_eps", method(2, **MATCHING)),
    ("PeRFlow", "PeRFlow-8-diff_eps", method(8, **DIFF)),
    ("PeRFlow", "PeRFlow-4-diff_eps", method(4, **DIFF)),
    ("PeRFlow", "PeRFlow-2-diff_eps", method(2, **DIFF)),
    ("PeRFlow", "PeRFlow-8-velocity", method(8, **PLAIN)),
    ("PeRFlow", "PeRFlow-4-velocity", method(4, **PLAIN)),
    ("PeRFlow", "PeRFlow-2-velocity", method(2, **PLAIN)),
    ("first-order path", "first-order-4", method(4, **FIRST)),
    ("first-order path", "first-order-2", method(2, **FIRST)),
    ("ProReflow", "ProReflow-I", method(8, 4)),
    ("ProReflow", "ProReflow-II", method(8, 4, 2)),
    ("ProReflow", "ProReflow-to-1", method(8, 4, 2, 1)),  # the paper could not finish it
    ("ablation", "PeRFlow-4-aligned", method(4)),  # the cells beside it: PeRFlow-4-velocity (neither) and ProReflow-I (both)
    ("ablation", "ProReflow-I-plain", method(8, 4, **PLAIN)),
    ("alpha", "ProReflow-II-alpha-0", method(8, 4, 2, loss__alpha=0.0)),
    ("alpha", "ProReflow-II-alpha-0.1", method(8, 4, 2, loss__alpha=0.1)),
    ("alpha", "ProReflow-II-alpha-0.3", method(8, 4, 2, loss__alpha=0.3)),
    ("alpha", "ProReflow-II-alpha-3", method(8, 4, 2, loss__alpha=3.0)),
    ("alpha", "ProReflow-II-alpha-10", method(8, 4, 2, loss__alpha=10.0)),
    ("alpha", "ProReflow-II-auto", method(8, 4, 2, **AUTO)),
    ("choices", "ProReflow-II-base-pairs", method(8, 4, 2, pairs__teacher="base")),
    ("choices", "ProReflow-II-noise", method(8, 4, 2, pairs__start="noise")),
    ("choices", "ProReflow-II-starts", method(8, 4, 2, **STARTS)),
    ("choices", "PeRFlow-4-starts", method(4, **PLAIN, **STARTS)),
    ("beyond", "direct-2", method(2, **DIRECT)),
    ("beyond", "direct-4", method(4, **DIRECT)),
    ("beyond", "direct-2-plain", method(2, **DIRECT | PLAIN | {"loss__balance": "fixed"})),
    ("beyond", "direct-2-half", method(2, **DIRECT | {"loss__window_start_prob": 0.5})),
    ("beyond", "direct-2-data", method(2, **DIRECT | {"pairs__start": "data"})),
    ("beyond", "direct-2-huber", method(2, **DIRECT | {"loss__huber": 0.2})),
    ("beyond", "direct-2-first-order", method(2, **DIRECT | {"student__path": "first_order"})),
    ("beyond", "direct-2-dpmpp", method(2, **DIRECT | {"pairs__solver": "dpmpp_2m", "pairs__steps": 8})),  # 16 steps, not 32
    ("beyond", "direct-2-pairs", method(2, **DIRECT | {"reproduce__pair_share": 0.5})),  # half of the compute for the teacher
)
EFFECTS = (  # what, a method, the one from which it differs in that
    ("velocities, not noises, are compared", "PeRFlow-4-velocity", "PeRFlow-4-ddim_eps"),
    ("ablation: aligned alone", "PeRFlow-4-aligned", "PeRFlow-4-velocity"),
    ("ablation: progressive alone", "ProReflow-I-plain", "PeRFlow-4-velocity"),
    ("ablation: both", "ProReflow-I", "PeRFlow-4-velocity"),
    ("a third stage", "ProReflow-II", "ProReflow-I"),
    ("a fourth stage", "ProReflow-to-1", "ProReflow-II"),
    ("the base model makes all pairs", "ProReflow-II-base-pairs", "ProReflow-II"),
    ("whole trajectories from noise", "ProReflow-II-noise", "ProReflow-II"),
    ("window starts, three stages", "ProReflow-II-starts", "ProReflow-II"),
    ("window starts, one stage", "PeRFlow-4-starts", "PeRFlow-4-velocity"),
    ("automatic alpha, not none", "ProReflow-II-auto", "ProReflow-II-alpha-0"),
    ("automatic alpha, not 0.1", "ProReflow-II-auto", "ProReflow-II-alpha-0.1"),
    ("automatic alpha, not 0.3", "ProReflow-II-auto", "ProReflow-II-alpha-0.3"),
    ("automatic alpha, not 1", "ProReflow-II-auto", "ProReflow-II"),
    ("automatic alpha, not 3", "ProReflow-II-auto", "ProReflow-II-alpha-3"),
    ("automatic alpha, not 10", "ProReflow-II-auto", "ProReflow-II-alpha-10"),
)
QUICK = ("PeRFlow-4-ddim_eps", "PeRFlow-4-velocity", "ProReflow-I", "ProReflow-II", "direct-2")


def get_config(form: str = "full") -> ConfigDict:
    """The grid, "full" or "quick"; or the demo's config as one of METHODS, by its name."""
    c = digits()
    table = {name: fields for _, name, fields in METHODS}
    if form not in ("full", "quick", *table):
        raise ValueError(f"{form!r} after configs/reproduce.py: must be full, quick, or one of {', '.join(table)}")
    c.name = {"full": "reproduce", "quick": "reproduce-quick"}.get(form, form)  # run folder below `root`
    c.train.batch = 32  # images of an update: at this compute many small updates beat few large ones
    c.evaluate.batch = 250  # images drawn at once; divides evaluate.examples
    if form in table:
        return _with(c, table[form])

    c.reproduce = ConfigDict()
    c.reproduce.forwards = 100_000 if form == "full" else 25_000  # of each method and seed, the teacher's included
    c.reproduce.pair_share = 1 / 3  # of a stage's forwards for the teacher
    c.reproduce.seeds = (0, 1, 2)  # of pairs, training and evaluation noise alike; at least two
    c.reproduce.steps = (1, 2, 4, 8)  # of the sampler; fewer than windows: read as a student of that many windows
    c.reproduce.methods = tuple(row for row in METHODS if form == "full" or row[1] in QUICK)  # rows of the table
    c.reproduce.references = ("ProReflow-II", "PeRFlow-4-ddim_eps")  # methods that the others are compared with
    shown = [row for row in EFFECTS if form == "full" or {*row[1:]} <= {*QUICK}]
    c.reproduce.effects = tuple(shown)  # rows of the table of choices: (what, method, the one from which it differs in that)
    return c


def _with(c: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """The config of one method alone; what only the grid knows is left out."""
    for field, value in fields.items():
        block, _, name = field.rpartition(".")
        if block != "reproduce":
            (c[block] if block else c)[name] = value
    last = c.stages[-1]
    c.evaluate.student_steps = (
        *((n, n) for n in c.stages),
        (last, 2 * last),
    )  # as many steps as windows; the last also in twice
    return c
