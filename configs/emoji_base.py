"""A small text-to-image model of real pictures: Stable Diffusion's shape on 64 x 64 emoji in seven styles.

    proreflow pretrain --config=emoji_base --out=runs/emoji_base_model

Data: 2,650 pictures of 459 concepts (animals, food, smileys), which come with the package, 268 of them held out
(`data.emoji.hold_out`); `proreflow make_emoji` makes the set of all ten groups, 10,188 pictures of 1,911 concepts.
Size: UNet 7.1 M weights, text encoder 1.0 M, autoencoder 1.8 M; 20 MB in half precision. Latents are 8 x 8 x 16: as many
numbers at a quarter of the places, which a CPU works through faster; no level is 2 x 2, where its convolutions are slow.
Machine: 2 CPU cores, 27 images a second of the second part (a Xeon, idle): eleven hours. The model that comes with the package
was trained so, but for what its page says.

The length of the training is left open: the rate is constant and the result is an average, so any checkpoint is a model
(`--snapshot`, or a lower --config.diffusion.steps). A decay is appended by --config.diffusion.optimizer.schedule=linear with
warmup_steps set to the steps done and diffusion.steps to the new end.
"""

from ml_collections import ConfigDict

from configs.common import asset, optimizer


def get_config() -> ConfigDict:
    """Every number of the pretraining."""
    c = ConfigDict()
    c.name = "emoji_base"  # run folder below `root`
    c.root = "runs"  # where run folders lie
    c.seed = 0  # of weights, shuffling and noise
    c.compilation_cache = ""  # folder or gs:// where compiled programs are kept for the next start; "": as the environment says
    c.start = ""  # diffusers folder whose weights and tokenizer to start from; "": random weights, a tokenizer of the captions
    c.dtype = "float16"  # of the tensors in the folder that is written: "float32" or "float16"
    c.attention = "cached"  # its form: "xla", or "cached", faster on a CPU for more than 100 tokens

    c.data = ConfigDict()
    c.data.kind = "emoji"  # "digits" or "emoji"
    c.data.path = asset("emoji_pictures")  # folder with emoji64.npz and emoji64.json, as make_emoji writes it
    c.data.resolution = 64  # pixels a side
    c.data.shift = 0  # every image also moved by up to this many pixels each way: (2 shift + 1)^2 copies

    c.vae = ConfigDict()  # diffusers' AutoencoderKL config
    c.vae.block_out_channels = (16, 32, 64, 96)  # one resolution each, halved between: 64 px -> 8 x 8 latents
    c.vae.layers_per_block = 1  # ResNet blocks of each resolution (one more in the decoder)
    c.vae.latent_channels = 16  # as in Stable Diffusion 3
    c.vae.norm_num_groups = 8  # groups of the group norms
    c.vae.kl_weight = 1e-4  # of the KL term beside the mean squared error
    c.vae.steps = 7000  # training steps
    c.vae.batch = 32  # images a step
    c.vae.optimizer = optimizer(learning_rate=1e-3, warmup_steps=100)

    c.unet = ConfigDict()  # diffusers' UNet2DConditionModel config
    c.unet.block_out_channels = (96, 192)  # width of each resolution
    c.unet.down_block_types = ("CrossAttnDownBlock2D", "DownBlock2D")  # from fine to coarse
    c.unet.up_block_types = ("UpBlock2D", "CrossAttnUpBlock2D")  # from coarse to fine
    c.unet.layers_per_block = 1  # ResNet blocks of each resolution (one more on the way up)
    c.unet.attention_head_dim = 4  # number of heads, by diffusers' old misnomer
    c.unet.norm_num_groups = 16  # groups of the group norms

    c.text = ConfigDict()  # transformers' CLIPTextModel config
    c.text.hidden_size = 128  # width; also the UNet's cross_attention_dim
    c.text.num_hidden_layers = 3  # transformer layers
    c.text.num_attention_heads = 4  # heads
    c.text.intermediate_size = 512  # width of the MLPs
    c.text.length = 20  # tokens a prompt, start and end included (77 in Stable Diffusion)
    c.text.merges = 2500  # most merges of the tokenizer's byte-pair encoding

    c.diffusion = ConfigDict()
    c.diffusion.steps = 17000  # training steps
    c.diffusion.batch = 64  # latents a step
    c.diffusion.ema = 0.9995  # decay of the averaged weights, which are the result
    c.diffusion.prompt_dropout = 0.1  # probability that a prompt is replaced by the empty one
    c.diffusion.most_snr = 5.0  # signal-to-noise ratio from which the loss of eps is weighted down (5 is usual); 0: nowhere
    c.diffusion.optimizer = optimizer(learning_rate=7e-4, warmup_steps=300, schedule="constant")

    c.schedule = ConfigDict()  # Stable Diffusion's betas
    c.schedule.beta_schedule = "scaled_linear"  # name of the table
    c.schedule.beta_start = 0.00085  # first beta
    c.schedule.beta_end = 0.012  # last beta

    c.samples = ConfigDict()  # pictures at every checkpoint, in the run's folder and on its page; they change no number
    c.samples.rows = 3  # of pictures of the training, from all over it; 0: no pictures
    c.samples.columns = 4  # in a row; the autoencoder's reconstructions and what is drawn from the captions lie beside them
    c.samples.steps = 10  # network evaluations of a picture that is drawn (twice that with guidance)
    c.samples.guidance = 2.0  # classifier-free guidance scale of these

    c.checkpoint_every = 100  # steps between checkpoints
    c.log_every = 10  # steps between lines of metrics.jsonl
    return c
