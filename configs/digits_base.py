"""The small base model that configs/digits.py distils: Stable Diffusion's shape on scikit-learn's handwritten digits.

    proreflow pretrain --config=digits_base --out=proreflow_jax/assets/digits

Machine and time: see the README of proreflow_jax/assets. Result: a diffusers folder that StableDiffusionPipeline opens.
"""

from ml_collections import ConfigDict

from configs.common import optimizer


def get_config() -> ConfigDict:
    """Every number of the pretraining."""
    c = ConfigDict()
    c.name = "digits_base"  # run folder below `root`
    c.root = "runs"  # where run folders lie
    c.seed = 0  # of weights, shuffling and noise
    c.compilation_cache = ""  # folder or gs:// where compiled programs are kept for the next start; "": as the environment says
    c.start = ""  # diffusers folder whose weights and tokenizer to start from; "": random weights, a tokenizer of the captions
    c.dtype = "float32"  # of the tensors in the folder that is written: "float32" or "float16"
    c.attention = "xla"  # its form: "xla", or "cached", faster on a CPU for more than 100 tokens

    c.data = ConfigDict()
    c.data.kind = "digits"  # "digits" or "emoji"
    c.data.path = "runs/data/digits"  # prepared tfds dataset; written here on first use
    c.data.split = "train"  # tfds split
    c.data.image_key = "image"  # tfds feature with the image
    c.data.caption_key = "caption"  # tfds feature with the text
    c.data.resolution = 32  # pixels a side
    c.data.shift = 1  # every image also moved by up to this many pixels each way: (2 shift + 1)^2 copies

    c.vae = ConfigDict()  # diffusers' AutoencoderKL config
    c.vae.block_out_channels = (16, 32, 32)  # one resolution each, halved between: 32 px -> 8 x 8 latents
    c.vae.layers_per_block = 1  # ResNet blocks of each resolution (one more in the decoder)
    c.vae.latent_channels = 4  # as in Stable Diffusion
    c.vae.norm_num_groups = 8  # groups of the group norms
    c.vae.kl_weight = 1e-4  # of the KL term beside the mean squared error
    c.vae.steps = 800  # training steps
    c.vae.batch = 32  # images a step
    c.vae.optimizer = optimizer(learning_rate=2e-3, warmup_steps=50)

    c.unet = ConfigDict()  # diffusers' UNet2DConditionModel config
    c.unet.block_out_channels = (32, 64)  # width of each resolution
    c.unet.down_block_types = ("CrossAttnDownBlock2D", "DownBlock2D")  # from fine to coarse
    c.unet.up_block_types = ("UpBlock2D", "CrossAttnUpBlock2D")  # from coarse to fine
    c.unet.layers_per_block = 1  # ResNet blocks of each resolution (one more on the way up)
    c.unet.attention_head_dim = 4  # number of heads, by diffusers' old misnomer
    c.unet.norm_num_groups = 8  # groups of the group norms

    c.text = ConfigDict()  # transformers' CLIPTextModel config
    c.text.hidden_size = 64  # width; also the UNet's cross_attention_dim
    c.text.num_hidden_layers = 2  # transformer layers
    c.text.num_attention_heads = 4  # heads
    c.text.intermediate_size = 128  # width of the MLPs
    c.text.length = 16  # tokens a prompt, start and end included (77 in Stable Diffusion)
    c.text.merges = 200  # most merges of the tokenizer's byte-pair encoding

    c.diffusion = ConfigDict()
    c.diffusion.steps = 5500  # training steps
    c.diffusion.batch = 128  # latents a step
    c.diffusion.ema = 0.999  # decay of the averaged weights, which are the result
    c.diffusion.prompt_dropout = 0.1  # probability that a prompt is replaced by the empty one
    c.diffusion.most_snr = 0.0  # signal-to-noise ratio from which the loss of eps is weighted down (5 is usual); 0: nowhere
    c.diffusion.optimizer = optimizer(learning_rate=2e-3, warmup_steps=100)

    c.schedule = ConfigDict()  # Stable Diffusion's betas
    c.schedule.beta_schedule = "scaled_linear"  # name of the table
    c.schedule.beta_start = 0.00085  # first beta
    c.schedule.beta_end = 0.012  # last beta

    c.samples = ConfigDict()  # pictures at every checkpoint, in the run's folder and on its page; they change no number
    c.samples.rows = 3  # of pictures of the training, from all over it; 0: no pictures
    c.samples.columns = 4  # in a row; the autoencoder's reconstructions and what is drawn from the captions lie beside them
    c.samples.steps = 10  # network evaluations of a picture that is drawn (twice that with guidance)
    c.samples.guidance = 2.0  # classifier-free guidance scale of these

    c.checkpoint_every = 500  # steps between checkpoints
    c.log_every = 50  # steps between lines of metrics.jsonl
    return c
