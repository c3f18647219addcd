"""Three encoders, or two, give the conditioning of diffusers' StableDiffusion3Pipeline.encode_prompt."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd3
import torch
from torch_reference import quick_jit, same, tensors

from proreflow_jax.models import network
from proreflow_jax.models.joint_conditioning import check_joint_conditioning, make_joint_conditioner
from proreflow_jax.pretrained import weights

PROMPTS = ["a handwritten zero", "five", ""]
TOKENS = 13  # of T5; CLIP's are 8


def encoders(pipe):
    """({component: our network}, {component: its weights})."""
    made, params = {}, {}
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if (module := getattr(pipe, name)) is not None:
            maker = network.make_t5 if name == "text_encoder_3" else network.make_text_encoder
            made[name] = maker(module.config.to_dict() | {"architectures": [type(module).__name__]})
            params[name] = weights.from_torch(tensors(module), made[name].shapes, name)
    return made, params


def ids(pipe):
    """Ids of all tokenizers side by side."""
    words = [pipe.tokenizer, pipe.tokenizer_2] + [pipe.tokenizer_3] * (pipe.tokenizer_3 is not None)
    encode = lambda words, length: words(PROMPTS, padding="max_length", max_length=length, truncation=True).input_ids
    lengths = (tiny_sd3.LENGTH, tiny_sd3.LENGTH, TOKENS)
    return jnp.asarray(np.concatenate([encode(*pair) for pair in zip(words, lengths, strict=False)], axis=1))


@pytest.mark.parametrize("t5", [True, False])
def test_conditioning_is_the_pipelines(t5):
    pipe = tiny_sd3.make(t5=t5)
    made, params = encoders(pipe)
    check_joint_conditioning(pipe.transformer.config, made, "tiny")
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
    found = quick_jit(make_joint_conditioner(made, tiny_sd3.STATES, TOKENS))(params, ids(pipe))
    assert found.time_ids is None and found.states.shape[1] == tiny_sd3.LENGTH + TOKENS
    same(found.states, states)
    same(found.pooled, pooled)
    if not t5:
        assert not found.states[:, tiny_sd3.LENGTH :].any()


def test_conditioning_in_bfloat16_stays_there():
    pipe = tiny_sd3.make()
    made, params = encoders(pipe)
    half = {name: network.cast(values, jnp.bfloat16) for name, values in params.items()}
    found = quick_jit(make_joint_conditioner(made, tiny_sd3.STATES, TOKENS))(half, ids(pipe))
    assert found.states.dtype == found.pooled.dtype == jnp.bfloat16


REFUSED = {
    "pooled states of width 30, its CLIPs give 20": (dict(pooled_projection_dim=30), ()),
    "text states of width 12, its CLIPs give 20": (dict(joint_attention_dim=12), ()),
    "text states of width 32, text_encoder_3 gives 24": (dict(joint_attention_dim=32), ()),
    "two CLIPs and T5 or none, here are text_encoder": ({}, ("text_encoder_2", "text_encoder_3")),
}


@pytest.mark.parametrize("words", REFUSED)
def test_encoders_that_do_not_fit_are_refused(words):
    changed, absent = REFUSED[words]
    pipe = tiny_sd3.make()
    made = {name: encoder for name, encoder in encoders(pipe)[0].items() if name not in absent}
    with pytest.raises(ValueError, match=words) as caught:
        check_joint_conditioning(dict(pipe.transformer.config) | changed, made, "tiny")
    assert "\n" not in str(caught.value)


def test_a_clip_without_a_projection_is_refused():
    pipe = tiny_sd3.make()
    made, _ = encoders(pipe)
    bare = network.make_text_encoder(made["text_encoder"].config | {"architectures": ["CLIPTextModel"]})
    with pytest.raises(ValueError, match="text_encoder has no text_projection"):
        check_joint_conditioning(pipe.transformer.config, made | {"text_encoder": bare}, "tiny")
