"""Blocks that several configs share. Configs import nothing of the package."""

from importlib.resources import files

from ml_collections import ConfigDict

# Weight decay by parameter name: the first regex found in a name decides. Norms, biases and embeddings do not decay.
DECAY_RULES = (
    (r"bias$", False),
    (r"norm", False),
    (r"_embedding\.weight$", False),
    (r".*", True),
)

# Where a layer lies: the first regex found in a name decides. Attention's heads and the feed-forward's inner width are cut over
# tensor, by a layer's outputs ("column") and the next one's inputs ("row"); fsdp takes the largest dimension that is left.
SHARDING_RULES = (
    (r"attn\d?\.(to_(q|k|v)|add_(q|k|v)_proj)\.", "column"),  # add_, to_add_out, ff_context: of an MMDiT's text
    (r"attn\d?\.(to_out\.0|to_add_out)\.", "row"),
    (r"ff(_context)?\.net\.0\.proj\.", "column"),
    (r"ff(_context)?\.net\.2\.", "row"),
    (r".*", "fsdp"),
)


# A LoRA's layers in an MMDiT: attention of image and text. A UNet's are `student.lora.layers` below.
JOINT_LAYERS = r"attn2?\.(to_(q|k|v|out\.0)|add_(q|k|v)_proj|to_add_out)\.weight$"


def asset(name: str) -> str:
    """The path of what comes with the package, wherever that is installed: assets/<name>."""
    return str(files("proreflow_jax") / "assets" / name)


def optimizer(learning_rate: float, warmup_steps: int, schedule: str = "cosine", beta2: float = 0.99) -> ConfigDict:
    """AdamW; the paper states none of these numbers."""
    return ConfigDict(
        dict(
            learning_rate=learning_rate,  # peak
            schedule=schedule,  # after warm-up: "constant", "cosine" or "linear" down to 0
            warmup_steps=warmup_steps,  # linear rise to the peak, in steps
            beta1=0.9,  # decay of the first moment
            beta2=beta2,  # decay of the second moment
            epsilon=1e-8,  # added to the root of the second moment
            weight_decay=0.01,  # decoupled, where decay_rules say True
            decay_rules=DECAY_RULES,  # ordered (regex, bool) over parameter names
            clip_norm=1.0,  # global gradient norm is cut to this; 0: off
        )
    )


def stable_diffusion(name: str) -> ConfigDict:
    """What digits, sd15, sd21, sdxl and finetune have alike; each file adds what was decided for it, and says why.

    Left to the file: model.path, data.resolution, student.prediction, the block optimizer, and the amounts of work:
    pairs.{examples, shard_size, batch} and train.{steps, batch, accumulation}.
    """
    c = ConfigDict()
    c.name = name  # run folder below `root`
    c.root = "runs"  # where run folders lie: a disk that outlives the machine
    c.seed = 0  # of pairs, shuffling, times and evaluation noise; whole number from 0 to 2**64 - 1
    c.watchdog = 7200  # seconds without a step or a batch after which stacks are printed and the job ends; 0: off
    c.compilation_cache = ""  # folder or gs:// for compiled programs; "": the environment's, else the user's cache; "off"
    _inputs(c)
    _method(c)
    _run(c)
    return c


def _inputs(c: ConfigDict) -> None:
    """The base model and the prompts."""
    c.model = ConfigDict()
    c.model.revision = "main"  # of a hub id: branch, tag or commit
    c.model.like = ""  # of a single file: folder or hub id that gives configs and tokenizer; "": its family's own, on the hub
    c.model.vae = ""  # another VAE: its folder, a model with a vae/, a .safetensors file or a hub id; "": the model's own
    c.model.clip_skip = 0  # last layers of the text encoder left out; as diffusers counts: 1 is A1111's "Clip skip 2"; SDXL: 0
    c.model.prediction_type = ""  # "epsilon" or "v_prediction" where scheduler_config.json says it wrong; "": as it says
    c.model.dtype = "bfloat16"  # of the student's computation, what a TPU multiplies in; master weights are float32
    c.model.teacher_dtype = "bfloat16"  # of the teacher's computation
    c.model.sampling_dtype = "bfloat16"  # of sampling and decoding; tables say which; float32 where a VAE's config asks for it
    c.model.attention = "auto"  # its form: by platform, or "xla", "chunked", "cached", "cudnn", "narrow", "splash"

    c.conditioning = ConfigDict()  # SDXL's micro-conditioning, (height, width) or (top, left); without effect elsewhere
    c.conditioning.original_size = (0, 0)  # pixels of the image before it was resized; 0: the model's own resolution
    c.conditioning.crop = (0, 0)  # upper left corner of the crop
    c.conditioning.target_size = (0, 0)  # pixels of the image that is drawn; 0: the model's own resolution

    c.data = ConfigDict()
    c.data.kind = "prompts"  # "prompts" (a file); images: "tfds", "webdataset", "parquet", "folder", "cached": docs/data.md
    c.data.path = "prompts.txt"  # the text file with one prompt a line; the dataset's folder, or a pattern of its shards
    c.data.split = "train"  # of "tfds"
    c.data.image_key = "image"  # of "tfds" and "parquet": feature or column with the image
    c.data.caption_key = "captions/text"  # tfds feature with the text, where coco_captions has it
    c.data.max_bad = 0.01  # share of examples that may be bad (no good image or caption): the next is read instead; 0: none
    c.data.threads = 16  # that read and decode images, of each process
    c.data.cache = "runs/index"  # folder for the indexes of "webdataset", local or mounted

    c.cache = ConfigDict()  # of the verb cache: images as latents, computed once for every later run with data.kind="cached"
    c.cache.text = False  # the text encoders' states too; they are large, and serve pairs and online training only
    c.cache.storage = "float16"  # dtype in the records: "float32", "float16", "bfloat16"
    c.cache.shard_size = 4096  # records a shard; a kill costs at most one shard
    c.cache.batch = 64  # images encoded at once; a multiple of the devices


def _method(c: ConfigDict) -> None:
    """Stages, the student, its pairs, the loss."""
    c.stages = (8, 4, 2)  # windows of each stage, each divides 1000 and the one before [paper: ProReflow-II]

    c.student = ConfigDict()
    c.student.path = "linear"  # inside a window: "linear" [paper] or "first_order" (Rectified Diffusion)

    c.student.lora = ConfigDict()
    c.student.lora.rank = 0  # trains low-rank factors of this rank beside frozen weights; 0: trains all weights [paper]
    c.student.lora.alpha = 0.0  # the factors' product counts alpha / rank; 0: alpha = rank
    c.student.lora.layers = r"attn\d\.to_(q|k|v|out\.0)\.weight$"  # regex, found in the names of the weights that get factors

    c.pairs = ConfigDict()
    c.pairs.mode = "stored"  # make_pairs writes records, read 16 to 20 times; "online": the teacher runs inside the train step
    c.pairs.start = "noise"  # whole trajectories, no images needed; "data" (PeRFlow): one window from noised images
    c.pairs.teacher = "previous"  # who makes a later stage's pairs: "previous" stage [paper] or "base" model
    c.pairs.solver = "ddim"  # of the diffusion teacher: "ddim" [paper], "euler", "heun", "dpmpp_2m"
    c.pairs.steps = 4  # solver steps per window of the diffusion teacher, 32 in all [paper]
    c.pairs.substeps = 1  # Euler steps per old window of a student that makes pairs: all it needs, taught at starts alone
    c.pairs.guidance = 1.0  # teacher's classifier-free guidance scale [paper]; guide the student when sampling, 2 to 7 [paper]
    c.pairs.prompt_dropout = 0.1  # probability of the empty prompt, so that guidance works later (PeRFlow's number)
    c.pairs.storage = "float16"  # half of float32; a chord is a difference, where bfloat16's rounding would be 8 times larger

    c.loss = ConfigDict()
    c.loss.space = "velocity"  # what is compared: "velocity" [paper] or "output" (noise matching, PeRFlow)
    c.loss.alpha = 1.0  # weight of 1 - cosine; the paper gives no number, at 0.1 a toy study saw no effect
    c.loss.balance = "auto"  # alpha in units of each target's direction_weight, or "fixed": as it is [paper]
    c.loss.huber = 0.0  # delta of a pseudo-Huber in place of the squared error; 0: squared error [paper]
    c.loss.start_steps = 4  # of more steps than windows: all times of a sampler of so many steps count as starts
    c.loss.window_start_prob = 1.0  # extra probability that t is a start, where such samplers look; 0: uniform [paper]


def in_form(c: ConfigDict, form: str) -> ConfigDict:
    """The config as it is by "", and by "paper" with the paper's recipe, where it says one, in a run folder of its own.

    That recipe starts windows at noised images, so it needs a dataset; a record holds one window, so there are more of them.
    """
    if form not in ("", "paper"):
        raise ValueError(f"{form!r} after configs/{c.name}.py: must be paper, or left out with its colon")
    if form == "paper":
        c.name += "-paper"  # run folder below `root`
        if c.data.kind == "prompts":
            c.data.kind, c.data.path = "folder", "images"  # images with captions: docs/data.md
        c.pairs.start = "data"  # a window starts at a noised image, as in PeRFlow, on which the paper builds
        c.pairs.substeps = 4  # not in the paper: 32 steps of the 8-window student, as many as the diffusion teacher's
        c.pairs.examples *= c.stages[0]  # records a stage: one window each
        c.pairs.shard_size *= c.stages[0]  # records a shard: as many bytes as before
        c.loss.balance = "fixed"  # alpha as it is; its number is not in the paper
        c.loss.start_steps = 0  # no times are preferred
        c.loss.window_start_prob = 0.0  # t is uniform in the window
    return c


def _run(c: ConfigDict) -> None:
    """How a run is kept, spread over the machine, exported and measured."""
    c.train = ConfigDict()
    c.train.ema = 0.999  # decay of the averaged weights, which are handed on; 0: off, saves a quarter of the state
    c.train.groups = 1  # groups of pair shards, each read by a run of a batch's rows alone: docs/launch.md; 1: all by all
    c.train.remat = "attention"  # kept of each block for the backward pass: "none" = all, "products", "attention", "inputs"
    c.train.log_every = 50  # steps between lines of metrics.jsonl; every step is checked for non-finite numbers

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps between checkpoints
    c.checkpoint.keep = 2  # newest checkpoints kept, of each stage

    c.samples = ConfigDict()  # pictures at every checkpoint, student beside base model: <stage>/samples; they change no number
    c.samples.prompts = ()  # what is drawn, a row each, for example ("a red fox", "a house by the sea"); (): no pictures
    c.samples.count = 2  # pictures of each prompt, from fixed noises that all prompts and stages share
    c.samples.steps = 0  # network evaluations of the student; fewer than its windows: as many as windows
    c.samples.teacher_steps = 32  # network evaluations of the base model beside it [paper: teacher at 32 steps]
    c.samples.guidance = 1.0  # classifier-free guidance scale of both; base model: pairs.guidance where that is not 1

    c.wandb = ConfigDict()  # the run on wandb too (pip install '.[wandb]'); where it cannot be, one line says so
    c.wandb.project = ""  # its project there; "": none
    c.wandb.entity = ""  # user or team there; "": the user's own

    c.profile = ConfigDict()
    c.profile.steps = ()  # (first, last) training step of each stage that is traced into <stage>/profile; (): none

    c.mesh = ConfigDict()
    c.mesh.slices = 1  # slices, each with the three axes below: only gradients' sums go between them
    c.mesh.data = -1  # devices of a slice over which only the batch is split; -1: all that fsdp and tensor leave
    c.mesh.fsdp = -1  # devices that share one state; -1 with data=-1: all up to 64, which divide the layers (docs/launch.md)
    c.mesh.tensor = 1  # devices over which layers are split
    c.mesh.teacher = "split"  # of a step that makes its own pairs: "split" as the state, or "whole" on each device
    c.mesh.sparse_cores = True  # of a TPU v6e: they carry out transfers while the chip computes; elsewhere without effect
    c.mesh.rules = SHARDING_RULES  # ordered (regex, "fsdp", "replicated", "column" or "row") over parameter names

    c.export = ConfigDict()
    c.export.stages = (4, 2)  # stages whose student distill exports to <run>/export/stage-N [paper: 4 and 2 steps]

    c.evaluate = ConfigDict()
    c.evaluate.protocol = "coco2017-5k"  # "coco2017-5k", "coco2014-30k": FID and CLIP score, see docs/scores.md
    c.evaluate.examples = 0  # images of each row and seed; 0: as many as the protocol says
    c.evaluate.seeds = ()  # of the noise; (): the protocol's
    c.evaluate.guidance = 0.0  # classifier-free guidance scale; 0: the protocol's
    c.evaluate.inception = ""  # the FID network's .safetensors file
    c.evaluate.clip = ""  # folder of the CLIP score's network; "": no CLIP score
    c.evaluate.captions = ""  # captions_val2017.json, or that of 2014
    c.evaluate.images = ""  # folder of the real images, or tfds' coco_captions (2014), which needs no captions file
    c.evaluate.batch = 80  # images computed at once; a multiple of the devices
    c.evaluate.teacher_steps = (32, 8, 4, 2)  # rows of the base model [paper: teacher at 32 steps]
    c.evaluate.student_steps = ((4, 4), (2, 2), (2, 4))  # rows (windows, steps) of the students [paper: 4 and 2 steps]
    c.evaluate.columns = 8  # images of each row in the digits' picture
    c.evaluate.study = ConfigDict()  # of evaluate --study: how flows bend, and what errors of direction or magnitude cost
    c.evaluate.study.examples = 64  # prompts; each is drawn from every seed's noise
    c.evaluate.study.seeds = 3  # of the noise; spreads are over them
    c.evaluate.study.steps = 64  # of a path; a multiple of every stage's windows
    c.evaluate.study.perturbed_steps = 32  # of a perturbed sample
    c.evaluate.study.sizes = (0.05, 0.1, 0.2, 0.3, 0.5)  # relative errors of each step's velocity
