"""The small base model that configs/digits_flow.py distils: Stable Diffusion 3's shape on scikit-learn's handwritten digits.

    proreflow pretrain --config=digits_flow_base --out=runs/digits_flow_model

An MMDiT that is trained as a rectified flow, two CLIPs with projections that learn along, no T5. Result: a diffusers folder
that StableDiffusion3Pipeline opens (`from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)`).

Size: transformer 3.5 M weights, text encoders 0.2 M, autoencoder 0.2 M. A step of 64 latents is 0.47 seconds of two idle cores:
about 24 minutes in all, a minute of compiling, and 4 for the autoencoder on one core. On the emoji, which `make_emoji` fetches,
as configs/emoji_base.py has them:

    proreflow pretrain --config=digits_flow_base --out=runs/emoji_flow_model --config.name=emoji_flow_base \
        --config.data.kind=emoji --config.data.path=runs/data/emoji --config.data.resolution=64 --config.data.shift=0 \
        --config.vae.block_out_channels='(16, 32, 64, 96)' --config.vae.latent_channels=16 --config.vae.steps=2500 \
        --config.text.length=20 --config.text.merges=2500 --config.diffusion.steps=40000
"""

from ml_collections import ConfigDict

from configs.common import optimizer


def get_config() -> ConfigDict:
    """Every number of the pretraining."""
    c = ConfigDict()
    c.name = "digits_flow_base"  # run folder below `root`
    c.root = "runs"  # where run folders lie
    c.seed = 0  # of weights, shuffling and noise
    c.compilation_cache = ""  # folder or gs:// where compiled programs are kept for the next start; "": as the environment says
    c.start = ""  # diffusers folder whose weights and tokenizers to start from; "": random weights, a tokenizer of the captions
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

    c.vae = ConfigDict()  # diffusers' AutoencoderKL config, without quant convs, with a shift_factor
    c.vae.block_out_channels = (16, 32, 32)  # one resolution each, halved between: 32 px -> 8 x 8 latents
    c.vae.layers_per_block = 1  # ResNet blocks of each resolution (one more in the decoder)
    c.vae.latent_channels = 4  # as configs/digits_base.py has; 16 in Stable Diffusion 3
    c.vae.norm_num_groups = 8  # groups of the group norms
    c.vae.kl_weight = 1e-4  # of the KL term beside the mean squared error
    c.vae.steps = 800  # training steps
    c.vae.batch = 32  # images a step
    c.vae.optimizer = optimizer(learning_rate=2e-3, warmup_steps=50)

    c.transformer = ConfigDict()  # diffusers' SD3Transformer2DModel config
    c.transformer.patch_size = 2  # latent pixels a side: 8 x 8 latents are 16 image tokens
    c.transformer.num_layers = 6  # joint blocks; 24 in Stable Diffusion 3 medium
    c.transformer.num_attention_heads = 4  # heads, as many as layers in Stable Diffusion 3
    c.transformer.attention_head_dim = 32  # width of a head: both streams are 4 x 32 wide (24 x 64)
    c.transformer.qk_norm = "rms_norm"  # of queries and keys, as in 3.5; None: as in 3
    c.transformer.dual_attention_layers = ()  # blocks with a second attention of the image alone; the first 13 in 3.5 medium
    c.transformer.pos_embed_max_size = 4  # patches a side of the table of positions

    c.text = ConfigDict()  # transformers' CLIPTextModelWithProjection config, the first encoder
    c.text.hidden_size = 64  # width; the transformer reads both encoders' states side by side
    c.text.num_hidden_layers = 2  # transformer layers; the states before the last one are read
    c.text.num_attention_heads = 2  # heads
    c.text.intermediate_size = 128  # width of the MLPs
    c.text.projection_dim = 64  # width of the pooled state, which modulates every block
    c.text.length = 10  # tokens a prompt of either encoder: the longest caption has 9 (77 in Stable Diffusion)
    c.text.merges = 200  # most merges of the tokenizers' byte-pair encoding

    c.text_2 = ConfigDict()  # the second encoder, OpenCLIP's place; its tokenizer is the first one's
    c.text_2.hidden_size = 64  # width
    c.text_2.num_hidden_layers = 2  # transformer layers
    c.text_2.num_attention_heads = 2  # heads
    c.text_2.intermediate_size = 128  # width of the MLPs
    c.text_2.projection_dim = 64  # width of the pooled state

    c.diffusion = ConfigDict()
    c.diffusion.steps = 3000  # training steps
    c.diffusion.batch = 64  # latents a step
    c.diffusion.ema = 0.999  # decay of the averaged weights, which are the result
    c.diffusion.prompt_dropout = 0.1  # probability that a prompt is replaced by the empty one
    c.diffusion.optimizer = optimizer(learning_rate=1e-3, warmup_steps=300)

    c.flow = ConfigDict()  # a rectified flow: noise levels sigma(t) = shift t / (1 + (shift - 1) t)
    c.flow.shift = 1.0  # in training and of the scheduler; 3 in Stable Diffusion 3, whose latents have 256 times the pixels
    c.flow.logit_mean = 0.0  # of the logit-normal density of t (Esser et al. 2024, eq. 19) [as Stable Diffusion 3]
    c.flow.logit_std = 1.0  # its standard deviation [as Stable Diffusion 3]

    c.samples = ConfigDict()  # pictures at every checkpoint, in the run's folder and on its page; they change no number
    c.samples.rows = 3  # of pictures of the training, from all over it; 0: no pictures
    c.samples.columns = 4  # in a row; the autoencoder's reconstructions and what is drawn from the captions lie beside them
    c.samples.steps = 10  # network evaluations of a picture that is drawn (twice that with guidance)
    c.samples.guidance = 2.0  # classifier-free guidance scale of these

    c.checkpoint_every = 500  # steps between checkpoints
    c.log_every = 50  # steps between lines of metrics.jsonl
    return c
