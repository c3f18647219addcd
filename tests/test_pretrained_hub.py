"""The hub, served from 127.0.0.1: only what is needed is fetched, announced before; then no network is needed."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub, connect, environment

from proreflow_jax.pretrained import hub, sources, weights

ROOT = Path(__file__).resolve().parent.parent
REPO = "artist/fine-tune"
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}
NEEDED = {
    "model_index.json": json.dumps(INDEX).encode(),
    "LICENSE.md": b"be kind",
    "README.md": b"---\nlicense: mit\n---\n# model",
    "unet/config.json": b'{"of": "unet"}',
    "unet/diffusion_pytorch_model.safetensors": bytes(3_000_000),
    "vae/config.json": b'{"of": "vae"}',
    "vae/diffusion_pytorch_model.safetensors": bytes(range(256)) * 100,
    "text_encoder/config.json": b'{"of": "text"}',
    "text_encoder/model.safetensors": b"t" * 2000,
    "tokenizer/vocab.json": b'{"a": 0}',
    "tokenizer/merges.txt": b"#version",
    "scheduler/scheduler_config.json": b'{"of": "time"}',
}
REST = {  # lies in such repositories and is of no use here
    "fine-tune-pruned.safetensors": b"whole model",
    "preview.png": b"picture",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"other weights",
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json": b"{}",
    "unet/onnx/config.json": b"{}",
    "vae/diffusion_pytorch_model.bin.index.json": b"{}",
    "vae_1_0/config.json": b"{}",
    "vae_1_0/diffusion_pytorch_model.safetensors": b"another autoencoder",
    "text_encoder/flax_model.msgpack": b"flax",
    "text_encoder/openvino_model.xml": b"openvino",
    "safety_checker/config.json": b"{}",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A running hub with one whole model; the client's cache is tmp_path/home."""
    with FakeHub() as running:
        connect(monkeypatch, running.url, tmp_path / "home")
        running.add(REPO, NEEDED | REST)
        yield running


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log from INFO on, whoever writes it."""
    caplog.set_level(logging.INFO)
    return caplog


def without(*names: str) -> dict[str, bytes]:
    return {path: content for path, content in NEEDED.items() if path not in names}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(kind: type[Exception], *words: str, repo: str = REPO, revision: str = "main", **options: bool) -> str:
    """The error's text, which is one line and holds `words`."""
    with pytest.raises(kind) as caught:
        hub.download(repo, revision, **options)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


def test_an_id_is_owner_and_name_and_nothing_that_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        sources.is_id("owner/name")
        and sources.is_id("stable-diffusion-v1-5/stable-diffusion-v1-5")
        and sources.is_id("a/b_1.5")
    )
    for path in (
        "name",
        "a/b/c",
        "/a/b",
        "./a",
        "../a",
        "a/",
        "~/a",
        "a b/c",
        "gs://a/b",
        "a/b.safetensors",
        "a/.b",
        "",
        "ä/b",
    ):
        assert not sources.is_id(path), path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not sources.is_id("owner/name")


def test_only_what_a_diffusers_folder_needs_is_fetched(server):
    folder = hub.download(REPO, "main")
    assert server.fetched(REPO) == sorted(NEEDED)
    assert files(folder) == NEEDED


def test_a_model_of_ours_comes_over_the_hub_as_it_was_written(server):
    assets = ROOT / "proreflow_jax" / "assets" / "digits"
    server.add_folder("me/digits", assets)
    folder = hub.download("me/digits", "main")
    for component in ("unet", "vae", "text_encoder"):
        assert files(folder / component) == files(assets / component)
        assert weights.read_tensors(folder / component).keys() == weights.read_tensors(assets / component).keys()


def test_what_is_fetched_is_what_models_reads():
    assert (hub.STEMS, hub.VARIANTS) == (weights.STEMS, weights.VARIANTS)
    assert {pattern[1:] for pattern in weights.PICKLES} <= set(hub.PICKLES)


def test_configs_only_fetches_no_weights(server):
    folder = hub.download(REPO, "main", configs_only=True)
    texts = {path: content for path, content in NEEDED.items() if not path.endswith(".safetensors")}
    assert server.fetched(REPO) == sorted(texts)
    assert files(folder) == texts


@pytest.mark.parametrize(
    ("held", "taken"),
    [
        (("model.safetensors", "model.fp16.safetensors", "model.bf16.safetensors"), "model.safetensors"),
        (("model.fp16.safetensors", "model.bf16.safetensors", "pytorch_model.bin"), "model.fp16.safetensors"),
        (("model.bf16.safetensors", "model.ckpt"), "model.bf16.safetensors"),
        (("model.safetensors", "diffusion_pytorch_model.fp16.safetensors"), "model.safetensors"),
    ],
)
def test_of_several_precisions_the_most_exact_is_fetched(server, held, taken):
    server.add(REPO, without("text_encoder/model.safetensors") | {f"text_encoder/{name}": name.encode() for name in held})
    folder = hub.download(REPO, "main")
    assert sorted(path.name for path in (folder / "text_encoder").iterdir()) == ["config.json", taken]


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_fetched_with_the_index_that_names_them(server, variant):
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002{variant}.safetensors" for n in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1], "c": shards[1]}}).encode()
    extra = {f"unet/{name}": name.encode() for name in (*shards, "diffusion_pytorch_model-00001-of-00009.safetensors")}
    extra[f"unet/diffusion_pytorch_model.safetensors.index{variant}.json"] = index
    server.add(REPO, without("unet/diffusion_pytorch_model.safetensors") | extra)
    folder = hub.download(REPO, "main")
    expected = ["config.json", f"diffusion_pytorch_model.safetensors.index{variant}.json", *shards]
    assert sorted(path.name for path in (folder / "unet").iterdir()) == sorted(expected)
    server.stop()
    assert hub.download(REPO, "main") == folder


def test_the_plan_is_logged_before_weights_are_asked_for(server, said):
    lines, weights = [], lambda: [path for path in server.fetched(REPO) if path.endswith(".safetensors")]
    note = logging.Handler()
    note.emit = lambda record: lines.append((record.getMessage(), weights()))
    hub.log.addHandler(note)
    try:
        hub.download(REPO, "main")
    finally:
        hub.log.removeHandler(note)
    total = sum(map(len, NEEDED.values()))
    assert lines[0][0].startswith(f"{REPO} at main (")
    assert f"{len(NEEDED)} files, {hub.readable_size(total)}, of which {len(NEEDED['model_index.json'])} B are" in lines[0][0]
    rows = {line.split()[0]: line for line, _ in lines[1:]}
    assert rows.keys() == {"(beside", "unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert "3.00 MB" in rows["unet"] and "25.61 kB" in rows["vae"] and "0 B in the cache" in rows["unet"]
    assert all(fetched == [] for _, fetched in lines) and len(weights()) == 3


def test_the_plan_counts_what_is_in_the_cache_and_that_is_not_fetched_again(server, said):
    hub.download(REPO, "main")
    server.add(REPO, NEEDED | REST | {"preview.png": b"another", "vae/diffusion_pytorch_model.safetensors": b"v" * 5000})
    server.requests.clear()
    said.clear()
    hub.download(REPO, "main")
    new = ["vae/diffusion_pytorch_model.safetensors"]
    assert [path for path in server.fetched(REPO) if path.endswith(".safetensors")] == new
    total = sum(map(len, without(*new).values()))
    assert f"{hub.readable_size(total + 5000)}, of which {hub.readable_size(total)} are in the cache" in said.text
    unet = next(line for line in said.messages if line.split()[0] == "unet")
    assert unet.count("3.00 MB") == 2


def test_the_second_time_no_network_is_needed(server, said):
    first = hub.download(REPO, "main")
    server.stop()
    said.clear()
    assert hub.download(REPO, "main") == first and files(first) == NEEDED
    (line,) = said.messages
    assert "cache" in line and "no connection" in line and REPO in line
    assert hub.download(REPO, first.name) == first  # by its commit


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_down_is_no_network(server, said, status):
    first = hub.download(REPO, "main")
    server.down = status
    assert hub.download(REPO, "main") == first
    assert str(status) in said.messages[-1]


def test_offline_mode_asks_nobody(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refusal(
        FileNotFoundError,
        f"{REPO}: HF_HUB_OFFLINE forbids",
        "run once with a network",
        "--config.model.path",
        "--config.model.revision",
    )
    assert server.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = hub.download(REPO, "main")
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.download(REPO, "main") == folder and server.requests == []


def test_a_cache_of_before_the_page_was_fetched_does(server):
    folder = hub.download(REPO, "main")
    (folder / "README.md").unlink()
    server.stop()
    assert hub.download(REPO, "main") == folder


def test_the_environment_of_a_process_is_obeyed(server, tmp_path):
    code = f"from proreflow_jax.pretrained import hub; print(hub.download({REPO!r}, 'main'))"
    settings = {**os.environ, **environment(server.url, tmp_path / "another home")}
    run = lambda **more: subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=settings | more, capture_output=True, text=True, timeout=60, check=True
    )
    first = run().stdout.strip()
    assert first.startswith(str(tmp_path / "another home")) and files(Path(first)) == NEEDED
    server.requests.clear()
    assert run(HF_HUB_OFFLINE="1").stdout.strip() == first and server.requests == []


def test_an_incomplete_cache_is_refused_without_a_network(server):
    hub.download(REPO, "main", configs_only=True)
    server.stop()
    refusal(FileNotFoundError, "completely", ".safetensors", "run once with a network", "--config.model.path")
    assert hub.download(REPO, "main", configs_only=True).is_dir()
    refusal(FileNotFoundError, "other", revision="other")
    refusal(FileNotFoundError, "no connection", "me/unknown", repo="me/unknown")


def test_a_cache_of_an_older_library_serves_too(server):
    folder = hub.download(REPO, "main")
    server.stop()
    from huggingface_hub import _tree_cache

    for listing in (folder.parent.parent / "trees").iterdir():
        listing.unlink()
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    assert hub.download(REPO, "main") == folder
    (folder / "model_index.json").unlink()
    refusal(ValueError, "model_index.json")


def test_what_the_user_can_mend_is_one_line(server):
    refusal(ValueError, "--config.model.path=nobody/nothing", "no such", "hf auth login", "HF_TOKEN", repo="nobody/nothing")
    server.add("me/secret", NEEDED, private=True)
    refusal(ValueError, "me/secret", "private", "hf auth login", repo="me/secret")
    server.add("me/gated", NEEDED, gated=True)
    refusal(ValueError, "me/gated", "gated", "accept its terms", "hf auth login", "HF_TOKEN", repo="me/gated")
    refusal(ValueError, "--config.model.revision=v7", REPO, revision="v7")
    refusal(ValueError, "--config.model.revision=" + "0" * 40, revision="0" * 40)
    refusal(ValueError, "--config.model.path=a/b--c", "owner/name", repo="a/b--c")
    server.down = 403
    refusal(ValueError, "HTTP 403", "token")


def test_another_flag_is_named_where_it_gave_the_id(server):
    with pytest.raises(ValueError, match="--config.model.like=nobody/nothing"):
        hub.download("nobody/nothing", "main", configs_only=True, flag="--config.model.like")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_index.json": None}, ("no diffusers repository", "model_index.json")),
        ({"model_index.json": b"[1]"}, ("model_index.json", "JSON object")),
        ({"model_index.json": b"\xff"}, ("model_index.json", "JSON object")),
        (
            {"vae/diffusion_pytorch_model.safetensors": None, "vae/diffusion_pytorch_model.bin": b"pickle"},
            ("vae", "diffusion_pytorch_model.bin", "pickle", "save_pretrained"),
        ),
        (
            {
                "text_encoder/model.safetensors": None,
                "text_encoder/model.safetensors.index.json": b'{"weight_map": {"a": "b"}}',
            },
            ("text_encoder/model.safetensors.index.json", "does not hold"),
        ),
        (
            {"text_encoder/model.safetensors": None, "text_encoder/model.safetensors.index.json": b'{"weight_map": []}'},
            ("text_encoder/model.safetensors.index.json",),
        ),
    ],
)
def test_a_repository_that_is_no_use_is_refused_before_weights_are_fetched(server, change, words):
    held = NEEDED | {path: content for path, content in change.items() if content is not None}
    server.add(REPO, {path: content for path, content in held.items() if change.get(path, b"") is not None})
    refusal(ValueError, *words)
    assert not [path for path in server.fetched(REPO) if path.endswith((".safetensors", ".bin"))]


def test_a_disk_that_is_too_small_is_found_before_the_download(server, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1_000_000}))
    text = refusal(OSError, "1.00 MB free", "3.03 MB", "HF_HOME")
    assert not isinstance(text, FileNotFoundError) and not [p for p in server.fetched(REPO) if p.endswith(".safetensors")]


def test_a_connection_that_breaks_off_says_what_to_do(server, monkeypatch):
    import httpx2

    def broken(*words: object, **options: object) -> None:
        raise httpx2.ReadError("reset by peer")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", broken)
    monkeypatch.setattr(hub, "_groups", lambda *words: {"unet": ["unet/diffusion_pytorch_model.safetensors"]})
    refusal(ConnectionError, "--config.model.path=" + REPO, "ReadError", "run the same command again")


def test_the_disk_that_fills_up_is_an_oserror(server, monkeypatch):
    def full(*words: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OSError, match="No space left") as caught:
        hub.download(REPO, "main")
    assert not isinstance(caught.value, FileNotFoundError | ConnectionError)


@pytest.mark.parametrize("repo", [REPO, "me/secret", "nobody/nothing", "me/gated"])
def test_a_token_goes_to_the_hub_and_nowhere_else(server, said, capfd, monkeypatch, tmp_path, repo):
    connect(monkeypatch, server.url, tmp_path / "home", token=TOKEN)
    said.set_level(logging.DEBUG)
    server.add("me/secret", NEEDED, private=True)
    server.add("me/gated", NEEDED, gated=True)
    told = ""
    try:
        folder = hub.download(repo, "main")
        assert files(folder) == NEEDED
    except ValueError as error:
        told = f"{error} {error.__cause__} {vars(error)}"
    assert any(request.token == TOKEN for request in server.requests)
    assert not any(request.token for request in server.requests if request.path.startswith("/cdn/"))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN not in told and TOKEN not in said.text and TOKEN not in "".join(capfd.readouterr())
    assert TOKEN.encode() not in written


def test_addresses_are_not_logged(server, said):
    hub.download(REPO, "main")
    assert not re.search(r"https?://", said.text)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (3_438_167_540, "3.44 GB")])
def test_sizes_are_said_as_people_say_them(count, text):
    assert hub.readable_size(count) == text
