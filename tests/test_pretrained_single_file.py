"""The single-file layout: diffusers' own converters read back what we wrote, bit for bit, and nothing is lost in silence."""

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as oracle
from torch_reference import randomise, tensors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from proreflow_jax.pretrained import single_file

ATTENTION, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def unet_config(levels: list[tuple[str, str]], widths: list[int], **more) -> dict:
    """Kinds of block by level, finest first."""
    blocks = dict(down_block_types=[down for down, _ in levels], up_block_types=[up for _, up in reversed(levels)])
    return dict(block_out_channels=widths, **blocks, **more)


TINY = dict(norm_num_groups=2, attention_head_dim=2, cross_attention_dim=6, layers_per_block=2)
ADDED = dict(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=30)
UNETS = {
    "v1": unet_config([ATTENTION, ATTENTION, PLAIN], [4, 8, 8], **TINY),
    "v2": unet_config([ATTENTION, PLAIN], [4, 8], use_linear_projection=True, **TINY),
    "xl": unet_config(
        [PLAIN, ATTENTION, ATTENTION],
        [4, 8, 8],
        use_linear_projection=True,
        transformer_layers_per_block=[1, 1, 2],
        **TINY,
        **ADDED,
    ),
}
BIG = {  # SD 1.5 and SDXL base, from their config.json
    "v1": unet_config([ATTENTION] * 3 + [PLAIN], [320, 640, 1280, 1280], attention_head_dim=8, cross_attention_dim=768),
    "xl": unet_config(
        [PLAIN, ATTENTION, ATTENTION],
        [320, 640, 1280],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        transformer_layers_per_block=[1, 2, 10],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
KNOWN = {  # names and shapes as the published files have them
    "v1": {
        "time_embed.0.weight": (1280, 320),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "middle_block.2.emb_layers.1.weight": (1280, 1280),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "out.2.weight": (4, 320, 3, 3),
    },
    "xl": {
        "label_emb.0.0.weight": (1280, 2816),
        "label_emb.0.2.bias": (1280,),
        "input_blocks.4.1.proj_in.weight": (640, 640),
        "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.1.transformer_blocks.1.ff.net.0.proj.weight": (5120, 640),
        "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
    },
}
VAE = dict(
    block_out_channels=[4, 8, 8],
    layers_per_block=2,
    down_block_types=["DownEncoderBlock2D"] * 3,
    up_block_types=["UpDecoderBlock2D"] * 3,
    latent_channels=3,
    norm_num_groups=2,
)
CLIP = dict(hidden_size=6, vocab_size=11, num_attention_heads=2, intermediate_size=8, num_hidden_layers=2)
CLIP |= dict(max_position_embeddings=7, bos_token_id=0, eos_token_id=1, pad_token_id=1)
PROJECTED = dict(projection_dim=6, architectures=["CLIPTextModelWithProjection"])
OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def clip(config: dict) -> dict[str, np.ndarray]:
    """A random text encoder, its names with `text_model.` as files have them."""
    kind = CLIPTextModelWithProjection if config.get("architectures") else CLIPTextModel
    found = tensors(randomise(kind(CLIPTextConfig(**config))))
    return {name if name.startswith("text_") else f"text_model.{name}": value for name, value in found.items()}


CASES = {  # id -> component, family, config, how to draw its tensors
    **{f"unet {f}": ("unet", f, c, lambda c: tensors(randomise(UNet2DConditionModel(**c)))) for f, c in UNETS.items()},
    "vae": ("vae", "v1", VAE, lambda c: tensors(randomise(AutoencoderKL(**c)))),
    "clip v1": ("text_encoder", "v1", CLIP, clip),
    "clip xl": ("text_encoder", "xl", CLIP, clip),
    "open clip v2": ("text_encoder", "v2", CLIP, clip),
    "open clip xl": ("text_encoder_2", "xl", CLIP | PROJECTED, clip),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request) -> tuple[str, str, dict, dict[str, np.ndarray]]:
    """(component, family, config, random tensors of diffusers' own network)."""
    component, family, config, draw = request.param
    return component, family, config, draw(config)


def converted(component: str, family: str, config: dict, file: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What diffusers makes of a single file."""
    file = {name: torch.from_numpy(value) for name, value in file.items()}
    if component == "unet":
        found = oracle.convert_ldm_unet_checkpoint(file, config)
    elif component == "vae":
        found = oracle.convert_ldm_vae_checkpoint(file, config)
    elif (prefix := single_file.PREFIXES[family][component]).endswith("transformer."):
        found = oracle.convert_ldm_clip_checkpoint(file)
    else:
        found = oracle.convert_open_clip_checkpoint(CLIPTextModel(CLIPTextConfig(**config)), file, prefix)
    return {name: value.numpy() for name, value in found.items()}


def same(ours: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> None:
    """Equal names, shapes, dtypes and bits; ours C-contiguous."""
    assert sorted(ours) == sorted(reference)
    for name, value in ours.items():
        assert value.flags.c_contiguous, name
        assert (value.shape, value.dtype) == (reference[name].shape, reference[name].dtype), name
        assert value.tobytes() == np.ascontiguousarray(reference[name]).tobytes(), name


class Lazy(Mapping):
    """A file of which tensors are taken one by one; remembers which."""

    def __init__(self, content: dict) -> None:
        self.content, self.taken = content, []

    def __getitem__(self, name: str) -> np.ndarray:
        self.taken.append(name)
        return self.content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)


def test_diffusers_reads_back_what_we_wrote(case):
    component, family, config, source = case
    file = single_file.to_original(component, source, config, family)
    assert all(name.startswith(single_file.PREFIXES[family][component]) for name in file)
    assert all(value.flags.c_contiguous for value in file.values())
    same({n: np.ascontiguousarray(v) for n, v in converted(component, family, config, file).items()}, source)


def test_the_round_trip_keeps_every_bit(case):
    component, family, config, source = case
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in source.items()}
    for start in (source, half):
        same(
            single_file.from_original(component, single_file.to_original(component, start, config, family), config, family),
            start,
        )


def test_one_component_is_taken_tensor_by_tensor_from_a_whole_file(case):
    component, family, config, source = case
    mine = single_file.to_original(component, source, config, family)
    others = ("model_ema.diffusion_modelconv_inweight", "alphas_cumprod", "betas", "cond_stage_model.logit_scale")
    file = Lazy(mine | dict.fromkeys(others))
    same(single_file.from_original(component, file, config, family), source)
    assert set(file.taken) == set(mine)


def test_a_name_without_a_place_is_refused_in_one_line(case):
    component, family, config, source = case
    for stray in ("lora_up.weight", f"{next(iter(source))}.alpha", "up_blocks.0.attentions.7.proj_in.weight"):
        with pytest.raises(ValueError, match=f"^{component} .{family}.: 1 names left over.* {stray}$"):
            single_file.to_original(component, source | {stray: np.zeros(1)}, config, family)
        file = single_file.to_original(component, source, config, family)
        file[single_file.PREFIXES[family][component] + stray] = np.zeros(1)
        with pytest.raises(ValueError, match=f"^{component} .{family}.: 1 names left over.* {stray}$"):
            single_file.from_original(component, file, config, family)


@pytest.mark.parametrize(("family", "count"), [("v1", 686), ("xl", 1680)])
def test_the_published_unets_have_these_names_and_shapes(family, count):
    with torch.device("meta"):
        shapes = {n: tuple(v.shape) for n, v in UNet2DConditionModel(**BIG[family]).state_dict().items()}
    room = np.empty(max(np.prod(shape) for shape in shapes.values()), np.int8)  # one memory for all, never touched
    source = {n: room[: np.prod(shape)].reshape(shape) for n, shape in shapes.items()}
    file = single_file.to_original("unet", source, BIG[family], family)
    found = {name.removeprefix("model.diffusion_model."): value.shape for name, value in file.items()}
    assert len(found) == count
    assert {name: found.get(name) for name in KNOWN[family]} == KNOWN[family]
    back = single_file.from_original("unet", file, BIG[family], family)
    assert {n: value.shape for n, value in back.items()} == shapes


def test_the_vae_attention_is_a_convolution_and_its_levels_turn_round():
    source = tensors(randomise(AutoencoderKL(**VAE)))
    file = single_file.to_original("vae", source, VAE, "xl")
    assert file["first_stage_model.decoder.mid.attn_1.proj_out.weight"].shape == (8, 8, 1, 1)
    assert file["first_stage_model.encoder.mid.attn_1.q.bias"].shape == (8,)
    finest = source["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"]
    np.testing.assert_array_equal(file["first_stage_model.decoder.up.0.block.0.nin_shortcut.weight"], finest)
    old = source.copy()
    for new, name in OLD_VAE.items():
        for key in [k for k in source if f".attentions.0.{new}." in k]:
            old[key.replace(new, name)] = old.pop(key)
    same(single_file.to_original("vae", old, VAE, "xl"), file)
    with pytest.raises(ValueError, match=r"^vae: .*attentions\.0.* is there twice, under its old name and that of today$"):
        single_file.to_original("vae", source | old, VAE, "xl")


def test_sd_2_drops_the_last_text_layer_and_diffusers_takes_a_file_without_it(tmp_path):
    deep, config = CLIP | PROJECTED | dict(num_hidden_layers=24), CLIP | dict(num_hidden_layers=23)
    file = single_file.to_original("text_encoder", clip(deep), deep, "v2")
    file |= {"cond_stage_model.model.logit_scale": np.float32(4.6), "cond_stage_model.model.position_ids": np.arange(7)}
    ours = single_file.from_original("text_encoder", file, config, "v2")
    known = {name: file[name] for name in file if not name.endswith(("logit_scale", "position_ids"))}
    same(ours, {n: v for n, v in converted("text_encoder", "v2", config, known).items() if n in ours})
    assert "text_projection.weight" not in ours and len(ours) == 4 + 23 * 16
    with pytest.raises(ValueError, match="12 names left over"):  # two layers too many are no SD 2.x
        single_file.from_original("text_encoder", file, config | dict(num_hidden_layers=22), "v2")
    written = single_file.to_original("text_encoder", ours, config, "v2")
    assert not [name for name in written if ".resblocks.23." in name or "projection" in name]
    CLIPTextConfig(**config).save_pretrained(tmp_path)
    checkpoint = {name: torch.from_numpy(value) for name, value in written.items()}
    model = oracle.create_diffusers_clip_model_from_ldm(CLIPTextModel, checkpoint, config=str(tmp_path), local_files_only=True)
    same({f"text_model.{name}": value for name, value in tensors(model).items()}, ours)


def test_open_clip_stacks_q_k_v_and_turns_the_projection():
    config = CLIP | PROJECTED
    source = clip(config)
    file = single_file.to_original("text_encoder_2", source, config, "xl")
    prefix, layer = "conditioner.embedders.1.model.", "text_model.encoder.layers.1.self_attn"
    rows = np.concatenate([source[f"{layer}.{x}_proj.bias"] for x in "qkv"])
    np.testing.assert_array_equal(file[f"{prefix}transformer.resblocks.1.attn.in_proj_bias"], rows)
    np.testing.assert_array_equal(file[f"{prefix}text_projection"], source["text_projection.weight"].T)
    with pytest.raises(ValueError, match="12 names left over"):  # one layer too many is a model for clip skip, two are another
        single_file.from_original("text_encoder_2", file, config | dict(num_hidden_layers=0), "xl")
    del source[f"{layer}.k_proj.weight"]
    with pytest.raises(ValueError, match=r"2 names left over.*q_proj\.weight.*v_proj\.weight$"):
        single_file.to_original("text_encoder_2", source, config, "xl")


def test_names_without_text_model_mean_the_same():
    source = clip(CLIP)
    bare = {name.removeprefix("text_model."): value for name, value in source.items()}
    file = single_file.to_original("text_encoder", bare | {"embeddings.position_ids": np.arange(7)}, CLIP, "v1")
    same(file, single_file.to_original("text_encoder", source, CLIP, "v1"))
    prefix = single_file.PREFIXES["v1"]["text_encoder"]
    old = {name.replace("text_model.", ""): value for name, value in file.items()}
    old |= {f"{prefix}embeddings.position_ids": np.arange(7), f"{prefix}text_projection.weight": np.eye(6)}
    assert single_file.family(old) == "v1"
    same(single_file.from_original("text_encoder", old, CLIP, "v1"), source)


@pytest.mark.parametrize("family", ["v1", "v2", "xl"])
def test_the_family_is_told_by_the_text_encoder(family):
    component, config = ("text_encoder_2", CLIP | PROJECTED) if family == "xl" else ("text_encoder", CLIP)
    file = single_file.to_original(component, clip(config), config, family)
    assert single_file.family(iter(["alphas_cumprod", *file])) == family


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["state_dict", "global_step"],  # of a pickled .ckpt
        ["model.diffusion_model.out.0.weight"],
        ["conditioner.embedders.0.model.token_embedding.weight"],  # SDXL's refiner
        ["cond_stage_model.model.visual.proj"],  # Zero123: an image encoder
    ],
)
def test_another_kind_of_file_is_refused_in_one_line(names):
    with pytest.raises(ValueError, match=r"^[^\n]*cond_stage_model\.transformer\.\*token_embedding\.weight \(v1\)$"):
        single_file.family(names)


def test_what_does_not_exist_is_refused_in_one_line():
    with pytest.raises(ValueError, match="^family 'v3' is unknown, known: v1, v2, xl, sd3$"):
        single_file.to_original("unet", {}, UNETS["v1"], "v3")
    with pytest.raises(
        ValueError, match="^component 'text_encoder_2' is not part of family v1, known: unet, vae, text_encoder$"
    ):
        single_file.from_original("text_encoder_2", {}, CLIP, "v1")
    with pytest.raises(ValueError, match=r"^vae \(v1\): the file has no names that begin with first_stage_model\.$"):
        single_file.from_original("vae", {"betas": np.zeros(1)}, VAE, "v1")
    with pytest.raises(
        ValueError, match="^unet config: down_block_types has 'AttnDownBlock2D'; .* CrossAttnDownBlock2D, DownB"
    ):
        single_file.to_original("unet", {}, UNETS["v1"] | dict(down_block_types=["AttnDownBlock2D"]), "v1")
