"""The demo: progressive reflow of the embedded digits model in 8, 4, then 2 windows (ProReflow-II's chain).

    make demo
    proreflow distill --config=digits

Machine: a laptop (2 CPU cores). Time and the expected table: README.md. Every field can be overridden by
--config.field=value. [paper] marks what the paper states; everything else is this project's choice.
"""

from ml_collections import ConfigDict

from configs.common import asset, optimizer, stable_diffusion


def get_config() -> ConfigDict:
    """What was decided for the digits; the rest is common.stable_diffusion's."""
    c = stable_diffusion("digits")
    c.model.path = asset("digits")  # diffusers folder, single .safetensors file or hub id
    c.model.dtype = "float32"  # of the student's computation; a CPU gains nothing by "bfloat16"
    c.model.teacher_dtype = "float32"  # of the teacher's computation
    c.model.sampling_dtype = "float32"  # of sampling and decoding

    c.data.kind = "digits"  # scikit-learn's, written as a tfds dataset on first use
    c.data.path = "runs/data/digits"  # folder of that dataset
    c.data.caption_key = "caption"  # tfds feature with the text; a path such as "captions/text" reaches into a sequence
    c.data.resolution = 32  # pixels a side
    c.data.max_bad = 0.0  # share of examples that may be bad: none, they are our own
    c.data.threads = 2  # that read and decode images, of each process: one a core

    c.cache.storage = "float32"  # dtype in the records: small enough to keep every bit
    c.cache.shard_size = 512  # records a shard; a kill costs at most one shard
    c.cache.batch = 128  # images encoded at once; a multiple of the devices

    c.student.prediction = "ddim_eps"  # prediction type: "ddim_eps", "velocity", "diff_eps"; v_prediction base: "ddim_v"

    c.pairs.steps = 8  # solver steps per window of the diffusion teacher in the first stage [paper: 4]; later stages scale
    c.pairs.substeps = 4  # Euler steps per old window of a student that makes pairs: it is taught everywhere
    c.pairs.examples = 2048  # records a stage; from noise each holds a whole trajectory
    c.pairs.shard_size = 512  # records a shard; a kill costs at most one shard
    c.pairs.batch = 128  # trajectories computed at once; multiple of devices, factor or multiple of shard_size
    c.pairs.storage = "float32"  # dtype of the stored states: small enough to keep every bit

    c.loss.balance = "fixed"  # alpha as it is [paper], or "auto": in units of each target's direction_weight
    c.loss.start_steps = 0  # of more steps than windows: all times of a sampler of so many steps count as starts
    c.loss.window_start_prob = 0.25  # extra probability that t is a window's start, where an N-step sampler looks; 0: [paper]

    c.train.steps = 500  # updates per stage (the paper does not say)
    c.train.batch = 64  # global batch: examples per update, over all devices and accumulation (the paper does not say)
    c.train.accumulation = 1  # parts a batch is computed in; divides batch / devices
    c.train.ema = 0.99  # decay of the averaged weights, which are handed on; 0: off (the paper does not say)
    c.train.remat = "none"  # all is kept of each block for the backward pass: memory is no matter here
    c.train.log_every = 20  # steps between lines of metrics.jsonl; every step is checked for non-finite numbers

    c.optimizer = optimizer(learning_rate=1e-3, warmup_steps=20)  # the paper does not say

    c.checkpoint.every = 100  # steps between checkpoints

    c.samples.prompts = ("a handwritten zero", "the digit 3", "a handwritten seven", "a photo of the number nine")  # rows

    c.mesh.fsdp = 1  # devices that share one state: it fits one

    c.export.stages = (8, 4, 2)  # stages whose student is exported to <run>/export/stage-N

    c.evaluate.protocol = "digits"  # "digits": the table of README.md; "coco2017-5k", "coco2014-30k": FID and CLIP score
    c.evaluate.examples = 1000  # images per row of the table; the Frechet distance depends on it
    c.evaluate.batch = 200  # images computed at once; divides examples and is a multiple of the devices
    c.evaluate.teacher_steps = (64, 8, 4, 2)  # rows of the base model; the first is the reference of the distances
    c.evaluate.student_steps = ((8, 8), (4, 4), (2, 2), (2, 4))  # rows (windows, steps) of the students
    c.evaluate.columns = 10  # images of each row in the picture
    return c
