"""T5's encoder equals transformers' T5EncoderModel: states, gradients, half precision, names; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_sd3 import T5
from torch_reference import draw, error, quick_jit, randomise, same, tensors, to_jax
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from proreflow_jax.models import network, t5
from proreflow_jax.pretrained import weights

CONFIG = T5Config(vocab_size=40, **T5).to_dict()
IDS = [[3, 7, 39, 12, 12, 1, 0, 0, 0], [20, 1, 0, 0, 0, 0, 0, 0, 0]]


def make(**changed):
    """(torch's encoder, ours, our parameters) with the same random weights."""
    config = T5Config(**(CONFIG | changed))
    module = randomise(T5EncoderModel(config))
    ours = network.make_t5(config.to_dict())
    params = weights.from_torch(tensors(module), ours.shapes, "tiny T5")
    return module, ours, {name: jnp.asarray(value) for name, value in params.items()}


def test_states():
    """Two layers share the first one's numbers of distances; more tokens than single buckets, and beyond the last one."""
    module, ours, params = make(relative_attention_num_buckets=8, relative_attention_max_distance=12)
    ids = np.concatenate([IDS, np.arange(22).reshape(2, 11)], axis=1)
    with torch.no_grad():
        expected = module(torch.tensor(ids)).last_hidden_state
    same(quick_jit(ours.apply)(params, jnp.asarray(ids)), expected)


@pytest.mark.parametrize(("count", "longest"), [(32, 128), (8, 12), (16, 100)])
def test_buckets_of_every_distance_are_transformers(count, longest):
    """512 tokens are the longest prompt; near the edge of a bucket the last bit of a logarithm decides."""
    distance = torch.arange(512)[None] - torch.arange(512)[:, None]
    expected = T5Attention._relative_position_bucket(distance, True, count, longest)
    assert np.array_equal(t5.buckets(512, count, longest), expected.numpy())


def test_gradients_by_every_parameter():
    module, ours, params = make()
    expected = module(torch.tensor(IDS)).last_hidden_state
    r = draw(*expected.shape, seed=4)
    (expected * r).sum().backward()
    found = quick_jit(jax.grad(lambda p: (ours.apply(p, jnp.asarray(IDS)) * to_jax(r)).sum()))(params)
    found = {name: torch.tensor(value) for name, value in weights.to_torch(found).items()}
    wanted = {name: value.grad for name, value in module.named_parameters()}
    assert found.keys() == wanted.keys()
    far = {name: error(found[name].numpy(), wanted[name]) for name in wanted}
    assert max(far.values()) <= 5e-4, far


def test_bfloat16_is_near_float32():
    module, ours, params = make()
    with torch.no_grad():
        expected = module(torch.tensor(IDS)).last_hidden_state
    states = quick_jit(lambda p, ids: ours.apply(network.cast(p, jnp.bfloat16), ids))(params, jnp.asarray(IDS))
    assert states.dtype == jnp.bfloat16
    same(states, expected, 2e-2)


def test_a_sum_beyond_float16_stays_finite():
    """The published encoder's sums pass 65504; what runs through the layers, and wo, are float32."""
    module, ours, params = make()
    large = params | {name: 3e4 * value for name, value in params.items() if name.endswith("wo.weight")}
    assert max(float(jnp.abs(value).max()) for value in large.values()) < 65504
    module.load_state_dict({name: torch.tensor(value) for name, value in weights.to_torch(large).items()}, strict=False)
    with torch.no_grad():
        found = module(torch.tensor(IDS), output_hidden_states=True)
    assert found.hidden_states[-2].abs().max() > 65504
    states = quick_jit(lambda p, ids: ours.apply(network.cast(p, jnp.float16), ids))(large, jnp.asarray(IDS))
    assert states.dtype == jnp.float16 and bool(jnp.isfinite(states).all())
    same(states, found.last_hidden_state, 2e-2)


@pytest.mark.parametrize(
    "kept", [{"shared.weight"}, {"encoder.embed_tokens.weight"}, {"shared.weight", "encoder.embed_tokens.weight"}]
)
def test_files_name_the_table_once_or_twice(kept):
    """transformers ties both names; files have either, ours has the first, as transformers saves it."""
    module, ours, _ = make()
    every = tensors(module)
    both = {"shared.weight", "encoder.embed_tokens.weight"}
    stored = {name: value for name, value in every.items() if name not in both - kept}
    back = weights.to_torch(weights.from_torch(stored, ours.shapes, "tiny T5"))
    assert back.keys() == ours.shapes.keys() == every.keys() - {"encoder.embed_tokens.weight"}
    assert all(np.array_equal(back[name], every[name]) for name in back)


def test_what_transformers_saves_is_read_and_read_back(tmp_path):
    module, ours, params = make()
    module.save_pretrained(tmp_path)
    read = weights.from_torch(weights.read_tensors(tmp_path), ours.shapes, str(tmp_path))
    assert all(np.array_equal(read[name], params[name]) for name in params)
    weights.save_tensors(tmp_path / "model.safetensors", weights.to_torch(params))
    again = T5EncoderModel.from_pretrained(tmp_path)
    with torch.no_grad():
        ids = torch.tensor(IDS)
        assert torch.equal(again(ids).last_hidden_state, module(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("field", "value"),
    [("feed_forward_proj", "relu"), ("feed_forward_proj", None), ("is_decoder", True), ("model_type", "umt5")],
)
def test_encoders_of_another_kind_are_refused(field, value):
    """None: the field is not there, and T5's first version is meant."""
    config = {name: given for name, given in CONFIG.items() if name != field} | ({} if value is None else {field: value})
    with pytest.raises(ValueError, match=field) as caught:
        network.make_t5(config)
    assert "\n" not in str(caught.value)
