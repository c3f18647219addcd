"""`watch` answers this machine alone, with the pages alone, and says in one line what is wrong."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from verb import ROOT, run

from proreflow_jax import MissingFile, UserError
from proreflow_jax.evaluation.page import serve

SECRET = "what nobody may see"


class Over(Exception):
    """The end of a server."""


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs, one of which has a page."""
    folders = [tmp_path / "runs" / name for name in ("one", "<b>two")]
    for folder in folders:
        (folder / "page").mkdir(parents=True)
        for name in ("config.json", "page/0", "report.html.old", "versions"):
            (folder / name).write_text(SECRET)
    (folders[0] / "report.html").write_text("<h1>one</h1>")
    return folders


@pytest.fixture
def port(runs: list[Path]) -> Iterator[int]:
    server, ended = serve.make_server(runs, 0), threading.Event()

    def over() -> None:
        if ended.is_set():
            raise Over

    def work() -> None:
        with pytest.raises(Over):
            serve.serve(server, over)

    thread = threading.Thread(target=work)
    thread.start()
    assert server.server_address[0] == "127.0.0.1"
    yield server.server_address[1]
    ended.set()
    thread.join(10)
    assert not thread.is_alive()


def ask(port: int, path: str, method: str = "GET", host: str = "") -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body, answer.headers


def test_the_pages_are_served_side_by_side(port, runs):
    code, body, headers = ask(port, "/")
    assert code == 200 and body.count("<iframe") == 2 and "&lt;b&gt;two" in body and "<b>two" not in body
    assert headers["Content-Security-Policy"].startswith("default-src 'none'") and headers["Cache-Control"] == "no-store"
    assert ask(port, "/page/0")[:2] == (200, "<h1>one</h1>")
    code, body, _ = ask(port, "/page/1")
    assert code == 200 and "has no page yet" in body and "&lt;b&gt;two" in body


def test_a_change_is_another_version(port, runs):
    versions = lambda: json.loads(ask(port, "/versions")[1])
    before = versions()
    assert len(before) == 2 and before[1] == "" and versions() == before
    for folder in runs:
        (folder / "report.html").write_text("<h1>again</h1>")
    after = versions()
    assert after[0] != before[0] and after[1] != ""
    assert ask(port, "/page/1")[1] == "<h1>again</h1>"


PATHS = (
    "/config.json", "/../config.json", "/page/../config.json", "/page/0/../../config.json", "/page/0/config.json", "/page/2",
    "/page/", "/page/-1", "/page/%30", "/page/0?x", "/page/0%00", "/page/0#", "/page/00000", "/report.html",
    "/runs/one/report.html", "//127.0.0.1/", "/%2e%2e/config.json", "/..%2fconfig.json", "/versions/", "*", "/etc/passwd",
    "http://127.0.0.1/page/0",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_nothing_else_is_served(port, path):
    code, body, _ = ask(port, path)
    assert code == 404 and body == "not here\n"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_there_is_nothing_to_do_but_read(port, method):
    assert ask(port, "/", method)[0] == 501


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8400", "127.0.0.1.evil.example", "localhost:evil.example"])
def test_a_page_from_elsewhere_sees_nothing(port, host):
    assert ask(port, "/page/0", host=host)[:2] == (404, "not here\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999"])
def test_a_tunnel_may_have_another_port(port, host):
    assert ask(port, "/page/0", host=host)[0] == 200


def test_other_addresses_of_this_machine_are_not_listened_on(port):
    for address in {"127.0.0.2", socket.gethostbyname(socket.gethostname())} - {"127.0.0.1"}:
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2)


def test_a_port_in_use_is_named(runs):
    with serve.make_server(runs, 0) as server:
        port = server.server_address[1]
        with pytest.raises(UserError, match=f"--port={port} is in use on 127.0.0.1: take another one, or --port=0"):
            serve.make_server(runs, port)


def test_folders_are_named_one_or_several(runs):
    assert serve.run_folders(f"{runs[0]}, {runs[1]},") == runs
    with pytest.raises(MissingFile, match="--run=.*three is no folder"):
        serve.run_folders(f"{runs[0]},{runs[0].parent / 'three'}")
    with pytest.raises(UserError, match="--run is empty"):
        serve.run_folders(" , ")


@pytest.mark.parametrize(
    ("words", "needle"),
    [([], "--run is empty"), (["--run=/no/such"], "--run=/no/such is no folder"), (["--port=70000"], "--port")],
)
def test_the_verb_says_in_one_line_what_is_wrong(words, needle):
    ended = run("watch", *words)
    assert ended.code == 2 and needle in ended.err and len(ended.err.splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_the_verb_serves_until_it_is_asked_to_stop(runs, number, code):
    command = [sys.executable, "-m", "proreflow_jax.watch", f"--run={runs[0]}", "--port=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=runs[0], env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stderr.readline()
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])
            assert ask(port, "/page/0")[1] == "<h1>one</h1>"
            process.send_signal(number)
            _, rest = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == code and "Traceback" not in rest, rest
