"""A stock diffusers folder is read as diffusers and transformers read it: prompts -> ids, folder -> pipeline."""

import json
import logging
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers, trainers
from torch_reference import draw, quick_jit, randomise, same, tensors, to_jax
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from proreflow_jax.pretrained import pipeline, tokenizer, weights

START, END = tokenizer.START, tokenizer.END
CORPUS = [
    "a photo of a cat that isn't on the mat",
    "two dogs and 12 cats, they're running; we've seen it!",
    "hello world hello there",
    "the painter's house at night, it'll rain, i'd say i'm sure",
    "café naïve über straße 東京 猫",
]
PROMPTS = [
    "",
    " ",
    "a photo of a cat",
    "A PHOTO  of   a\tCat\n",
    "they're we've it'll i'd i'm isn't the painter's '' ' 's",
    "don’t “quote” — dash…",
    "12345 3rd 0.5 x2",
    "café CAFÉ cafe\u0301 naïve ÜBER STRASSE straße ﬁne",
    "東京の猫 🐈‍⬛ 👍🏽 Ünïcödé İstanbul ΑΣ",
    "hello!!! hello! ! wow?!",
    "under_score hyphen-ated (very good:1.2) [bad] {x|y} </w> <b>",
    "zero\u200bwidth nbsp\u00a0here line\u2028sep \u0000 nul",
    "<|endoftext|> in the <|startoftext|> middle<|endoftext|>",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "cat " * 40,
    "1" * 30,
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A folder with vocab.json and merges.txt of a tiny BPE vocabulary, trained here behind CLIP's own splitting."""
    folder = tmp_path_factory.mktemp("vocabulary")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = sorted(alphabet) + [f"{letter}</w>" for letter in sorted(alphabet)]
    bare = tokenizer.build({token: i for i, token in enumerate([*tokens, START, END])}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", special_tokens=[], show_progress=False
    )
    bare.train_from_iterator(CORPUS * 4, trainer)
    merges = [pair for pair in json.loads(bare.to_str())["model"]["merges"]]
    assert len(merges) > 50
    names = dict.fromkeys([*tokens, *("".join(pair) for pair in merges), START, END])
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def stock(folder, **options):
    """transformers' tokenizer of the same vocabulary."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return CLIPTokenizer(vocab=vocab, merges=[tuple(line.split()) for line in lines], model_max_length=20, **options)


def stock_ids(theirs):
    """The ids diffusers' pipelines would feed."""
    return np.array(theirs(PROMPTS, padding="max_length", max_length=20, truncation=True)["input_ids"])


def old_folder(source, target, **config):
    """vocab.json + merges.txt + tokenizer_config.json, as the Hub's folders of SD 1.5 and 2.1 are."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, target / name)
    (target / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 20} | config))
    return target


def check(folder, theirs):
    """Equal ids for every strange prompt, one by one so that a failure names it."""
    ours = tokenizer.load_tokenizer(folder)
    ids = ours.encode(PROMPTS)
    assert ours.length == 20 and ids.shape == (len(PROMPTS), 20) and ids.dtype == np.int32
    for prompt, row, expected in zip(PROMPTS, ids, stock_ids(theirs), strict=True):
        assert row.tolist() == expected.tolist(), repr(prompt)


def test_ids_from_vocab_and_merges(vocabulary, tmp_path):
    check(old_folder(vocabulary, tmp_path), CLIPTokenizer.from_pretrained(tmp_path))


def test_ids_from_the_tokenizer_json_that_transformers_saves(vocabulary, tmp_path):
    theirs = stock(vocabulary)
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    check(tmp_path, theirs)


@pytest.mark.parametrize("saved", [False, True])
def test_ids_with_sd_2s_padding_token(vocabulary, tmp_path, saved):
    """SD 2.1 and SDXL's second tokenizer pad with "!", which thereby becomes a special token inside prompts too."""
    if saved:
        stock(vocabulary, pad_token="!").save_pretrained(tmp_path)
    else:
        old_folder(vocabulary, tmp_path, pad_token="!")
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token == "!" and theirs.pad_token_id == json.loads((vocabulary / "vocab.json").read_text())["!"]
    check(tmp_path, theirs)


def test_padding_token_of_the_special_tokens_map(vocabulary, tmp_path):
    """Old folders may state it there, as a word or as a record."""
    old_folder(vocabulary, tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!", "lstrip": False}}))
    check(tmp_path, stock(vocabulary, pad_token="!"))


def test_long_prompt_keeps_its_end_token_and_warns_once(vocabulary, tmp_path, caplog):
    ours = tokenizer.load_tokenizer(old_folder(vocabulary, tmp_path))
    with caplog.at_level(logging.WARNING):
        short = ours.encode(["cat"])
        assert not caplog.records
        first, second = ours.encode(["cat " * 50, "dog " * 50])
        ours.encode(["cat " * 50])
    assert len(caplog.records) == 1 and "52 tokens" in caplog.records[0].getMessage()
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    assert first[0] == second[0] == vocab[START] and first[-1] == second[-1] == vocab[END]
    assert short[0, 0] == vocab[START] and (short[0, 2:] == vocab[END]).all()


def test_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--config.model.path") as caught:
        tokenizer.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_padding_token_is_refused(vocabulary, tmp_path):
    old_folder(vocabulary, tmp_path, pad_token="<pad>")
    with pytest.raises(ValueError, match="<pad>") as caught:
        tokenizer.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tiny(vocabulary, tmp_path_factory):
    """(folder, stock pipeline) of a tiny Stable Diffusion with random weights, saved by diffusers itself."""
    words = stock(vocabulary)
    blocks = dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=6,
        sample_size=6,
        **blocks,
    )
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=6, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=20, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = AutoencoderKL(latent_channels=4, scaling_factor=0.5, **kinds, **blocks)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    stock_pipeline = StableDiffusionPipeline(
        vae=randomise(vae, 1),
        text_encoder=randomise(CLIPTextModel(text), 2),
        tokenizer=words,
        unet=randomise(unet, 3),
        scheduler=DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("tiny")
    stock_pipeline.save_pretrained(folder)
    return folder, stock_pipeline


def test_pipeline_holds_what_diffusers_saved(tiny):
    folder, theirs = tiny
    ours = pipeline.load_pipeline(str(folder))
    assert ours.latent_shape == (6, 6, 4) and ours.scaling == 0.5
    assert ours.scheduler["beta_schedule"] == "scaled_linear" and ours.scheduler["prediction_type"] == "epsilon"
    for name in ("unet", "vae"):
        back, expected = weights.to_torch(ours.params[name]), tensors(getattr(theirs, name))
        assert back.keys() == expected.keys()
        assert all(np.array_equal(back[key], expected[key]) for key in back)


def test_prompt_to_noise_prediction_to_image_as_in_diffusers(tiny):
    """The three networks in a row, each on the other's output."""
    folder, theirs = tiny
    ours = pipeline.load_pipeline(folder)
    prompts, latents = ["a photo of a cat", "hello world"], draw(2, 4, 6, 6)
    with torch.no_grad():
        context = theirs.encode_prompt(prompts, "cpu", 1, False)[0]
        noise = theirs.unet(latents, torch.tensor([999, 4]), context).sample
        image = theirs.vae.decode(noise / 0.5).sample

    def draw_all(params, ids, x):
        states = ours.condition(params, ids).states
        out = ours.denoiser.apply(params["unet"], x, jnp.array([999.0, 4.0]), states)
        return states, out, ours.vae.apply(params["vae"], out / ours.scaling, method="decode")

    states, out, pixels = quick_jit(draw_all)(ours.params, jnp.asarray(ours.tokenizer.encode(prompts)), to_jax(latents))
    same(states, context)
    same(out, noise)
    same(pixels, image)


def test_missing_folder_names_the_flag(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*--config\.model\.path") as caught:
        pipeline.load_pipeline(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_missing_part_is_named_with_the_flag(tiny, tmp_path, part):
    shutil.copytree(tiny[0], tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / part)
    with pytest.raises(FileNotFoundError, match=rf"broken/{part}.*--config\.model\.path") as caught:
        pipeline.load_pipeline(tmp_path / "broken")
    assert "\n" not in str(caught.value)


def test_config_of_another_size_than_the_weights_is_refused(tiny, tmp_path):
    shutil.copytree(tiny[0], tmp_path / "mixed")
    path = tmp_path / "mixed" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_out_channels": [4, 12]}))
    with pytest.raises(ValueError, match=r"mixed/unet: weights do not fit its config\.json"):
        pipeline.load_pipeline(tmp_path / "mixed")


ENTRY = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": False}
LEARNED = ["a <my-toy> three", "<my-toy>", "<My-Toy>", "the <my-toy>s", "x<my-toy>y  <my-toy>", "!my-toy! a"]


def with_learned(vocabulary, folder, where):
    """A folder as textual inversion leaves it: two tokens beside the vocabulary, in one of the files that tell them."""
    count = len(json.loads((vocabulary / "vocab.json").read_text()))
    tokens = {"<my-toy>": count, "!my-toy!": count + 1}
    decoder = {str(number): {"content": token, **ENTRY} for token, number in tokens.items()}
    old_folder(vocabulary, folder, **({"added_tokens_decoder": decoder} if where == "added_tokens_decoder" else {}))
    if where == "added_tokens.json":
        (folder / where).write_text(json.dumps(tokens))
    return folder, tokens


@pytest.mark.parametrize("where", ["added_tokens.json", "added_tokens_decoder"])
def test_learned_tokens_have_their_own_ids(vocabulary, tmp_path, where):
    folder, tokens = with_learned(vocabulary, tmp_path, where)
    theirs = CLIPTokenizer.from_pretrained(folder)
    theirs.add_tokens(list(tokens))
    assert {token: theirs.convert_tokens_to_ids(token) for token in tokens} == tokens
    ours = tokenizer.load_tokenizer(folder)
    for prompt in LEARNED:
        expected = theirs(prompt, padding="max_length", max_length=20, truncation=True)["input_ids"]
        assert ours.encode([prompt])[0].tolist() == expected, prompt
    assert ours.last == ("!my-toy!", tokens["!my-toy!"])


def test_learned_tokens_of_the_tokenizer_json_that_transformers_saves(vocabulary, tmp_path):
    theirs = stock(vocabulary)
    theirs.add_tokens(["<my-toy>", "!my-toy!"])
    theirs.save_pretrained(tmp_path)
    ours = tokenizer.load_tokenizer(tmp_path)
    for prompt in LEARNED:
        expected = theirs(prompt, padding="max_length", max_length=20, truncation=True)["input_ids"]
        assert ours.encode([prompt])[0].tolist() == expected, prompt


def test_a_learned_token_with_two_ids_is_refused(vocabulary, tmp_path):
    folder, tokens = with_learned(vocabulary, tmp_path, "added_tokens_decoder")
    (folder / "added_tokens.json").write_text(json.dumps({token: number + 7 for token, number in tokens.items()}))
    with pytest.raises(ValueError, match="'<my-toy>' has id .* in one file") as caught:
        tokenizer.load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_an_end_token_that_the_encoder_looks_for_in_vain_is_refused(vocabulary, tmp_path):
    """SDXL's pooled state is taken where the end token stands; of an id that never comes that would be the first place."""
    encoder = {"vocab_size": 10**6, "max_position_embeddings": 20, "architectures": ["CLIPTextModelWithProjection"]}
    folder = old_folder(vocabulary, tmp_path)
    end = tokenizer.load_tokenizer(folder, encoders=[encoder | {"eos_token_id": 2}]).end
    tokenizer.load_tokenizer(folder, encoders=[encoder | {"eos_token_id": end}])
    with pytest.raises(ValueError, match=f"end token's id is {end}, .* eos_token_id=555"):
        tokenizer.load_tokenizer(folder, encoders=[encoder | {"eos_token_id": 555}])
