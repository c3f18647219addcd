"""Stable Diffusion XL (1024 px, epsilon, two text encoders) in 8, 4, then 2 windows: ProReflow-II's chain.

    proreflow distill --config=sdxl
    proreflow sample --config=sdxl --stage=4 --guidance=4 --prompt="a red fox in snow" --out=fox.png
    proreflow export --config=sdxl --stage=4 --form=single-file --dtype=float16

Needs prompts.txt, one prompt a line; configs/sd15.py says where prompts or images come from, and why pairs are stored.
[paper] marks what the paper states (SDXL reuses SD 1.5's settings); everything else is this project's choice. Nothing of this
has run on a TPU, and no chain of this size has been trained: reasoned settings, not a result.

Slices. What `plan` said (docs/plan.md) of a step on stored pairs: 8 images at once, in which a TPU's convolutions are laid out,
take 26.6 of 95.7 GiB at most on a chip of v5p:2x2x1, and 19.8 of 31.2 on one of v6e:4x4.

    v5p-8     4 chips   95 GB  8 at once as above: meant for this one, whose chips share a host
    v5p-32   16 chips   95 GB  8 at once as above, with less state: --config.train.accumulation=1, four hosts, which are untried
    v6e-16   16 chips   32 GB  8 at once as above: --config.train.accumulation=1 --config.pairs.batch=128, four hosts, untried

Work: pairs 32,768 x (32 + 8 + 4) forwards x 6.76 TFLOP = 9.7 million TFLOP; training 3 stages x 5,000 steps x 128 images x 3
forwards' worth x 6.76 = 38.9 million. On v5p-8 (4 x 459 TFLOP/s) that is 7.4 hours at full speed, 13 at the 58.2 % of the peak
that the compiler's cycles give a step that makes its own pairs. Nothing was measured. A quarter of SD 1.5's examples, since an
image costs 8.4 times as much; a record, 9 states x 128 x 128 x 4 x 2 bytes = 1.18 MB, is read 20 times a stage as there.
Disk: pairs 39 + 21 + 13 GB, and two checkpoints of 41 GB in each of three stages.
"""

from ml_collections import ConfigDict

from configs.common import in_form, optimizer, stable_diffusion


def get_config(form: str = "") -> ConfigDict:
    """What was decided for SDXL; the rest is common.stable_diffusion's. form: in_form's."""
    c = stable_diffusion("sdxl")
    c.model.path = "stabilityai/stable-diffusion-xl-base-1.0"  # hub id, diffusers folder, or single .safetensors file
    c.data.resolution = 1024  # pixels a side, the model's own; so are the sizes in `conditioning`, by (0, 0)
    c.student.prediction = "ddim_eps"  # an epsilon model keeps its words: the untrained student is the base model

    c.pairs.examples = 32_768  # records a stage; 8 windows each are a quarter of a million pairs in the first stage
    c.pairs.shard_size = 128  # records a shard, 151 MB; a kill costs at most one shard
    c.pairs.batch = 32  # trajectories at once, 8 a chip on v5p-8; multiple of devices, factor or multiple of shard_size

    c.train.steps = 5_000  # updates per stage (the paper does not say): 0.6 million examples, a quarter of configs/sd15.py's
    c.train.batch = 128  # global batch (the paper does not say); PeRFlow's SDXL took 16 a GPU
    c.train.accumulation = 4  # parts a batch is computed in: 8 images a chip on v5p-8; divides batch / devices

    c.mesh.teacher = "whole"  # of a step that makes its own pairs: 4.8 GiB a chip, and its weights are not sent about

    c.evaluate.batch = 16  # images computed at once: they are larger than SD 1.5's

    c.optimizer = optimizer(learning_rate=2.8e-5, warmup_steps=250, beta2=0.999)  # PeRFlow's 8e-5 x root of batch ratio
    return in_form(c, form)
