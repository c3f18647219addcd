"""Pictures over time, and two halves against each other: the script of the page moves the slider and takes the difference."""

from proreflow_jax.evaluation.page.facts import Run, Stage
from proreflow_jax.evaluation.page.markup import text

SMALL = 300  # pixels a side below which a picture is enlarged without smoothing


def gallery(run: Run) -> str:
    """A strip and a comparison for every stage that has pictures."""
    parts = "".join(_stage(run, stage) for stage in run.stages if stage.drawings)
    if not parts:
        return ""
    return f"<section><h2>Pictures</h2><p class=note>{text(_how(run))}</p>{parts}</section>"


def _how(run: Run) -> str:
    if run.pictured:
        return run.pictured
    left, right = (run.halves.get(side) or {} for side in ("left", "right"))
    if not left:
        return "Drawn at checkpoints from fixed noise."
    return (
        f"Fixed prompts from fixed noise at every checkpoint. Base model: {left.get('steps')} steps, guidance "
        f"{left.get('guidance')}; student: as many steps as windows or --config.samples.steps, guidance "
        f"{right.get('guidance')}. Large pictures are reduced here; whole ones lie in stage-N/samples."
    )


def _stage(run: Run, stage: Stage) -> str:
    small = " small" if run.tile and run.tile < SMALL else ""
    thumbs = "".join(
        f"<button type=button class=shot data-step={one.step}><img alt='after {one.step} steps' src='{one.picture}'>"
        f"<span>{_caption(one.step)}</span></button>"
        for one in stage.drawings
    )
    left = text(stage.sides[0])
    image = f"<img alt='{left}' src='{stage.teacher}'>"
    base = f"<figure class='shot teacher'>{image}<figcaption>{left}</figcaption></figure>" if stage.teacher else ""
    both = f"{_compare(run, stage, small) if stage.teacher else ''}<div class='strip{small}'>{base}{thumbs}</div>"
    return f"<div class=pictures><h3>{text(stage.name.capitalize())}</h3><div class=beside>{both}</div></div>"


def _caption(step: int) -> str:
    return f"{step:,} steps" if step else "untrained"


def _compare(run: Run, stage: Stage, small: str) -> str:
    prompts = "".join(f"<li>{text(prompt)}</li>" for prompt in run.prompts)
    newest = _caption(stage.drawings[-1].step)
    count, listed = run.halves.get("count", 1), "" if stage.windows else " listed"  # a prompt a row, or one a picture
    ratio = count / max(len(run.prompts) if stage.windows else len(run.prompts) // count, 1)
    left, right = (text(side) for side in stage.sides)
    return (
        f"<div class='compare{small}{listed}' style='--ratio:{ratio:.3f}'><ol class=prompts>{prompts}</ol><div class=stack>"
        f"<img class=under alt='{left}'><img class=over alt='{right}'><i class=edge></i></div>"
        f"<div class=controls><input type=range min=0 max=100 value=50 aria-label='where the {right} begins'>"
        f"<p class=ends><span>{left}</span><span>{right}, <b class=which>{newest}</b></span></p>"
        "<label><input type=checkbox class=difference> difference, × 4</label></div></div>"
    )
