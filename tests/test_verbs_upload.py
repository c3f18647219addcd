"""upload: an export becomes a private repository in one commit; what must not happen is refused before anything is sent."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub, connect
from verb import run

from proreflow_jax.pretrained import hub
from proreflow_jax.storage.sealed import with_seal


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A running hub, its client logged in."""
    with FakeHub() as running:
        connect(monkeypatch, running.url, tmp_path / "home", token=TOKEN)
        yield running


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A folder as export writes it, and a hidden file of somebody's editor."""
    folder = tmp_path / "stage-4"
    contents = {
        "reflow.json": json.dumps(with_seal({"windows": 4})).encode(),
        "README.md": b"# A student of 4 time windows\n",
        "model_index.json": b"{}",
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": bytes(range(256)) * 40,
        ".notes.swp": b"private",
        ".cache/a.json": b"private",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def sent(folder: Path) -> dict[str, bytes]:
    """What of the folder belongs on the hub."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name[0] != "."}


def refused(*words: str, **flags: object) -> str:
    """The verb's one line, on exit code 2."""
    ended = run("upload", *(f"--{name}={value}" for name, value in flags.items()))
    assert ended.code == 2, ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("upload: ") and all(word in last for word in words), ended.err
    assert TOKEN not in ended.err and TOKEN not in ended.out
    return ended.err


def test_an_export_becomes_a_private_repository_in_one_commit(server, export):
    ended = run("upload", f"--folder={export}", "--repo=me/student")
    assert ended.code == 0, ended.err
    assert server.commits == [sent(export)] and server.models["me/student"].files == sent(export)
    assert server.models["me/student"].private
    lines = ended.err.splitlines()
    assert lines[-1] == f"{server.url}/me/student"
    plan = [line for line in lines if "files, " in line]
    assert plan == [f"5 files, {hub.readable_size(sum(map(len, sent(export).values())))}, to the private repository me/student"]
    assert any(line.split() == ["10.24", "kB", "unet/diffusion_pytorch_model.safetensors"] for line in lines)
    assert TOKEN not in ended.err and TOKEN not in ended.out and "POST" not in ended.err


def test_public_only_where_it_is_said(server, export):
    assert run("upload", f"--folder={export}", "--repo=me/student", "--public").code == 0
    assert not server.models["me/student"].private


def test_a_second_upload_goes_into_the_same_repository(server, export):
    server.add("me/student", {"README.md": b"old", "notes.md": b"kept"}, private=True)
    assert hub.upload_folder(export, "me/student", private=True) == f"{server.url}/me/student"
    assert server.created == [] and server.models["me/student"].files == {"notes.md": b"kept", **sent(export)}


def test_nothing_is_sent_to_a_public_repository_when_private_is_asked_for(server, export):
    server.add("me/known", {"README.md": b"everybody reads this"})
    refused("--repo=me/known", "public", folder=export, repo="me/known")
    assert server.commits == [] and server.uploads == {}
    assert run("upload", f"--folder={export}", "--repo=me/known", "--public").code == 0


def test_what_is_no_export_is_refused(server, export):
    refused("--folder", "--repo")
    refused("--repo=student", "owner/name", folder=export, repo="student")
    refused("--folder=nowhere", "does not exist", folder="nowhere", repo="me/student")
    (export / "link").symlink_to(export / "README.md")
    refused("link", folder=export, repo="me/student")
    (export / "link").unlink()
    (export / "reflow.json").unlink()
    refused("reflow.json", "export", folder=export, repo="me/student")
    assert server.requests == []


def test_without_a_login_nobody_is_asked(server, export, monkeypatch, tmp_path):
    connect(monkeypatch, server.url, tmp_path / "home")
    refused("HF_TOKEN", "hf auth login", folder=export, repo="me/student")
    assert server.requests == []


def test_a_token_that_may_not_write_is_one_line(server, export, monkeypatch, tmp_path):
    refused("--repo=stranger/student", "HTTP 403", "rights to create", folder=export, repo="stranger/student")
    with pytest.raises(ValueError, match="(?s)rights to create") as caught:
        hub.upload_folder(export, "stranger/student", private=True)
    assert "\n" not in str(caught.value)
    connect(monkeypatch, server.url, tmp_path / "home", token="hf_wrong")
    text = refused("--repo=me/student", "HTTP 401", "hf auth login", folder=export, repo="me/student")
    assert "hf_wrong" not in text and server.commits == []


def test_a_broken_connection_fails_with_one_line(server, export):
    server.stop()
    ended = run("upload", f"--folder={export}", "--repo=me/student")
    assert ended.code == 1 and "no connection" in ended.err.splitlines()[-1] and "Traceback" not in ended.err


def test_it_goes_by_its_own_flags_alone(tmp_path, monkeypatch):
    """No config is read: what an installed package has beside it does not matter."""
    monkeypatch.chdir(tmp_path)
    assert "--config" not in run("upload", "--help").out
    refused("Unknown command line flag 'config.name'", **{"config.name": "x"})
