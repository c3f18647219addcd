"""Look at runs while they go: their pages in the browser, loaded anew when they change, several runs side by side.

Serves report.html of every run on 127.0.0.1 and nothing else; Ctrl-C ends it. Needs no config, and no run that is under way.

    python -m proreflow_jax.watch --run=runs/emoji,runs/mine
"""

import logging

from proreflow_jax.run import cli

log = logging.getLogger(__name__)


def watch(run: str, port: int) -> None:
    """The verb. Raises UserError or MissingFile, one line."""
    from proreflow_jax.evaluation.page import serve
    from proreflow_jax.runtime.stopping import stop_if_asked

    server = serve.make_server(serve.run_folders(run), port)
    log.info("http://%s:%d/ shows %s; Ctrl-C ends it", *server.server_address, run)
    serve.serve(server, stop_if_asked)


if __name__ == "__main__":
    options = {
        "run": ("", "folders of runs, separated by commas"),
        "port": (8400, "port of this machine to listen on; 0: any that is free", (0, 65535)),
    }
    cli.start(watch, __doc__, "", options)
