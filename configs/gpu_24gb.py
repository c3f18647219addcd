r"""One graphics card of 24 GB (RTX 3090, 4090, A5000): a model of SD 1.5's kind in 8, 4, then 2 windows, by a LoRA.

    proreflow distill --config=gpu_24gb --config.model.path=MY.safetensors
    proreflow sample --config=gpu_24gb --config.model.path=MY.safetensors --stage=4 --guidance=4 --prompt="a red fox"
    proreflow export --config=gpu_24gb --config.model.path=MY.safetensors --stage=4 --form=lora

MY.safetensors and prompts.txt are as in configs/finetune.py, and so are the choices that are not named here. What is trained
are the factors of a LoRA of rank 64 (12.8 million numbers), so the result is a LoRA as it is. Nothing of this has run on a GPU:
reasoned settings, not a result.

GB, upper bounds counted by hand as in configs/sd15.py: base model in float32 3.4, its bfloat16 copy 1.7, text encoder 0.5, the
factors' state 0.2, activations 6.3 an image (4.3 of them scores, which cuDNN's attention does not keep):

    6 + 2 x 6.3 = 19 with scores kept, 10 without

jax takes three quarters of a card at its start, 18 GB of 24. XLA_PYTHON_CLIENT_MEM_FRACTION=.92 in front of the command gives
it more. Out of memory: --config.train.accumulation=16 is one image at once, with the same result. A card of 16 GB wants that,
and --config.pairs.batch=4.

Work: pairs 16,384 x (32 + 8 + 4) forwards x 0.80 TFLOP = 0.6 million TFLOP; training 3 stages x 4,000 steps x 16 images x 3
forwards' worth x 0.80 = 0.5 million. At 40 % of the peak (165 TFLOP/s of a 4090, 71 of a 3090, bfloat16) that is 4.4 hours, or
10. Counted, not measured. Disk: pairs 5 + 3 + 2 GB, checkpoints of 0.2 GB.
"""

from ml_collections import ConfigDict

from configs.common import in_form, optimizer, stable_diffusion


def get_config(form: str = "") -> ConfigDict:
    """What was decided for one small card; the rest is common.stable_diffusion's. form: in_form's."""
    c = stable_diffusion("gpu_24gb")
    c.model.path = "MY.safetensors"  # yours: single .safetensors file, diffusers folder, or hub id
    c.data.resolution = 512  # pixels a side, the model's own
    c.student.prediction = "ddim_eps"  # an epsilon model keeps its words: the untrained student is the base model
    c.student.lora.rank = 64  # what is trained: factors of the attention layers; 0 would train all weights, 21 GB more

    c.pairs.examples = 16_384  # records a stage; 8 windows each are 131,072 pairs in the first stage
    c.pairs.shard_size = 256  # records a shard, 76 MB; a kill costs at most one shard
    c.pairs.batch = 8  # trajectories computed at once

    c.train.steps = 4_000  # updates per stage: 64,000 examples; each record is read 4 times
    c.train.batch = 16  # an eighth of configs/finetune.py's
    c.train.accumulation = 8  # parts a batch is computed in: 2 images at once

    c.optimizer = optimizer(learning_rate=1e-4, warmup_steps=200, beta2=0.999)  # factors want a higher rate: a guess
    return in_form(c, form)
