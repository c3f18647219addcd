"""Stable Diffusion 3.5 medium (1024 px, a rectified flow, three text encoders) in 8, 4, then 2 windows.

    proreflow cache --config=sd35_medium --config.data.kind=prompts --config.data.path=prompts.txt --out=runs/sd35_text
    proreflow distill --config=sd35_medium
    proreflow sample --config=sd35_medium --stage=4 --guidance=4 --prompt="a red fox in snow" --out=fox.png
    proreflow export --config=sd35_medium --stage=4 --form=single-file --dtype=bfloat16

Needs prompts.txt, one prompt a line (configs/sd15.py says from where), and a yes to the model's licence on the hub. [paper]
marks what the paper states of UNets: whether its method holds beyond them is this config's question. Nothing of this has run
on a TPU, and no chain of this size has been trained: reasoned settings, not a result.

Text. T5-XXL is 4.8 billion weights, 19 GB in float32: more than a v5e has. So cache runs the encoders over the prompts once,
333 x 4,096 and 2,048 numbers of 2 bytes each, 2.7 MB a prompt and 89 GB for 32,768, and distill holds no encoder. Without T5
(a folder without text_encoder_3) 0.6 MB a prompt, 6 % less work, and a student that was taught without.

Slices. What `plan` said (docs/plan.md) of a step that reads stored pairs and cached text with T5's, 4 images at once on a chip:
8.83 of 15.75 GiB and 18.3 ms an image on v5e:4x4, 58.6 % of the peak; 9.57 of 31.24 GiB and 7.9 ms on v6e:4x4, 29 %.

    v5e-16   16 chips   16 GB  4 at once as above: meant for this one; four hosts, which are untried
    v6e-16   16 chips   32 GB  4 at once as above; four hosts, which are untried

By hand, GB in all, split over the chips: state 35.9 (2.24 billion weights, float32, two moments, average), gradients 9.0, and
the base model 9.0 while it makes pairs. Whole on each chip: one block's weights in bfloat16, 0.2.

Work: pairs 32,768 x (32 + 8 + 4) forwards x 11.25 TFLOP = 16.2 million TFLOP; training 3 stages x 5,000 steps x 128 images x
3 forwards' worth x 11.25 = 64.8 million. On v5e-16 (16 x 197 TFLOP/s) that is 7.1 hours at full speed, 12.2 at the 58.6 % of
the peak that the compiler's cycles give that step. Nothing was measured. Amounts are configs/sdxl.py's.
Disk: text 89 GB, pairs 155 + 86 + 52 GB, and two checkpoints of 36 GB in each of three stages. A record, 9 states x 128 x 128
x 16 x 2 bytes = 4.7 MB, is read 20 times a stage, as SD 1.5's.

The flow. The model's shift of 3 is its scheduler's, and windows are even in the time before the shift: noisy ones are short in
sigma. For another resolution change sample_size in transformer/config.json (64: 512 px) and the shift in scheduler_config.json,
which SD 3's paper moves by the root of the pixels (1.5 there); a scheduler that moves it by itself (`use_dynamic_shifting`) is
read at the model's own resolution. A student predicts the velocity, so its export needs no scheduler of ours.
"""

from ml_collections import ConfigDict

from configs.common import JOINT_LAYERS, in_form, optimizer, stable_diffusion


def get_config(form: str = "") -> ConfigDict:
    """What was decided for SD 3.5 medium; the rest is common.stable_diffusion's. form: in_form's."""
    c = stable_diffusion("sd35_medium")
    c.model.path = "stabilityai/stable-diffusion-3.5-medium"  # hub id, diffusers folder, or single .safetensors file
    c.data.kind = "cached"  # text states of prompts, by the verb cache
    c.data.path = "runs/sd35_text"  # its --out
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
