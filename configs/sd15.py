"""Stable Diffusion 1.5 (512 px, epsilon) in 8, 4, then 2 windows: ProReflow-II's chain.

    proreflow distill --config=sd15
    proreflow sample --config=sd15 --stage=4 --guidance=4 --prompt="a red fox in snow" --out=fox.png
    proreflow export --config=sd15 --stage=4 --form=single-file --dtype=float16

distill makes the pairs, trains, and leaves diffusers folders in runs/sd15/export; run it again to resume. It needs
prompts.txt, one prompt a line, and no images. Take the prompts you care about, tens of thousands if you can, or COCO's
captions:

    unzip -p annotations_trainval2017.zip annotations/captions_train2017.json |
        python -c "import json, sys; [print(*a['caption'].split()) for a in json.load(sys.stdin)['annotations']]" > prompts.txt

[paper] marks what the paper states; everything else is this project's choice. Nothing of this has run on a TPU, and no chain
of this size has been trained: reasoned settings, not a result.

Which recipe. Take this one to draw in 4 or 2 steps: students are taught at window starts alone, where they are asked, from
whole trajectories, and so make the next one's pairs in one Euler step a window, 8 and 4 forwards for the base model's 32. Take
`--config=sd15:paper` (every SD config has that form; runs/sd15-paper) to reproduce the paper, whose times are uniform and whose
windows start at noised images: it needs a dataset, and draws at any number of steps. Numbers: docs/reproduce.md, "The lab".

Slices. Ask `plan` before you rent: it compiles these jobs for a slice (docs/plan.md). A step that makes its own pairs, 8
images at once on a chip of v5e:4x4, takes 8.7 of 15.75 GiB there. Counted by hand, GB a chip, upper bounds: split over the
chips the training state, 16 bytes a weight (float32 weights, two moments, average: 13.8), float32 gradients (3.4) and the
base model in float32 (3.4); whole on each chip working weights and gradients in bfloat16 (3.4) and the text encoder (0.5);
activations, 6.3 an image (4.3 of them scores, which fused attention does not keep), for batch / chips / accumulation images:

    v5p-8     4 chips   95 GB   9 + 8 x 6.3 = 60: meant for this one, whose chips share a host
    v6e-8     8 chips   32 GB   7 + 2 x 6.3 = 19: --config.train.accumulation=16
    v5e-16   16 chips   16 GB   8 at once as above: --config.train.accumulation=2; four hosts, which are untried

Work: pairs 131,072 x (32 + 8 + 4) forwards x 0.80 TFLOP = 4.6 million TFLOP; training 3 stages x 10,000 steps x 256 images
x 3 forwards' worth x 0.80 = 18.5 million. On v5p-8 (4 x 459 TFLOP/s) that is 3.5 hours at full speed, 6.6 at the 52.9 % of
the peak that the compiler's cycles give that step on v5e. Nothing was measured. Disk: pairs 39 + 21 + 13 GB, two checkpoints
of 13.8 GB in each of three stages.

Why stored pairs from noise: a record is a whole trajectory, 9 states x 64 x 64 x 4 x 2 bytes = 295 KB, and costs 32 forwards.
A stage reads it 10,000 x 256 / 131,072 = 20 times, each time another window and time: 1.6 forwards an example beside the 3 of
the student's own step. Online from noise pays 32, and the teacher works on the whole batch inside the train step's memory.

With images instead (PeRFlow: one window from a noised image; coco_captions by tfds, whose build needs TensorFlow), a million
records of 66 KB are as many pairs. Each costs 4 forwards (later 8) and 1.1 TFLOP of the VAE's encoder; disk 69 GB a stage:

    tfds build coco_captions --file_format=array_record --data_dir=data
    --config.data.kind=tfds --config.data.path=data/coco_captions/2014/1.1.0 --config.pairs.start=data
    --config.pairs.examples=1048576 --config.pairs.shard_size=4096

Tars, parquet and folders with images: docs/data.md.
"""

from ml_collections import ConfigDict

from configs.common import in_form, optimizer, stable_diffusion


def get_config(form: str = "") -> ConfigDict:
    """What was decided for SD 1.5; the rest is common.stable_diffusion's. form: in_form's."""
    c = stable_diffusion("sd15")
    c.model.path = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # hub id, diffusers folder, or single .safetensors file
    c.data.resolution = 512  # pixels a side, the model's own
    c.student.prediction = "ddim_eps"  # an epsilon model keeps its words: the untrained student is the base model

    c.pairs.examples = 131_072  # records a stage; 8 windows each are a million pairs in the first stage
    c.pairs.shard_size = 512  # records a shard, 151 MB; a kill costs at most one shard
    c.pairs.batch = 64  # trajectories at once, 16 a chip on v5p-8; multiple of devices, factor or multiple of shard_size

    c.train.steps = 10_000  # updates per stage (the paper does not say): 2.6 million examples where PeRFlow took 4.1
    c.train.batch = 256  # global batch (the paper does not say); PeRFlow took 1024 for 4,000 steps
    c.train.accumulation = 8  # parts a batch is computed in: 8 images a chip on v5p-8; divides batch / devices
    c.train.remat = "none"  # all is kept for the backward pass: 8 images a chip fit 16 GB so (docs/plan.md)

    c.optimizer = optimizer(learning_rate=4e-5, warmup_steps=500, beta2=0.999)  # PeRFlow's 8e-5 by the root of the batch ratio
    return in_form(c, form)
