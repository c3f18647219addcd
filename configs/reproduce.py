"""The paper's methods and their neighbours on the embedded digits model, at equal compute, over seeds: see docs/reproduce.md.

    proreflow reproduce --config=reproduce --workers=2         # hours; stop and go on as you like
    proreflow reproduce --config=reproduce:quick --workers=2   # under 20 minutes: five methods
    proreflow reproduce --config=reproduce:curves --workers=2  # hours: the main rows at budgets of a factor of 30
    proreflow reproduce --config=reproduce:flow --workers=2    # beyond UNets: the MMDiT of digits_flow_base
    proreflow distill --config=reproduce:ProReflow-II          # one method by the verbs; of the MMDiT flow-ProReflow-II

A method is a set of fields in which it differs; all else is equal: data, network, optimizer, batch, seeds. Compute is counted
in forwards of the network on one image: a teacher's as they are, an update as three for each of its images (both ways).
Each stage of a method gets an equal share of it, and there `pair_share` goes to the teacher, the rest to updates.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from configs.common import optimizer, stable_diffusion
from configs.digits import get_config as digits
from configs.digits_flow import get_config as digits_flow

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
CHAIN = {  # the new chain's four settings, each with the paper's beside it
    "all-starts": {"loss.window_start_prob": 1.0},  # taught at window starts alone; uniform
    "one-step": {"pairs.substeps": 1},  # one Euler step a window where a student makes pairs; four
    "noise": {"pairs.start": "noise"},  # whole trajectories; one window from noised data
    "auto": {"loss.balance": "auto"},  # alpha in units of each target; as it is
}
PAPER_ALL = PAPER | {"loss.balance": "fixed"}
ALL = {field: value for fields in CHAIN.values() for field, value in fields.items()}
BUDGETS = (100_000, 1_000_000)  # of every row of the lab
MORE, MOST = (300_000, 3_000_000), (10_000_000,)  # of its main rows beside these, and of a few
MAIN = ("reflow-1", "PeRFlow-4-ddim_eps", "PeRFlow-4-velocity", "PeRFlow-4-aligned", "ProReflow-I-plain", "ProReflow-I",
        "ProReflow-II", "direct-2", "chain")  # fmt: skip

LONGEST = ("PeRFlow-4-velocity", "ProReflow-II", "direct-2", "chain")


def _lab_methods() -> list[tuple]:
    chain = method(8, 4, 2) | ALL
    rows = [row for row in METHODS if row[1] in (*MAIN, "PeRFlow-4-diff_eps")]
    rows += [("new chain", "chain", chain)]
    rows += [("one setting more", f"ProReflow-II-{name}", method(8, 4, 2) | fields) for name, fields in CHAIN.items()]
    rows += [
        ("one setting less", f"chain-without-{name}", chain | {field: PAPER_ALL[field] for field in fields})
        for name, fields in CHAIN.items()
    ]
    rows += [
        ("starts", f"chain-starts-{p}", chain | {"loss.window_start_prob": p, "reproduce.budgets": (1_000_000,)})
        for p in (0.25, 0.5)
    ]
    rows.append(("starts", "chain-to-4", chain | {"loss.start_steps": 4}))  # what configs/common.py gives SD
    budgets = lambda name: {"reproduce.budgets": BUDGETS + MORE * (name in MAIN) + MOST * (name in LONGEST)}
    return [(group, name, budgets(name) | fields) for group, name, fields in rows]


LAB_EFFECTS = (
    ("PeRFlow's rescaled noise, not ddim_eps", "PeRFlow-4-diff_eps", "PeRFlow-4-ddim_eps"),
    ("PeRFlow against the teacher", "PeRFlow-4-velocity", "teacher"),
    ("ProReflow-II against one-window reflow", "ProReflow-II", "reflow-1"),
    ("ProReflow-II against PeRFlow", "ProReflow-II", "PeRFlow-4-ddim_eps"),
    *((f"{name}, added to ProReflow-II", f"ProReflow-II-{name}", "ProReflow-II") for name in CHAIN),
    *((f"{name}, left out of the chain", f"chain-without-{name}", "chain") for name in CHAIN),
    ("a quarter of the times at starts, not all", "chain-starts-0.25", "chain"),
    ("half of the times at starts, not all", "chain-starts-0.5", "chain"),
    ("the times of 4 steps, too", "chain-to-4", "chain"),
    ("the four together", "chain", "ProReflow-II"),
    ("the chain against one stage", "chain", "direct-2"),
)
CURVES = ("reflow-1", "PeRFlow-4-ddim_eps", "PeRFlow-4-velocity", "ProReflow-I", "ProReflow-II", "direct-2", "chain")
LAB_FIGURES = (
    ("curves.png", CURVES),
    ("settings.png", ("ProReflow-II", *(f"ProReflow-II-{name}" for name in CHAIN), *(f"chain-without-{name}" for name in CHAIN),
                      "chain")),
)  # fmt: skip
FLOW = ("reflow-1", "PeRFlow-4-velocity", "direct-2", "ProReflow-II", "chain")  # of velocities alone
FLOW_EFFECTS = (
    ("windows, not one", "PeRFlow-4-velocity", "reflow-1"),
    ("ProReflow-II against one-window reflow", "ProReflow-II", "reflow-1"),
    ("ProReflow-II against PeRFlow", "ProReflow-II", "PeRFlow-4-velocity"),
    ("the chain against one stage", "chain", "direct-2"),
)
QUICK = ("PeRFlow-4-ddim_eps", "PeRFlow-4-velocity", "ProReflow-I", "ProReflow-II", "direct-2")
CURVED = ("PeRFlow-4-velocity", "ProReflow-II", "chain")
FACTOR_30 = (10_000, 30_000, 100_000, 300_000)  # forwards of the digits' curves


def get_config(form: str = "full") -> ConfigDict:
    """The digits' grid, "full", "quick" or "curves"; "flow", that of their MMDiT; "lab", the fastest; or one method's name.

    A method's name gives the demo's config as that method; behind "flow-" the MMDiT's.
    """
    if form == "lab":
        return _lab()
    table = {name: fields for _, name, fields in (*_lab_methods(), *METHODS)}
    flows = {f"flow-{name}": table[name] for name in FLOW}
    forms = {form: f"reproduce-{form}" for form in ("quick", "curves", "flow")} | {"full": "reproduce"}
    if form not in (*forms, *table, *flows):
        known = ", ".join((*table, *flows))
        raise ValueError(f"{form!r} after configs/reproduce.py: must be full, quick, curves, lab, flow, or one of {known}")
    c = digits_flow() if form == "flow" or form in flows else digits()
    c.name = forms.get(form, form)  # run folder below `root`
    c.train.batch = 32  # images of an update: at this compute many small updates beat few large ones
    c.evaluate.batch = 250  # images drawn at once; divides evaluate.examples
    if form not in forms:
        return _with(c, (table | flows)[form])
    if form in ("flow", "curves"):
        names, effects, references = {
            "flow": (FLOW, FLOW_EFFECTS, ("ProReflow-II", "reflow-1")),
            "curves": (CURVED, LAB_EFFECTS, ("ProReflow-II",)),
        }[form]
        rows = {row[1]: row for row in (*_lab_methods(), *METHODS) if row[1] in names}
        _grid(c, [(group, name, _unbudgeted(fields)) for group, name, fields in rows.values()], (*EFFECTS, *effects))
        c.reproduce.references = references  # methods that the others are compared with
    else:
        _grid(c, [row for row in METHODS if form == "full" or row[1] in QUICK], EFFECTS)
    if form == "curves":
        c.pairs.batch = 32  # trajectories computed at once; few, for a chain's three stages at the smallest budget
    budgets = {"quick": (25_000,), "flow": (50_000,), "curves": FACTOR_30}.get(form, (100_000,))
    c.reproduce.budgets = budgets  # forwards of a method and seed, the teacher's included
    return c


def _unbudgeted(fields: dict[str, Any]) -> dict[str, Any]:
    """A method of the lab at the grid's own budgets."""
    return {field: value for field, value in fields.items() if field != "reproduce.budgets"}


def _grid(c: ConfigDict, methods: Sequence[tuple], effects: Sequence[tuple]) -> None:
    """The block `reproduce` but for the budgets."""
    names = {name for _, name, _ in methods}
    c.reproduce = ConfigDict()
    c.reproduce.budgets = ()  # forwards of each method and seed, the teacher's included; a method may have others
    c.reproduce.pair_share = 1 / 3  # of a stage's forwards for the teacher
    c.reproduce.seeds = (0, 1, 2)  # of pairs, training and evaluation noise alike; at least two
    c.reproduce.steps = (1, 2, 4, 8)  # of the sampler; fewer than windows: read as a student of that many windows
    c.reproduce.chunk = 1  # updates in one call; more only where a network has no convolutions, which loops make slow on CPUs
    c.reproduce.methods = tuple(methods)  # rows of the table
    c.reproduce.baseline = "PeRFlow-4-velocity"  # must beat the teacher at 4 steps where a claim is made: the gate
    c.reproduce.references = ("ProReflow-II", "PeRFlow-4-ddim_eps")  # methods that the others are compared with
    shown = {row[1:]: row for row in effects if {*row[1:]} <= {*names, "teacher"}}
    c.reproduce.effects = tuple(
        shown.values()
    )  # rows of the table of choices: (what, method, the one from which it differs in that)
    c.reproduce.figures = (("curves.png", tuple(n for n in CURVES if n in names)),)  # of quality over cost: (file, methods)


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


def _lab() -> ConfigDict:
    """A mixture of Gaussians and a small network, by the same code: a million forwards are 20 seconds of a CPU."""
    c = stable_diffusion("lab")  # run folder below `root`
    c.model.path = ""  # the base model is trained by the lab, block `lab`, and kept in the run's folder
    c.model.dtype = "float32"  # of the student's computation
    c.model.teacher_dtype = "float32"  # of the teacher's computation
    c.model.sampling_dtype = "float32"  # of sampling; nothing is decoded
    c.data.kind = "mixture"  # drawn where it is needed
    c.data.resolution = 1  # a picture is one vector
    c.data.threads = 1  # none is needed
    c.student.prediction = "ddim_eps"  # prediction type, as of SD
    c.pairs.examples = 128  # not looked at: budgets say how many
    c.pairs.shard_size = 128  # not looked at
    c.pairs.batch = 128  # trajectories computed at once; small, so that small budgets hold some
    c.pairs.storage = "float32"  # not looked at
    c.loss.balance = "fixed"  # alpha as it is [paper]; a method may have "auto"
    c.loss.start_steps = 0  # of more steps than windows: all times of a sampler of so many steps count as starts
    c.train.steps = 1000  # not looked at: budgets say how many
    c.train.batch = 64  # examples of an update
    c.train.accumulation = 1  # parts a batch is computed in
    c.train.ema = 0.99  # decay of the averaged weights, which are handed on
    c.train.remat = "none"  # memory is no matter here
    c.optimizer = optimizer(learning_rate=1e-3, warmup_steps=20)  # the digits' own
    c.mesh.fsdp = 1  # devices that share one state: there is one device
    c.evaluate.examples = 8192  # samples of each row and seed
    c.evaluate.teacher_steps = (64, 32, 16, 8, 4, 2, 1)  # of the base model; the first is the reference of distances

    _grid(c, _lab_methods(), (*EFFECTS, *LAB_EFFECTS))
    c.reproduce.budgets = tuple(sorted(BUDGETS + MORE + MOST))  # forwards; each method says which
    c.reproduce.steps = (1, 2, 4, 8)  # of the sampler
    c.reproduce.chunk = 20  # updates in one call: half the time of single ones
    c.reproduce.references = ("ProReflow-II",)  # methods that the others are compared with
    c.reproduce.figures = LAB_FIGURES  # (file, methods)

    c.lab = ConfigDict()
    c.lab.classes = 10  # equally likely; a prompt names one
    c.lab.components = 6  # Gaussians of a class
    c.lab.dimensions = 16  # of an example
    c.lab.mixture_seed = 11  # decides the mixture
    c.lab.width = 128  # of the network: 0.23 M weights
    c.lab.blocks = 3  # residual blocks
    c.lab.time_features = 64  # sines and cosines
    c.lab.schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # Stable Diffusion's
    c.lab.steps = 6000  # updates of the base model
    c.lab.batch = 256  # fresh examples of an update
    c.lab.ema = 0.999  # decay of the averaged weights
    c.lab.prompt_dropout = 0.1  # share of empty prompts
    c.lab.seed = 5  # of the base model
    c.lab.optimizer = optimizer(learning_rate=2e-3, warmup_steps=200)  # as far as 6,000 updates allow
    return c
