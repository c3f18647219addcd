"""Send an exported student to the Hugging Face hub: --folder, as export wrote it, becomes the repository --repo.

It is private unless --public is said. The token is huggingface_hub's own: HF_TOKEN, or `hf auth login` before.

    proreflow upload --folder=runs/emoji/export/stage-4 --repo=me/name
"""

import logging

from proreflow_jax import UserError
from proreflow_jax.run import cli
from proreflow_jax.storage import paths, sealed

log = logging.getLogger(__name__)


def upload(folder: str, repo: str, public: bool) -> None:
    """The verb: what will go and how large it is, then one commit. Raises ValueError or FileNotFoundError, one line."""
    from proreflow_jax.pretrained import hub

    if not folder or not repo:
        raise UserError("--folder (that export wrote) and --repo (owner/name on the hub) must both be given")
    source = paths.local_copy(paths.parse_path(folder, "--folder"), "--folder")
    sizes = hub.contents(source)
    sealed.check_undamaged(source, sealed.read_record(source), "export it again")
    for name, count in sizes.items():
        log.info("%10s  %s", hub.readable_size(count), name)
    kind = "public" if public else "private"
    log.info("%d files, %s, to the %s repository %s", len(sizes), hub.readable_size(sum(sizes.values())), kind, repo)
    log.info("%s", hub.upload_folder(source, repo, private=not public))


if __name__ == "__main__":
    options = {
        "folder": ("", "folder to send, as export or merge wrote it"),
        "repo": ("", "owner/name on the hub; made if it is not there"),
        "public": (False, "everybody may see it"),
    }
    cli.start(upload, __doc__, "", options)
