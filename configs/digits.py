"""The demo: progressive reflow of the embedded digits model in 8, 4, then 2 windows (ProReflow-II's chain).

    make demo
    python -m proreflow_jax.distill --config=configs/digits.py

Machine: a laptop (2 CPU cores). Time and the expected table: README.md. Every field can be overridden by
--config.field=value. [paper] marks what the paper states; everything else is this project's choice.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs.common import SHARDING_RULES, optimizer

HERE = Path(__file__).resolve().parent.parent


def get_config() -> ConfigDict:
    """Every number of the experiment."""
    c = ConfigDict()
    c.name = "digits"  # run folder below `root`
    c.root = "runs"  # where run folders lie
    c.seed = 0  # of pairs, shuffling, times and evaluation noise; whole number >= 0
    c.compilation_cache = ""  # folder or gs:// where compiled programs are kept for the next start; "": as the environment says
    c.stages = (8, 4, 2)  # windows of each stage, each divides 1000 and the one before [paper: ProReflow-II]

    c.model = ConfigDict()
    c.model.path = str(HERE / "proreflow_jax" / "assets" / "digits")  # diffusers folder, single .safetensors file or hub id
    c.model.revision = "main"  # of a hub id: branch, tag or commit
    c.model.like = ""  # of a single file: folder or hub id that gives configs and tokenizer; "": its family's own, on the hub
    c.model.prediction_type = ""  # "epsilon" or "v_prediction" where scheduler_config.json says it wrong; "": as it says
    c.model.dtype = "float32"  # of the student's computation: "float32" or "bfloat16"; master weights are float32
    c.model.teacher_dtype = "float32"  # of the teacher's computation
    c.model.attention = "auto"  # its form: by platform, or "xla", "chunked", "cached", "cudnn", "splash"

    c.conditioning = ConfigDict()  # SDXL's micro-conditioning, (height, width) or (top, left); without effect elsewhere
    c.conditioning.original_size = (0, 0)  # pixels of the image before it was resized; 0: the model's own resolution
    c.conditioning.crop = (0, 0)  # upper left corner of the crop
    c.conditioning.target_size = (0, 0)  # pixels of the image that is drawn; 0: the model's own resolution

    c.data = ConfigDict()
    c.data.kind = "digits"  # "digits" (made at once), "prompts" (a file), "tfds", "webdataset", "parquet", "folder", "cached"
    c.data.path = "runs/data/digits"  # dataset folder, or the text file with one prompt a line
    c.data.split = "train"  # tfds split
    c.data.image_key = "image"  # tfds feature with the image
    c.data.caption_key = "caption"  # tfds feature with the text; a path such as "captions/text" reaches into a sequence
    c.data.resolution = 32  # pixels a side
    c.data.max_bad = 0.0  # share of examples that may be bad (no good image or caption): the next is read instead; 0: none
    c.data.threads = 2  # that read and decode images, of each process
    c.data.cache = "runs/index"  # folder for the indexes of "webdataset", local or mounted

    c.cache = ConfigDict()  # of the verb cache: images as latents, computed once for every later run with data.kind="cached"
    c.cache.text = False  # the text encoders' states too; they are large, and serve pairs and online training only
    c.cache.storage = "float32"  # dtype in the records: "float32", "float16", "bfloat16"
    c.cache.shard_size = 512  # records a shard; a kill costs at most one shard
    c.cache.batch = 128  # images encoded at once; a multiple of the devices

    c.student = ConfigDict()
    c.student.prediction = "ddim_eps"  # reading of the network: "ddim_eps", "velocity", "diff_eps"; v_prediction base: "ddim_v"
    c.student.path = "linear"  # inside a window: "linear" [paper] or "first_order" (Rectified Diffusion)

    c.student.lora = ConfigDict()
    c.student.lora.rank = 0  # trains low-rank factors of this rank beside frozen weights; 0: trains all weights [paper]
    c.student.lora.alpha = 0.0  # the factors' product counts alpha / rank; 0: alpha = rank
    c.student.lora.layers = r"attn\d\.to_(q|k|v|out\.0)\.weight$"  # regex, found in the names of the weights that get factors

    c.pairs = ConfigDict()
    c.pairs.mode = "stored"  # "stored": make_pairs writes records; "online": the teacher runs inside the train step
    c.pairs.start = "noise"  # "noise": whole trajectories from pure noise; "data": one window from noised images
    c.pairs.teacher = "previous"  # who makes a later stage's pairs: "previous" stage [paper] or "base" model
    c.pairs.solver = "ddim"  # of the diffusion teacher: "ddim" [paper], "euler", "heun", "dpmpp_2m"
    c.pairs.steps = 8  # solver steps per window of the diffusion teacher in the first stage [paper: 4]; later stages scale
    c.pairs.substeps = 4  # Euler steps per old window when a student makes the pairs (the paper does not say)
    c.pairs.guidance = 1.0  # teacher's classifier-free guidance scale; 1: none [paper]
    c.pairs.prompt_dropout = 0.1  # probability of the empty prompt, for teacher and student alike
    c.pairs.examples = 2048  # records a stage; from noise each holds a whole trajectory
    c.pairs.shard_size = 512  # records a shard; a kill costs at most one shard
    c.pairs.batch = 128  # trajectories computed at once; divides shard_size and is a multiple of the devices
    c.pairs.storage = "float32"  # dtype of the stored states: "float32", "float16", "bfloat16"

    c.loss = ConfigDict()
    c.loss.space = "velocity"  # what is compared: "velocity" [paper] or "output" (noise matching, PeRFlow)
    c.loss.alpha = 1.0  # weight of 1 - cosine [paper has the term, not the number]
    c.loss.balance = "fixed"  # alpha as it is [paper], or "auto": in units of each target's direction_weight, 1 needs no tuning
    c.loss.huber = 0.0  # delta of a pseudo-Huber in place of the squared error; 0: squared error [paper]
    c.loss.window_start_prob = 0.25  # extra probability that t is a window's start; 0: uniform [paper]
    c.loss.start_steps = 0  # of more steps than windows: all times of a sampler of so many steps count as starts

    c.train = ConfigDict()
    c.train.steps = 500  # updates per stage (the paper does not say)
    c.train.batch = 64  # global batch: examples per update, over all devices and accumulation (the paper does not say)
    c.train.accumulation = 1  # parts a batch is computed in; divides batch / devices
    c.train.ema = 0.99  # decay of the averaged weights, which are handed on; 0: off (the paper does not say)
    c.train.remat = "none"  # kept of each block for the backward pass: all, or "products", "attention", "inputs" (least)
    c.train.log_every = 20  # steps between lines of metrics.jsonl; every step is checked for non-finite numbers

    c.optimizer = optimizer(learning_rate=1e-3, warmup_steps=20)  # the paper does not say

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps between checkpoints
    c.checkpoint.keep = 2  # newest checkpoints kept

    c.profile = ConfigDict()
    c.profile.steps = ()  # (first, last) training step of each stage that is traced into <stage>/profile; (): none

    c.mesh = ConfigDict()
    c.mesh.slices = 1  # slices, each with the three axes below
    c.mesh.data = -1  # devices of a slice over which only the batch is split; -1: all that are left
    c.mesh.fsdp = 1  # devices over which the state is split too
    c.mesh.tensor = 1  # devices over which layers are split
    c.mesh.rules = SHARDING_RULES  # ordered (regex, "fsdp", "replicated", "column" or "row") over parameter names

    c.export = ConfigDict()
    c.export.stages = (8, 4, 2)  # stages whose student is exported to <run>/export/stage-N

    c.evaluate = ConfigDict()
    c.evaluate.protocol = "digits"  # "digits": the table of README.md; "coco2017-5k", "coco2014-30k": FID and CLIP score
    c.evaluate.seeds = ()  # of the noise, for FID and CLIP score; (): the protocol's
    c.evaluate.guidance = 0.0  # classifier-free guidance scale, for FID and CLIP score; 0: the protocol's
    c.evaluate.inception = ""  # the FID network's .safetensors file, docs/scores.md
    c.evaluate.clip = ""  # folder of the CLIP score's network; "": no CLIP score
    c.evaluate.captions = ""  # captions_val2017.json, or that of 2014
    c.evaluate.images = ""  # folder of the real images, or tfds' coco_captions (2014), which needs no captions file
    c.evaluate.examples = 1000  # images per row of the table; the Frechet distance depends on it
    c.evaluate.batch = 200  # images computed at once; divides examples and is a multiple of the devices
    c.evaluate.teacher_steps = (64, 8, 4, 2)  # rows of the base model; the first is the reference of the distances
    c.evaluate.student_steps = ((8, 8), (4, 4), (2, 2), (2, 4))  # rows (windows, steps) of the students
    c.evaluate.columns = 10  # images of each row in the picture
    c.evaluate.study = ConfigDict()  # of evaluate --study: how flows bend, and what errors of direction or magnitude cost
    c.evaluate.study.examples = 64  # prompts; each is drawn from every seed's noise
    c.evaluate.study.seeds = 3  # of the noise; spreads are over them
    c.evaluate.study.steps = 64  # of a path; a multiple of every stage's windows
    c.evaluate.study.perturbed_steps = 32  # of a perturbed sample
    c.evaluate.study.sizes = (0.05, 0.1, 0.2, 0.3, 0.5)  # relative errors of each step's velocity
    return c
