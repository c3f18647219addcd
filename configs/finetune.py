r"""My fine-tune: a model of SD 1.5's kind that you bring, in 8, 4, then 2 windows, at a fifth of configs/sd15.py's work.

    proreflow distill --config=finetune --config.model.path=MY.safetensors
    proreflow sample --config=finetune --config.model.path=MY.safetensors --stage=4 \
        --guidance=4 --prompt="a red fox in my style" --out=fox.png
    proreflow export --config=finetune --config.model.path=MY.safetensors --stage=4 --form=single-file

MY.safetensors is a checkpoint as A1111 and ComfyUI use; a diffusers folder or a hub id does as well. A single file brings no
configs and no tokenizer: they are SD 1.5's from the hub, or those of --config.model.like=FOLDER. prompts.txt holds one prompt a
line, with the words that call your style: the base model draws the pairs itself, so no image of it is needed.

Of another kind?
    SD 2.1, 768 px  --config.student.prediction=ddim_v --config.data.resolution=768 --config.train.accumulation=16
    the same, if its own files do not say that it predicts v: also --config.model.prediction_type=v_prediction
    SDXL            configs/sdxl.py with --config.model.path=MY.safetensors
An accelerated SD 1.5 may do without any training of yours: export it by --form=delta, and `merge` it onto your fine-tune.

[paper] marks what the paper states; everything else is this project's choice. Nothing of this has run on a TPU: reasoned
settings, not a result. Why pairs are stored from noise, and how the GB are counted: configs/sd15.py.

    v6e-8     8 chips   32 GB   7 + 2 x 6.3 = 19: meant for this one, whose chips share a host
    v5p-8     4 chips   95 GB   9 + 4 x 6.3 = 34
    v5e-8     8 chips   16 GB   3 + 1 x 6.3 = 9: by LoRA: --config.student.lora.rank=64 --config.train.accumulation=16

LoRA (Hu et al. 2021): at rank 64 the attention layers' factors are 12.8 million numbers, a state of 0.2 GB instead of 13.8, and
checkpoints of 0.2 GB; the base model stays frozen, split over the chips as always, and activations are as before: on v5e-8 9 GB
instead of 13. It pays where memory is short or the result shall be a LoRA (export --form=lora needs no SVD then). Factors want
a higher rate, by our guess --config.optimizer.learning_rate=1e-4. Whether rank 64 is enough is unknown: the paper trains all
weights.

Work: pairs 32,768 x (32 + 8 + 4) forwards x 0.80 TFLOP = 1.16 million TFLOP; training 3 stages x 4,000 steps x 128 images x 3
forwards' worth x 0.80 = 3.7 million. On v6e-8 (8 x 918 TFLOP/s) that is 0.18 hours at full speed, 0.35 at the 52.9 % of the
peak that the compiler's cycles give SD 1.5's step on v5e (configs/sd15.py). Nothing was measured.
Compiling comes on top. Disk: pairs 10 + 5 + 3 GB, and two checkpoints of 13.8 GB in each of three stages.
"""

from ml_collections import ConfigDict

from configs.common import in_form, optimizer, stable_diffusion


def get_config(form: str = "") -> ConfigDict:
    """What was decided for a fine-tune of SD 1.5; the rest is common.stable_diffusion's. form: in_form's."""
    c = stable_diffusion("finetune")
    c.model.path = "MY.safetensors"  # yours: single .safetensors file, diffusers folder, or hub id
    c.data.resolution = 512  # pixels a side, the model's own
    c.student.prediction = "ddim_eps"  # an epsilon model keeps its words: the untrained student is the base model

    c.pairs.examples = 32_768  # records a stage; 8 windows each are a quarter of a million pairs in the first stage
    c.pairs.shard_size = 512  # records a shard, 151 MB; a kill costs at most one shard
    c.pairs.batch = 32  # trajectories at once, 4 a chip on 8 chips; multiple of devices, factor or multiple of shard_size

    c.train.steps = 4_000  # updates per stage (the paper does not say): 0.5 million examples, a fifth of configs/sd15.py's
    c.train.batch = 128  # global batch (the paper does not say); half of configs/sd15.py's
    c.train.accumulation = 8  # parts a batch is computed in: 2 images a chip on v6e-8; divides batch / devices

    c.optimizer = optimizer(learning_rate=2.8e-5, warmup_steps=200, beta2=0.999)  # PeRFlow's 8e-5 x root of batch ratio
    return in_form(c, form)
