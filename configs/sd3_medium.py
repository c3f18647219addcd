"""Stable Diffusion 3 medium (1024 px, a rectified flow, three text encoders) in 8, 4, then 2 windows.

    proreflow cache --config=sd3_medium --config.data.kind=prompts --config.data.path=prompts.txt --out=runs/sd3_text
    proreflow distill --config=sd3_medium
    proreflow sample --config=sd3_medium --stage=4 --guidance=4 --prompt="a red fox in snow" --out=fox.png
    proreflow export --config=sd3_medium --stage=4 --form=single-file --dtype=float16

The older sibling of configs/sd35_medium.py, whose page holds for it too: text, slices, flow. It has no second attention and no
norm of queries and keys: 2.03 billion weights for 2.24, four fifths of the work. Its scores may be large, and then attention's
forward kernel takes a fifth to a half more time than counted here (models/narrow_kernel.py). [paper] as there. Nothing of this
has run on a TPU, and no chain of this size has been trained: reasoned settings, not a result.

Slices. `plan` was asked for its sibling's step, which is larger: 8.83 of 15.75 GiB a chip on v5e:4x4,
9.57 of 31.24 on v6e:4x4.

    v5e-16   16 chips   16 GB  4 at once as above: meant for this one; four hosts, which are untried
    v6e-16   16 chips   32 GB  4 at once as above; four hosts, which are untried

Work: pairs 32,768 x (32 + 8 + 4) forwards x 8.90 TFLOP = 12.8 million TFLOP; training 3 stages x 5,000 steps x 128 images x 3
forwards' worth x 8.90 = 51.3 million. On v5e-16 (16 x 197 TFLOP/s) that is 5.6 hours at full speed, 9.6 at the 58.6 % of the
peak that the compiler's cycles give its sibling's step. Nothing was measured.
Disk: text 89 GB, pairs 155 + 86 + 52 GB, and two checkpoints of 32 GB in each of three stages.
"""

from ml_collections import ConfigDict

from configs.common import JOINT_LAYERS, in_form, optimizer, stable_diffusion


def get_config(form: str = "") -> ConfigDict:
    """What was decided for SD 3 medium; the rest is common's, numbers are configs/sd35_medium.py's. form: in_form's."""
    c = stable_diffusion("sd3_medium")
    c.model.path = "stabilityai/stable-diffusion-3-medium-diffusers"  # hub id, diffusers folder, or single .safetensors file
    c.data.kind = "cached"  # text states of prompts, by the verb cache
    c.data.path = "runs/sd3_text"  # its --out
    c.data.resolution = 1024  # pixels a side, the model's own
    c.cache.text = True  # the text encoders' states are what the cache is for
    c.student.prediction = "velocity"  # the base is a flow and says the same: the untrained student is N Euler steps of it
    c.student.lora.layers = JOINT_LAYERS  # regex: all of the family's attention, image and text

    c.pairs.examples = 32_768  # records a stage; 8 windows each are a quarter of a million pairs in the first stage
    c.pairs.shard_size = 128  # records a shard, 604 MB; a kill costs at most one shard
    c.pairs.batch = 64  # trajectories at once, 4 a chip on 16 chips; multiple of devices, factor or multiple of shard_size

    c.train.steps = 5_000  # updates per stage (the paper does not say): 0.6 million examples, as configs/sdxl.py
    c.train.batch = 128  # global batch (the paper does not say), as configs/sdxl.py
    c.train.accumulation = 2  # parts a batch is computed in: 4 images a chip on 16 chips; divides batch / devices

    c.evaluate.batch = 16  # images computed at once: they are larger than SD 1.5's

    c.optimizer = optimizer(learning_rate=2.8e-5, warmup_steps=250, beta2=0.999)  # configs/sdxl.py's: nobody has looked
    return in_form(c, form)
