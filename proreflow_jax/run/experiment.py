"""An opened run as one value, built in `run.open`; where weights come from, and what a stage may not change under way."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data import record_plan
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.models.network import Params
from proreflow_jax.pretrained import lora_factors
from proreflow_jax.pretrained.pipeline import Pipeline
from proreflow_jax.reflow.pairs import Frozen, Networks
from proreflow_jax.reflow.train_step import TrainState, averaged
from proreflow_jax.run import dataset, taught
from proreflow_jax.run.stages import DONE, Done, Stage, read_done, seed_key
from proreflow_jax.run.text_states import host_context, spares_encoders
from proreflow_jax.run.train_state import StateLayout, beside_trained, trainable, whole_weights
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.checkpoint import Checkpoints
from proreflow_jax.runtime.damage import Damaged
from proreflow_jax.runtime.digest import digest, fold
from proreflow_jax.runtime.processes import first_reads
from proreflow_jax.storage.paths import Location

FREE = (  # fields that a resumed stage may change, beside those of `dataset.FREE`
    "model.path", "model.student", "model.revision", "model.like", "model.vae", "model.attention",
    "train.remat", "train.log_every",
    *dataset.FREE,
)  # fmt: skip
YOUNG = {"model.clip_skip": 0, "train.groups": 1}  # fields that older plans lack, with the value that changes nothing
PLANNED = ("pairs", "student", "data", "model", "conditioning")  # blocks of the config that pairs depend on
TRAINED = (*PLANNED, "loss", "train", "optimizer")  # blocks that a student depends on


class BaseDenoiser:
    """The base model's denoiser on its devices: read when asked for, kept until it is freed, read again if asked again."""

    def __init__(self, read: Callable[[], Params], read_constants: Callable[[], Params] = dict) -> None:
        self._read, self._read_constants = read, read_constants
        self._params, self._digest = None, ""

    def params(self) -> Params:
        """The weights by torch names, float32."""
        if self._params is None:
            self._params = self._read()
        return self._params

    def beside(self, layout: StateLayout) -> Params:
        """`beside_trained`, of which the constants alone are read alone where the weights are not in memory."""
        alone = self._params is None and not layout.scale
        return beside_trained(layout, self._read_constants() if alone else self.params())

    def digest(self) -> str:
        """The digest of the weights, worked out once."""
        self._digest = self._digest or fold(digest(self.params()))
        return self._digest

    def free(self) -> None:
        """Drops the weights; their memory is free once no caller holds them."""
        self._params = None


class Experiment(NamedTuple):
    """What every job works with."""

    config: ConfigDict
    run: Location  # the run's folder
    base: Pipeline  # all of the base model but the denoiser's weights
    denoiser: BaseDenoiser
    networks: Networks
    flow: Parameterization  # of the base model
    stages: list[Stage]
    layout: StateLayout
    mesh: Mesh
    identity: Callable[[], dict[str, str]]  # `base_identity` of the base model, worked out once


class Weights(NamedTuple):
    """A network that is handed on: how it is parameterized, and the digest that lineage is made of."""

    params: Params
    flow: Parameterization
    digest: str  # of what was trained: the weights, or their factors
    factors: Params = {}  # low-rank, relative to the base model, where only these were trained


def guidance_contract(config: ConfigDict) -> dict[str, Any]:
    """What a student learned of classifier-free guidance; kept with its checkpoints, in DONE.json and with every export.

    teacher: scale of the base model as the teacher; other than 1 it is part of the student from the first stage on.
    prompt_dropout: share of examples with the empty prompt, for teacher and student alike.
    unconditional: whether the student was trained on the empty prompt, the second branch of guidance.
    recommended: lowest and highest scale to draw with, reasoned (`why`), not measured.
    """
    scale, dropped = config.pairs.guidance, config.pairs.prompt_dropout
    recommended, why = [1.0, 7.0], "both branches were trained; the paper sweeps 2 to 7"
    if not dropped:
        recommended, why = [1.0, 1.0], "it never saw the empty prompt"
    elif scale != 1:
        recommended, why = [1.0, 2.5], "the teacher's guidance is in it: more is guidance twice"
    branch = "shared" if dropped else "untrained"
    return dict(teacher=scale, prompt_dropout=dropped, unconditional=branch, recommended=recommended, why=why)


def load_weights(experiment: Experiment, stage: Stage | None) -> Weights:
    """The finished student of a stage (its average where there is one), or the base model for None.

    Raises MissingFile if the stage is not done, UserError if its weights are damaged or not those its DONE.json names; and as
    `check_taught`.
    """
    if stage is None:
        return Weights(experiment.denoiser.params(), experiment.flow, experiment.denoiser.digest())
    done, layout = read_done(stage), experiment.layout
    check_taught(experiment, stage)
    try:
        trained = finished_weights(experiment, stage, done)
    except (Damaged, MissingFile) as error:
        again = f"distill, or train --stage={stage.windows}, goes back to the newest good step and trains the rest again"
        raise UserError(f"{error}: {again}") from None
    return Weights(_whole(experiment, trained), done.flow, done.digest, trained if layout.scale else {})


def newest_weights(experiment: Experiment, stage: Stage) -> tuple[Weights, int]:
    """The student of a stage as far as it is trained, and its steps: as `load_weights` if it is finished, else the newest step.

    Raises MissingFile if there is no step, UserError if none is good or another stage or run has saved it; as `check_taught`.
    """
    if first_reads(stage.done.is_file):
        return load_weights(experiment, stage), read_done(stage).step
    layout = experiment.layout
    try:
        check_taught(experiment, stage)
        with Checkpoints(stage.folder / "checkpoints", read_only=True) as checkpoints:
            restored = checkpoints.restore(None, _weights_alone(layout), part=True)
    except MissingFile:
        job = f"distill, or train --stage={stage.windows}"
        raise MissingFile(
            f"{stage.folder} holds no student yet, neither {DONE} nor a plan and a checkpoint: run {job}"
        ) from None
    if restored.meta["lineage"]["windows"] != stage.windows:
        raise UserError(f"{stage.folder / 'checkpoints'} holds another stage's steps: put this stage's own back")
    trained = averaged(restored.state)
    factors = trained if layout.scale else {}
    return Weights(_whole(experiment, trained), stage.student, fold(digest(trained)), factors), restored.step


def _whole(experiment: Experiment, trained: Params) -> Params:
    """The denoiser's weights by what was trained: the very arrays, but for a LoRA's sum."""
    layout, beside = experiment.layout, experiment.denoiser.beside(experiment.layout)
    whole = partial(whole_weights, layout)
    return jax.jit(whole)(trained, beside) if layout.scale else whole(trained, beside)


def _weights_alone(layout: StateLayout) -> TrainState:
    """The target of a restore that reads no more than what is handed on."""
    return layout.target._replace(opt_state=(), **({"params": {}} if layout.average else {}))


def finished_weights(experiment: Experiment, stage: Stage, done: Done) -> Params:
    """What a finished stage trained (the average where there is one), compared with its record.

    Raises Damaged or MissingFile if the step is damaged or gone, UserError if its weights are another run's.
    """
    weights = _weights_alone(experiment.layout)
    with Checkpoints(stage.folder / "checkpoints", read_only=True) as checkpoints:
        trained = averaged(checkpoints.restore(done.step, weights, part=True).state)
    if fold(digest(trained)) != done.digest:
        raise UserError(
            f"{stage.folder}: step {done.step} does not hold the weights that {DONE} names, one of the two is another run's: "
            f"put back the right one; with {DONE} moved aside train --stage={stage.windows} goes by the checkpoint"
        )
    return trained


def handed_on(experiment: Experiment, stage: Stage | None) -> str:
    """The digest of a finished student, by its record, or of the base model for None. Raises as `read_done`."""
    return read_done(stage).digest if stage else experiment.denoiser.digest()


def first_weights(experiment: Experiment, parent: Weights) -> Params:
    """What training starts from: the parent's weights; of a LoRA its factors, or new ones that add nothing."""
    if not experiment.layout.scale:
        return {name: parent.params[name] for name in experiment.layout.shapes}
    lora, key = experiment.config.student.lora, seed_key(experiment.config.seed)
    return parent.factors or lora_factors.init(trainable(experiment.networks.denoiser), lora.layers, lora.rank, key)


def frozen_arrays(experiment: Experiment, stage: Stage, teacher: Params, with_vae: bool) -> Frozen:
    """The arrays that a stage's jobs read and never change, on every device. teacher: {} where no pairs are made."""
    base, put = experiment.base, partial(jax.device_put, device=mesh.replicated(experiment.mesh))
    spared = spares_encoders(experiment.config, base)
    return Frozen(
        text={} if spared else put(base.text),
        vae=put(base.params["vae"]) if with_vae else {},
        teacher=teacher,
        empty=put(base.tokenizer.encode([""])[0]),
        key=stage.pair_key,
        base=experiment.denoiser.beside(experiment.layout),
        unprompted=put(host_context(base, [""])) if spared else None,
    )


def stage_plan(experiment: Experiment, stage: Stage, parent: str, blocks: Sequence[str]) -> dict[str, Any]:
    """What may not change while a stage is under way: the named blocks of the config, flat, and the parent's digest.

    Left out is what changes no result: where the base model lies (its digest is the first parent) and how often is logged.
    """
    config = experiment.config
    plan = {"examples": config.pairs.examples, "shard_size": config.pairs.shard_size, "windows": stage.windows}
    plan |= _settings(config, blocks) | dataset.identity(config)
    return plan | experiment.identity() | {"seed": config.seed, "parent": parent}


def _settings(config: ConfigDict, blocks: Sequence[str]) -> dict[str, Any]:
    """Blocks of the config as a plan has them: {block.field: value}, without what changes no result."""
    fields = {f"{block}.{name}": _plain(value) for block in blocks for name, value in config[block].items()}
    return {name: value for name, value in fields.items() if name not in FREE and (name not in YOUNG or value != YOUNG[name])}


def check_begun(experiment: Experiment, stages: Sequence[Stage]) -> None:
    """Raises UserError, one line, if one of the stages, or its pairs, was begun with another config; writes nothing.

    What a stage starts from is compared as far as it is known: a stage before it may have to be finished first.
    """
    for stage in stages:
        for folder, source, blocks in (
            (stage.folder, stage.parent, TRAINED),
            (stage.folder / "pairs", stage.maker, PLANNED),
        ):
            begun, known = first_reads(lambda at=folder, by=source: [_has_plan(at), by is None or _has_plan(by.folder)])
            if not begun:
                continue
            if not known:
                raise UserError(
                    f"{folder / record_plan.PLAN} was begun from other weights, --config.stages={experiment.config.stages} "
                    f"starts it from stage {source.windows}, which has not begun: take another folder by --config.name"
                )
            try:
                parent, unknown = handed_on(experiment, source), ()
            except (MissingFile, Damaged):
                parent, unknown = "", ("parent",)
            plan = stage_plan(experiment, stage, parent, blocks)
            first_reads(lambda at=folder, p=plan, u=unknown: record_plan.check_plan(at, p, unknown=u))


def check_taught(experiment: Experiment, stage: Stage, stated: Sequence[str] = ()) -> None:
    """Raises UserError, one line, if a stage's student was taught something else than the config and the base model say.

    By the plans of the stage and of those before it, as far as they are there; see `taught`. Of the stage itself the fields
    `stated` are compared too. Raises MissingFile if the stage has no plan.
    """
    config, one = experiment.config, stage
    settings = _settings(config, TRAINED) | {"seed": config.seed}
    while one is not None:
        place = one.folder / record_plan.PLAN
        if first_reads(place.is_file):
            plan = first_reads(lambda at=one.folder: record_plan.read_plan(at))
            taught.check_settings(place, plan, settings, stated if one is stage else ())
            taught.check_base(place, plan, experiment.identity(), config)
            _check_start(experiment, one, place, plan.get("parent"))
        elif one is stage:
            raise MissingFile(f"{place} is missing, which says what its student was taught: bring it back from a copy")
        one = one.parent


def _check_start(experiment: Experiment, stage: Stage, place: Location, parent: str | None) -> None:
    """Raises UserError if a stage began from other weights than are there; of a stage before it that is gone none are known."""
    try:
        if handed_on(experiment, stage.parent) == parent:
            return
    except (MissingFile, Damaged):
        return
    if stage.parent is not None:
        raise UserError(f"{place}: this student began as another one than {stage.parent.done} names: put its own parent back")
    raise UserError(
        f"{place}: this student began as other weights than the {experiment.base.denoiser_word} of --config.model.path="
        f"{experiment.config.model.path}: "
        "name its own base model there, or, if stages came before it, all of them by --config.stages"
    )


def _has_plan(folder: Location) -> bool:
    return (folder / record_plan.PLAN).is_file()


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON gives back."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping | ConfigDict) else value
