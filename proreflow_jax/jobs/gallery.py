"""What the page of `serve` draws: models to choose from, a request in the page's own texts, pictures or one line of refusal."""

import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from PIL import Image

from proreflow_jax import UserError
from proreflow_jax.run import errors, load
from proreflow_jax.run.experiment import Experiment, load_weights, newest_weights
from proreflow_jax.run.find_model import title
from proreflow_jax.run.image_model import ImageModel, count_steps
from proreflow_jax.run.stages import Stage
from proreflow_jax.runtime.programs import keep_programs
from proreflow_jax.storage import paths

log = logging.getLogger(__name__)
WHOLE = re.compile(r"[+-]?\d{1,20}")
FLAGS = re.compile(r"--(steps|guidance|seed|negative|prompt)\b")  # of `sample`, which the page has as fields
LIMIT = 16 * 2**30  # bytes of UNets that stay open; beyond it the one that was not used for longest goes
BASE = "base model"
Report = Callable[[int, int, str], None]  # (step, steps, label)


class Choice(NamedTuple):
    """A model that the page offers."""

    label: str
    windows: int  # 0: a diffusion model
    open: Callable[[], ImageModel]


class Ask(NamedTuple):
    """What the page asks for, as it comes: texts and numbers that nobody has checked."""

    prompt: Any
    student: Any  # a label; "": none
    teacher: Any = ""  # likewise, of the other side
    steps: Any = 0  # 0: as many as windows, or 50
    teacher_steps: Any = 0
    guidance: Any = 1.0
    teacher_guidance: Any = 1.0
    negative: Any = ""
    seed: Any = 0


class Drawing(NamedTuple):
    """One picture and what it took."""

    label: str
    image: Image.Image  # its `info` has the story that a PNG keeps
    steps: int
    calls: int  # evaluations of the network
    guidance: float
    seconds: float
    compiled: bool  # the seconds hold a compilation

    def words(self) -> str:
        """The cost of the picture in a line."""
        plural = lambda count, word: f"{count} {word}{'' if count == 1 else 's'}"
        note = " with compiling" if self.compiled else ""
        cost = f"{plural(self.steps, 'step')}, {plural(self.calls, 'network call')}, {self.seconds:.2f} s{note}"
        return f"{self.label}: {cost}" + ("" if self.guidance == 1 else f", guidance {self.guidance:g}")


class Answer(NamedTuple):
    """What the page shows: the student's picture, the teacher's, or a line that says why there is none."""

    student: Drawing | None = None
    teacher: Drawing | None = None
    refusal: str = ""


class Gallery:
    """The models of a page. One drawing at a time: further requests wait."""

    def __init__(self, name: str, choices: Callable[[], list[Choice]]) -> None:
        """name: of all of it. choices: the models that there are now; asked again by `refresh`."""
        self.name, self._find = name, choices
        self._lock = threading.Lock()
        self._models: dict[str, ImageModel] = {}  # by label; the last used at the end
        self._compiled: set[tuple[str, bool]] = set()
        self.choices: dict[str, Choice] = {}
        self.refresh()

    def refresh(self) -> None:
        """Looks for students that are new, or further."""
        self.choices = {choice.label: choice for choice in self._find()}

    @property
    def students(self) -> list[str]:
        """Labels, the fewest windows first, a diffusion model last."""
        return sorted(self.choices, key=lambda label: (self.choices[label].windows or 10**9, label))

    @property
    def teacher(self) -> str:
        """The label of the diffusion model, which is drawn beside a student; "" if there is none, or nothing else."""
        return next((label for label, one in self.choices.items() if not one.windows and len(self.choices) > 1), "")

    def draw(self, ask: Ask, report: Report = lambda step, steps, label: None) -> Answer:
        """Draws both sides from the same noise. Whatever the user can mend, or the machine lacks, comes back as text."""
        try:
            sides = self._checked(ask)
            with self._lock:
                drawings = [self._drawing(report=report, **side) for side in sides]
        except Exception as error:
            if errors.exit_code(error) is None and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            line = FLAGS.sub(r"\1", errors.message(error))
            log.info("refused: %s", line)
            return Answer(refusal=line)
        return Answer(drawings[0], drawings[1] if len(drawings) > 1 else None)

    def _checked(self, ask: Ask) -> list[dict[str, Any]]:
        """The arguments of each side's drawing. Raises UserError, one line in the page's words."""
        prompt, negative = (str(text or "").strip() for text in (ask.prompt, ask.negative))
        if not prompt:
            raise UserError("the prompt is empty: say what to draw")
        if not ask.student:
            raise UserError("no student is chosen: choose one")
        words = {"prompt": prompt, "negative": negative, "seed": whole_number(ask.seed, "seed")}
        rows = [(ask.student, ask.steps, ask.guidance), (ask.teacher, ask.teacher_steps, ask.teacher_guidance)]
        sides = []
        for label, steps, guidance in rows:
            if not label:
                continue
            if label not in self.choices:
                raise UserError(f"there is no {label!r} any more: reload the page")
            numbers = {"steps": whole_number(steps, "steps"), "guidance": number(guidance, "guidance")}
            sides.append({"label": label, **numbers, **words})
        return sides

    def _drawing(self, *, label: str, prompt: str, steps: int, guidance: float, report: Report, **words: Any) -> Drawing:
        model = self._model(label)
        count = count_steps(steps, model.flow)
        key = (label, guidance != 1)
        compiled = key not in self._compiled

        def callback(step: Any) -> None:
            jax.block_until_ready(step.latents)
            report(step.number, step.count, label)

        report(0, count, label)
        began = time.monotonic()
        (image,) = model(prompt, steps=steps, guidance=guidance, callback=callback, **words)
        seconds = time.monotonic() - began
        self._compiled.add(key)
        return Drawing(label, image, count, count * (1 if guidance == 1 else 2), guidance, seconds, compiled)

    def _model(self, label: str) -> ImageModel:
        """The open model; others go where all would be too large."""
        model = self._models.pop(label, None)
        if model is None:
            log.info("opening %s", label)
            model = self.choices[label].open()
        self._models[label] = model
        size = lambda one: sum(value.nbytes for value in one.params.values())
        while len(self._models) > 2 and sum(map(size, self._models.values())) > LIMIT:
            oldest = next(iter(self._models))
            del self._models[oldest]
            self._compiled = {key for key in self._compiled if key[0] != oldest}
        return model


def open_gallery(model: str, beside: str = "", *, dtype: str = "", **words: str) -> Gallery:
    """The models of a run, or one model alone, and another beside it. Raises UserError, one line, in the words of the flags.

    words: revision, like, vae, as `load` takes them.
    """
    if not model:
        raise UserError("--model is empty: name a run, an export, a diffusers folder, a .safetensors file or a hub id")
    keep_programs("")
    place = paths.parse_path(model, "--model")
    run, _ = load.find_run(place)
    others = [_alone("--beside", beside, dtype)] if beside else []
    if run is None:
        one = _alone("--model", model, dtype, **words)
        return Gallery(one.label, lambda: [one, *others])
    if own := [f"--{name}" for name, value in words.items() if value not in ("", "main")]:
        raise UserError(f"{own[0]} is for a model alone, --model={model} is a run: its config says it")
    experiment = load.open_run(run, dtype, {})
    return Gallery(experiment.config.name, lambda: [*run_choices(experiment), *others])


def _alone(flag: str, source: str, dtype: str, **words: str) -> Choice:
    """A model that is no run's; opened at once, so that a wrong name is refused before there is a page."""
    try:
        model = load.load(source, dtype=dtype, **words)
    except UserError as error:
        text = re.sub(r"(?<![\w.-])(revision|like|vae|dtype)(?==| must)", r"--\1", str(error))
        raise type(error)(re.sub(r"(?<![\w.-])source(?==| must)", flag, text)) from None
    kind = f"student of {model.flow.windows} windows" if model.flow.windows else BASE
    return Choice(f"{model.name}, {kind}", model.flow.windows, lambda: model)


def run_choices(experiment: Experiment) -> list[Choice]:
    """The base model, the finished students, and the newest checkpoints of those that are not."""
    config, run = experiment.config, experiment.config.name

    def base() -> ImageModel:
        return ImageModel.of(experiment, load_weights(experiment, None), title(config, experiment.base.source))

    def student(stage: Stage) -> ImageModel:
        return ImageModel.of(experiment, newest_weights(experiment, stage)[0], f"{run}-{stage.folder.name}")

    choices = []
    for stage in experiment.stages:
        opened = lambda stage=stage: student(stage)
        if stage.done.is_file():
            choices.append(Choice(f"student of {stage.windows} windows", stage.windows, opened))
        elif step := newest_step(stage):
            label = f"student of {stage.windows} windows, step {step} of {config.train.steps}"
            choices.append(Choice(label, stage.windows, opened))
    windows = experiment.flow.windows
    return [*choices, Choice(f"{BASE}, student of {windows} windows" if windows else BASE, windows, base)]


def newest_step(stage: Stage) -> int:
    """The newest checkpoint of a stage, 0 if there is none."""
    folder = stage.folder / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def whole_number(value: Any, name: str) -> int:
    """A whole number of a text or a number. Raises UserError, one line."""
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    if not WHOLE.fullmatch(text):
        raise UserError(f"{name}={text[:40]} must be a whole number")
    return int(text)


def number(value: Any, name: str) -> float:
    """A number of a text or a number. Raises UserError, one line."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name}={str(value)[:40]} must be a number") from None


def caption(ask: Ask) -> str:
    """Of a drawing in the history."""
    return f"{str(ask.prompt).strip()[:200]} (seed {str(ask.seed).strip()})"
