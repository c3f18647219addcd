"""Serves pages of runs to this machine's browser: on 127.0.0.1, by the standard library, and nothing but the pages.

  /            all runs side by side, each in a frame that is loaded anew when its page has changed
  /page/N      the page of the run number N, as it lies in the run's folder now
  /versions    a JSON list, one word a run, that differs after every change

An address is never made into a path: everything else is 404, whatever it says. A request that names another host is refused,
so that a page from elsewhere, whose name was made to lead here, sees nothing.
"""

import errno
import json
import logging
import re
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

from proreflow_jax import MissingFile, UserError
from proreflow_jax.evaluation.page import document
from proreflow_jax.evaluation.page.document import asset
from proreflow_jax.evaluation.page.markup import text
from proreflow_jax.storage import paths
from proreflow_jax.storage.paths import Location

log = logging.getLogger(__name__)
HOST, FILE = "127.0.0.1", "report.html"
PAGE = re.compile(r"/page/([0-9]{1,4})")
OURS = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]+)?")  # any port: a tunnel may have another one
TURN_S = 0.5  # between looks at whether to end
POLICY = f"{document.POLICY}; frame-src 'self'; connect-src 'self'"
WAITING = (
    "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    "<style>:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui;padding:1rem}}</style>"
    "<h1>{name}</h1><p>This run has no page yet. It is written when the run begins its first pairs, steps or cells, at every "
    "checkpoint, and by <code>proreflow evaluate</code>.</p>"
)


def run_folders(words: str) -> list[Location]:
    """The folders that --run names. Raises UserError or MissingFile, one line."""
    names = [word.strip() for word in words.split(",") if word.strip()]
    if not names:
        raise UserError("--run is empty: name the folder of a run, as in --run=runs/emoji, or several between commas")
    folders = [paths.parse_path(name, "--run") for name in names]
    for name, folder in zip(names, folders, strict=True):
        paths.check_reachable(folder, write=False)
        if not folder.is_dir():
            raise MissingFile(f"--run={name} is no folder: name that of a run, as in --run=runs/emoji")
    return folders


def make_server(folders: Sequence[Location], port: int) -> ThreadingHTTPServer:
    """Listens, and answers once it is served; port 0: any that is free. Raises UserError if the port is in use."""
    handler = type("Pages", (_Handler,), {"folders": list(folders)})
    try:
        server = _Server((HOST, port), handler)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is in use" if error.errno == errno.EADDRINUSE else "may not be used"
        raise UserError(f"--port={port} {why} on {HOST}: take another one, or --port=0 for any that is free") from None
    server.timeout = TURN_S
    return server


def serve(server: ThreadingHTTPServer, over: Callable[[], None]) -> None:
    """Answers until `over`, which is called again and again, raises."""
    with server:
        while True:
            server.handle_request()
            over()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True  # of a port that is closing; one that is listened on is refused all the same

    def server_bind(self) -> None:
        """As the library's, which would ask for this machine's name in the network."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    folders: list[Location] = []
    server_version, sys_version = "proreflow", ""

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        """A page, the list of versions, or 404."""
        match = PAGE.fullmatch(self.path)
        if not OURS.fullmatch(self.headers.get("Host", "")):
            self._answer(404, "text/plain", "not here\n")
        elif self.path == "/":
            self._answer(200, "text/html", index([folder.name for folder in self.folders]))
        elif self.path == "/versions":
            self._answer(200, "application/json", json.dumps([version(folder) for folder in self.folders]))
        elif match and int(match[1]) < len(self.folders):
            self._answer(200, "text/html", page(self.folders[int(match[1])]))
        else:
            self._answer(404, "text/plain", "not here\n")

    def _answer(self, code: int, kind: str, body: str) -> None:
        data = body.encode()
        self.send_response(code)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(data)), "Cache-Control": "no-store"}
        headers |= {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(data)
        except OSError:
            log.debug("the browser has gone")

    def log_message(self, *words: object) -> None:
        """Requests are not shown."""


def index(names: Sequence[str]) -> str:
    """All runs side by side."""
    frames = "".join(f"<iframe title='{text(name)}' src='/page/{i}'></iframe>" for i, name in enumerate(names))
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{text(', '.join(names))}</title><style>{asset('watch.css')}</style></head>"
        f"<body>{frames}<script>{asset('watch.js')}</script></body></html>\n"
    )


def page(folder: Location) -> str:
    """A run's page as it is now, or one that says that there is none yet."""
    try:
        return (folder / FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return WAITING.format(name=text(folder.name))


def version(folder: Location) -> str:
    """A word that differs after every change of a run's page; "" while there is none."""
    try:
        status = (folder / FILE).stat()
    except OSError:
        return ""
    return f"{getattr(status, 'st_mtime_ns', '')}-{getattr(status, 'generation', '')}-{status.st_size}"
