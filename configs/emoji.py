"""The demo: progressive reflow of the emoji model in 8, 4, then 2 windows; its table, and its gate.

    make demo
    proreflow distill --config=emoji
    proreflow evaluate --config=emoji:gate
    proreflow distill --config=emoji:long

The second command is the job, minutes; the third the table with held-out prompts, too, the teacher at 2 to 64 steps and at
several guidance scales, and what a testbed must show in words (without a student it measures the teacher alone); the fourth is
how the student was trained that comes with the package. Stop any and run it again as you like. Machine: 2 CPU cores, which ask
the UNet some 540 times a second (a Xeon with AMX, idle): the gate's rows of the teacher are 378,000 calls, those of guidance
162,000.
"""

from ml_collections import ConfigDict

from configs.common import asset, optimizer, stable_diffusion

SHOWCASE = (
    "an octopus, fluent 3d style",
    "a waffle, noto style",
    "a dog face, fluent 3d style",
    "a smiling face with sunglasses, twemoji style",
    "a pizza, fluent flat style",
    "a penguin, noto style",
    "a strawberry, fluent 3d style",
)


def get_config(form: str = "demo") -> ConfigDict:
    """What was decided for the emoji; the rest is common.stable_diffusion's.

    form: "demo", minutes; "gate", the demo's run with a larger table; "long", the student that comes with the package.
    """
    if form not in ("demo", "gate", "long"):
        raise ValueError(f"{form!r} after configs/emoji.py: must be demo, gate or long")
    c = stable_diffusion("emoji-long" if form == "long" else "emoji")
    c.model.path = asset("emoji")  # diffusers folder, single .safetensors file or hub id
    c.model.student = asset("emoji_student")  # what `sample` draws with as long as the run has no student of its own
    c.model.dtype = "float32"  # of the student's computation; a CPU gains nothing by "bfloat16"
    c.model.teacher_dtype = "float32"  # of the teacher's computation
    c.model.sampling_dtype = "float32"  # of sampling and decoding

    c.data.path = asset("emoji/prompts.txt")  # captions of the pictures that the base model's training saw, one a line
    c.data.resolution = 64  # pixels a side
    c.data.threads = 2  # that read and decode images, of each process: one a core

    c.student.prediction = "ddim_eps"  # prediction type: "ddim_eps", "velocity", "diff_eps"; v_prediction base: "ddim_v"

    c.pairs.steps = 2  # solver steps per window of the diffusion teacher in the first stage [paper: 4]; later stages scale
    c.pairs.examples = 512  # records a stage; from noise each holds a whole trajectory
    c.pairs.shard_size = 128  # records a shard; a kill costs at most one shard
    c.pairs.batch = 64  # trajectories computed at once; multiple of devices, factor or multiple of shard_size
    c.pairs.guidance = 4.0  # teacher's classifier-free guidance scale: the students have it in them, and draw at half the cost
    c.pairs.prompt_dropout = 0.0  # nobody asks these students for the empty prompt: guidance is in them already

    c.loss.start_steps = 0  # students are asked for as many steps as windows, and taught there alone

    c.train.steps = 100  # updates per stage (the paper does not say)
    c.train.batch = 32  # global batch: examples per update, over all devices and accumulation (the paper does not say)
    c.train.accumulation = 1  # parts a batch is computed in; divides batch / devices
    c.train.ema = 0.95  # decay of the averaged weights, which are handed on; 0: off (the paper does not say)
    c.train.remat = "none"  # all is kept of each block for the backward pass: memory is no matter here
    c.train.log_every = 10  # steps between lines of metrics.jsonl; every step is checked for non-finite numbers

    c.optimizer = optimizer(learning_rate=1.5e-4, warmup_steps=20)  # at 5e-4 250 updates forgot more than they learnt

    c.checkpoint.every = 50  # steps between checkpoints

    c.mesh.fsdp = 1  # devices that share one state: it fits one

    c.export.stages = (8, 4, 2)  # stages whose student is exported to <run>/export/stage-N

    c.evaluate.protocol = "emoji"  # "emoji": kernel distances; "emoji-2500": with Frechet distances
    c.evaluate.images = asset("emoji_pictures")  # folder of the real pictures, as make_emoji writes it
    c.evaluate.examples = 250  # pictures of each row and seed, seen and held out each
    c.evaluate.batch = 50  # images computed at once; a multiple of the devices
    c.evaluate.guidance = c.pairs.guidance  # of the base model's rows: what the students have in them
    c.evaluate.teacher_steps = (16, 8, 4, 2)  # rows of the base model; the most are the reference of the distances
    c.evaluate.student_steps = ((8, 8), (4, 4), (2, 2))  # rows (windows, steps) of the students that are finished
    c.evaluate.columns = 12  # images of each row in the picture: seen prompts, in the left half if others are drawn too
    c.evaluate.gate = ConfigDict()  # of the emoji's table alone
    c.evaluate.gate.styled = True  # prompts name a style: "a waffle, noto style"; False: "a waffle", which is harder
    c.evaluate.gate.held_out = False  # rows of prompts whose pictures the base model's training did not see, too
    c.evaluate.gate.shipped_steps = (4, 2)  # rows of the student that comes with the base model, model.student; (): none
    c.evaluate.gate.student_guidance = 1.0  # classifier-free guidance scale of the students; 1 if pairs.guidance is in them
    c.evaluate.gate.guidance = (2.0,)  # scales of further rows of the base model, one seed; (): none
    c.evaluate.gate.guidance_steps = (4, 2)  # their steps: where the students stand
    c.evaluate.gate.guidance_examples = 250  # pictures of each of these rows, seen and held out each
    c.evaluate.gate.showcase = SHOWCASE  # prompts of showcase.png; (): none
    c.evaluate.gate.showcase_steps = (32, 2)  # many and few, of the base model there; beside it the student of fewest windows
    return {"demo": lambda c: c, "gate": _gate, "long": _long}[form](c)


def _gate(c: ConfigDict) -> ConfigDict:
    """More rows in the table."""
    c.evaluate.teacher_steps = (64, 32, 16, 8, 4, 2)  # every doubling
    c.evaluate.gate.guidance = (1.0, 2.0, 3.0, 4.0, 5.0)  # scales of further rows of the base model, one seed
    c.evaluate.gate.guidance_steps = (32, 4)  # their steps, many and few
    c.evaluate.gate.held_out = True  # rows of prompts whose pictures the base model's training did not see, too
    return c


def _long(c: ConfigDict) -> ConfigDict:
    """More pairs and updates; the last student, of 2 windows, is also taught where a sampler of 4 steps stands."""
    c.pairs.examples = 3072  # records a stage: every prompt in most of them
    c.train.steps = 900  # updates per stage
    c.train.ema = 0.98  # decay of the averaged weights, which are handed on
    c.loss.start_steps = 4  # the last student learns at the times of a sampler of 4 steps, too
    c.checkpoint.every = 300  # steps between checkpoints
    c.evaluate.student_steps = ((8, 8), (4, 4), (2, 2), (2, 4))  # rows (windows, steps) of the students
    c.evaluate.gate.shipped_steps = ()  # it is this run's own
    return _gate(c)
