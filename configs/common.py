"""Blocks that several configs share. Configs import nothing of the package."""

from ml_collections import ConfigDict

# Weight decay by parameter name: the first regex found in a name decides. Norms, biases and embeddings do not decay.
DECAY_RULES = (
    (r"bias$", False),
    (r"norm", False),
    (r"_embedding\.weight$", False),
    (r".*", True),
)


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
    """What sd15, sd21, sdxl and finetune have alike, and none of what was decided for one of them: each file adds the rest.

    Left to the file: stages, model.path, data.resolution, student.prediction, and the blocks pairs, loss, train, optimizer.
    """
    c = ConfigDict()
    c.name = name  # run folder below `root`
    c.root = "runs"  # where run folders lie: a disk that outlives the machine
    c.seed = 0  # of pairs, shuffling, times and evaluation noise; whole number >= 0

    c.model = ConfigDict()
    c.model.revision = "main"  # of a hub id: branch, tag or commit
    c.model.like = ""  # of a single file: folder or hub id that gives configs and tokenizer; "": its family's own, on the hub
    c.model.prediction_type = ""  # "epsilon" or "v_prediction" where scheduler_config.json says it wrong; "": as it says
    c.model.dtype = "bfloat16"  # of the student's computation, what a TPU multiplies in; master weights are float32
    c.model.teacher_dtype = "bfloat16"  # of the teacher's computation

    c.conditioning = ConfigDict()  # SDXL's micro-conditioning, (height, width) or (top, left); without effect elsewhere
    c.conditioning.original_size = (0, 0)  # pixels of the image before it was resized; 0: the model's own resolution
    c.conditioning.crop = (0, 0)  # upper left corner of the crop
    c.conditioning.target_size = (0, 0)  # pixels of the image that is drawn; 0: the model's own resolution

    c.data = ConfigDict()
    c.data.kind = "prompts"  # "prompts" (a text file), "tfds" (a prepared dataset with images)
    c.data.path = "prompts.txt"  # the text file with one prompt a line, or the dataset's folder
    c.data.split = "train"  # tfds split
    c.data.image_key = "image"  # tfds feature with the image
    c.data.caption_key = "captions/text"  # tfds feature with the text, where coco_captions has it

    c.student = ConfigDict()
    c.student.path = "linear"  # inside a window: "linear" [paper] or "first_order" (Rectified Diffusion)

    c.student.lora = ConfigDict()
    c.student.lora.rank = 0  # trains low-rank factors of this rank beside frozen weights; 0: trains all weights [paper]
    c.student.lora.alpha = 0.0  # the factors' product counts alpha / rank; 0: alpha = rank
    c.student.lora.layers = r"attn\d\.to_(q|k|v|out\.0)\.weight$"  # regex, found in the names of the weights that get factors

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps between checkpoints
    c.checkpoint.keep = 2  # newest checkpoints kept, of each stage

    c.mesh = ConfigDict()
    c.mesh.data = 1  # devices over which only the batch is split
    c.mesh.fsdp = -1  # devices over which the state is split too; -1: all, since a whole state fills a chip
    c.mesh.tensor = 1  # devices over which layers are split
    c.mesh.rules = ((".*", "fsdp"),)  # ordered (regex, "fsdp" or "replicated") over parameter names

    c.export = ConfigDict()
    c.export.stages = (4, 2)  # stages whose student distill exports to <run>/export/stage-N [paper: 4 and 2 steps]

    c.evaluate = ConfigDict()  # evaluate knows only the digits so far: no effect yet
    c.evaluate.examples = 10_000  # images per row of the table [paper: of its SDXL table]; the Frechet distance depends on it
    c.evaluate.batch = 80  # images computed at once; divides examples and is a multiple of the devices
    c.evaluate.teacher_steps = (32, 8, 4, 2)  # rows of the base model; the first is the reference [paper: teacher at 32 steps]
    c.evaluate.student_steps = ((4, 4), (2, 2), (2, 4))  # rows (windows, steps) of the students [paper: 4 and 2 steps]
    c.evaluate.columns = 8  # images of each row in the picture
    c.evaluate.study = ConfigDict()  # of evaluate --study: how flows bend, and what errors of direction or magnitude cost
    c.evaluate.study.examples = 64  # prompts; each is drawn from every seed's noise
    c.evaluate.study.seeds = 3  # of the noise; spreads are over them
    c.evaluate.study.steps = 64  # of a path; a multiple of every stage's windows
    c.evaluate.study.perturbed_steps = 32  # of a perturbed sample
    c.evaluate.study.sizes = (0.05, 0.1, 0.2, 0.3, 0.5)  # relative errors of each step's velocity
    return c
