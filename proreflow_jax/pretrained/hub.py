"""The Hugging Face hub: an id owner/name -> a local diffusers folder, and an export -> a repository there.

Only the files of a diffusers folder are fetched, after their size was logged. Later starts read them without a network.
Tokens are huggingface_hub's own business (HF_TOKEN or `hf auth login`): nothing here reads, logs or stores one.
"""

import glob
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub as hf  # loads its parts when they are named: half a second that a local model does not pay
from huggingface_hub import constants

from proreflow_jax import MissingFile, UserError
from proreflow_jax.pretrained.sources import ID

log = logging.getLogger(__name__)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # at INFO it writes every address, signed ones too
INDEX, CARD, CONFIG = "model_index.json", "reflow.json", "config.json"
PAGE = "README.md"  # names the licence, which the card of an export repeats; an older cache may lack it
TEXTS = (".json", ".txt")
STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = ("", ".fp16", ".bf16")  # the exact numbers first; one of them is fetched, the one that models/ reads
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")
CONVERT = "convert it where you trust it (DiffusionPipeline.from_pretrained(...).save_pretrained(FOLDER)) and name that folder"
LOGIN = "log in (`hf auth login`, or HF_TOKEN in the environment)"


class Repository(NamedTuple):
    """A repository at one commit."""

    repo: str
    commit: str
    sizes: dict[str, int]  # {path: bytes}
    read: Callable[[str], Path]  # a small file's path -> where it lies on this machine


def download(
    repo: str, revision: str, configs_only: bool = False, flag: str = "--config.model.path", component: str = ""
) -> Path:
    """A diffusers repository as a local folder (huggingface_hub's cache): components, licence, its page, nothing else.

    Args:
      repo: owner/name.
      revision: branch, tag or commit.
      configs_only: without weights: configs and tokenizer, for a model that is a single file.
      flag: that named `repo`, for errors.
      component: this one alone, of a whole model, or of a repository that holds nothing else.

    Raises:
      ValueError: the hub has no such repository or revision, or wants a login; no diffusers folder; only pickled weights.
      FileNotFoundError: there is no network, and the cache does not hold everything.
      OSError: the connection broke off (ConnectionError), or the disk is too small.
    """
    from huggingface_hub.utils import disable_progress_bars

    try:
        with _explained(repo, revision, flag):
            repository = _on_hub(repo, revision)
    except ConnectionError as error:
        return _from_cache(repo, revision, flag, str(error), partial(_groups, configs_only=configs_only, component=component))
    with _explained(repo, revision, flag), disable_progress_bars():
        groups = _groups(repository, flag, configs_only, component)
        names = [name for group in groups.values() for name in group]
        state = hf.snapshot_download(repo, revision=repository.commit, allow_patterns=_exactly(names), dry_run=True)
    _log_plan(repository, revision, groups, {info.filename for info in state if info.is_cached})
    _check_disk(sum(repository.sizes[info.filename] for info in state if not info.is_cached))
    with _explained(repo, revision, flag, ": run the same command again, complete files are kept"):
        return Path(hf.snapshot_download(repo, revision=repository.commit, allow_patterns=_exactly(names)))


def _on_hub(repo: str, revision: str) -> Repository:
    """Asks the hub. The second request notes in the cache which commit the revision is: without a network it says so."""
    api = hf.HfApi()
    api.model_info(repo, revision=revision)  # raises without a network; the next line would take the commit of an earlier start
    commit = api.resolve_revision(repo, revision=revision)
    tree = api.list_repo_tree(repo, revision=commit.resolved, recursive=True)
    sizes = {entry.path: entry.size for entry in tree if isinstance(entry, hf.RepoFile)}
    return Repository(repo, commit.resolved, sizes, lambda name: Path(hf.hf_hub_download(repo, name, revision=commit.resolved)))


def _from_cache(repo: str, revision: str, flag: str, reason: str, groups: Callable[..., dict[str, list[str]]]) -> Path:
    """The folder of an earlier download, if it is complete. groups: (repository, flag) -> its files, as `_groups`."""
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    what = f"{reason}, and the cache {constants.HF_HUB_CACHE} does not hold {repo} at {revision}"
    mend = f"run once with a network, or let {flag} name a folder (another revision: --config.model.revision)"
    try:
        folder = Path(hf.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[INDEX, CONFIG]))
    except LocalEntryNotFoundError:
        raise MissingFile(f"{what}: {mend}") from None
    try:
        sizes = {entry.path: entry.size for entry in hf.get_cached_repo_tree(repo, revision=revision)}
    except CachedRepoTreeNotFoundError:  # older versions of the library stored no listing: the files there count as all
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}

    def here(name: str) -> Path:
        if not (folder / name).is_file():
            raise MissingFile(f"{what} completely (no {name}): {mend}")
        return folder / name

    for group in groups(Repository(repo, folder.name, sizes, here), flag).values():
        for name in group:
            if name != PAGE:
                here(name)
    log.info("%s; %s at %s is taken from the cache: %s", reason, repo, revision, folder)
    return folder


def _groups(repository: Repository, flag: str, configs_only: bool = False, component: str = "") -> dict[str, list[str]]:
    """The files to fetch: {component: paths}, "" for files beside the components. Raises ValueError, one line."""
    where, alone = f"{flag}={repository.repo}", component
    if alone and INDEX not in repository.sizes and CONFIG in repository.sizes:
        return {"": _files(repository, "", configs_only, where)}
    if INDEX not in repository.sizes:
        raise UserError(
            f"{where} is no diffusers repository: it holds no {INDEX}; a single file of it must be downloaded first"
        )
    index = _read_object(repository.read(INDEX), f"{where}: {INDEX}")
    groups = {"": [path for path in repository.sizes if path in (INDEX, CARD, PAGE) or re.match(r"LICENSE[^/]*$", path)]}
    for name in [name for name, kind in index.items() if isinstance(kind, list) and kind and kind[0]]:
        if name == alone or not alone:
            groups[name] = _files(repository, name, configs_only, where)
    return {name: paths for name, paths in groups.items() if paths}


def _files(repository: Repository, component: str, configs_only: bool, where: str) -> list[str]:
    """The paths of a component's files; "" is the repository itself."""
    own = [path.rpartition("/")[2] for path in repository.sizes if path.rpartition("/")[0] == component]
    names = sorted(name for name in own if name.endswith(TEXTS) and ".index." not in name)
    if not configs_only:
        names += _weights(repository, component, set(own), where)
    return [f"{component}/{name}" if component else name for name in names]


def _weights(repository: Repository, component: str, own: set[str], where: str) -> list[str]:
    """Names of the files with a component's weights: one file, or an index and its shards; [] if there are none."""
    for variant in VARIANTS:
        for stem in STEMS:
            if (whole := f"{stem}{variant}.safetensors") in own:
                return [whole]
            if (index := f"{stem}.safetensors.index{variant}.json") in own:
                path = f"{component}/{index}".lstrip("/")
                listing = _read_object(repository.read(path), f"{where}: {path}")
                table = listing.get("weight_map")
                shards = {str(name) for name in table.values()} if isinstance(table, dict) else set()
                if not shards or shards - own:
                    raise UserError(f"{where}: {component}/{index} names weights that the repository does not hold")
                return [index, *sorted(shards)]
    if pickled := sorted(name for name in own if name.endswith(PICKLES)):
        raise UserError(f"{where}: {component} holds only {pickled[0]}, a pickle, which may run code: {CONVERT}")
    return []


def _read_object(path: Path, name: str) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{name} is not a JSON object") from None


def _exactly(names: list[str]) -> list[str]:
    return [glob.escape(name) for name in names]


def _log_plan(repository: Repository, revision: str, groups: Mapping[str, list[str]], cached: set[str]) -> None:
    """One line for all, one for each component: bytes, how many of them are here, the file that is most of it."""
    row = lambda paths: (
        readable_size(sum(repository.sizes[p] for p in paths)),
        readable_size(sum(repository.sizes[p] for p in paths if p in cached)),
    )
    every = [path for group in groups.values() for path in group]
    what = f"{repository.repo} at {revision} ({repository.commit[:8]})"
    log.info("%s: %d files, %s, of which %s are in the cache %s", what, len(every), *row(every), constants.HF_HUB_CACHE)
    for component, paths in groups.items():
        largest = max(paths, key=repository.sizes.__getitem__).rpartition("/")[2]
        log.info("  %-18s %9s, %9s in the cache  %s", component or "(beside them)", *row(paths), largest)


def _check_disk(needed: int) -> None:
    """Raises OSError if the whole download does not fit. huggingface_hub only warns, for each file when its turn comes."""
    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if needed > (free := shutil.disk_usage(there).free):
        raise OSError(
            f"{cache} has {readable_size(free)} free and {readable_size(needed)} are to come: make room, or move HF_HOME"
        )


def readable_size(count: int) -> str:
    """Bytes for people: "3.44 GB"."""
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= one:
            return f"{count / one:.2f} {unit}"
    return f"{count} B"


@contextmanager
def _explained(repo: str, revision: str, flag: str, again: str = "") -> Iterator[None]:
    """Turns the library's errors into one line: UserError for errors that the user can mend, ConnectionError for the rest.

    `again` is added where the connection broke off.
    """
    from huggingface_hub import errors

    lost = (errors.HTTPError, errors.LocalEntryNotFoundError, errors.DryRunError, errors.RevisionResolutionError)
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{flag}={repo} is gated: accept its terms at {constants.ENDPOINT}/{repo} and {LOGIN}") from None
    except errors.RepositoryNotFoundError:
        what = "there is no such folder here, and on the hub no such model or a private one"
        raise UserError(f"{flag}={repo}: {what}: check the name, or {LOGIN}") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"--config.model.revision={revision} is no branch, tag or commit of {repo}") from None
    except errors.HfHubHTTPError as error:
        raise _refused(f"{flag}={repo}", error.response.status_code, error.server_message) from None
    except (*lost, errors.XetDownloadError) as error:
        raise ConnectionError(f"{flag}={repo}: no connection to the hub ({type(error).__name__}){again}") from None
    except errors.HFValidationError:
        raise UserError(f"{flag}={repo} is neither a folder here nor an id (owner/name) that the hub allows") from None
    except errors.OfflineModeIsEnabled:
        raise ConnectionError(f"{flag}={repo}: HF_HUB_OFFLINE forbids the network") from None


def _refused(what: str, status: int, said: str | None) -> OSError | UserError:
    said = f": {' '.join(said.split())}" if said else ""
    if status in (401, 402, 403):
        return UserError(f"{what}: the hub refuses (HTTP {status}{said}): {LOGIN} with a token that may do this")
    if status == 429 or status >= 500:
        return ConnectionError(f"{what}: the hub is busy or down (HTTP {status})")
    return UserError(f"{what}: the hub refuses (HTTP {status}{said})")


def contents(folder: Path) -> dict[str, int]:
    """{path: bytes} of what `upload_folder` sends. Raises FileNotFoundError or ValueError unless `folder` is an export."""
    if not folder.is_dir():
        raise MissingFile(f"--folder={folder} does not exist: name a folder that export wrote")
    if not (folder / CARD).is_file():
        raise UserError(f"--folder={folder} holds no {CARD}: only a folder that export or merge wrote is uploaded")
    entries = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    if links := [str(name) for name, path in entries.items() if path.is_symlink()]:
        raise UserError(f"--folder={folder} holds the link {links[0]}: upload a folder of plain files")
    shown = {name: path for name, path in entries.items() if not any(part[0] == "." for part in name.parts)}
    return {name.as_posix(): path.stat().st_size for name, path in shown.items() if path.is_file()}


def upload_folder(folder: Path, repo: str, private: bool) -> str:
    """Sends an export to the hub in one commit, so half a model is never visible. Returns the repository's address.

    The repository is made if it is not there. Hidden files stay behind.

    Raises:
      ValueError: no export, no login or no right to write there, or `private` and the repository is public.
      OSError: the connection broke off.
    """
    names = contents(folder)
    if not ID.fullmatch(repo):
        raise UserError(f"--repo={repo} must be owner/name, in letters, digits, '.', '_' and '-'")
    if hf.get_token() is None:
        raise UserError(f"--repo={repo}: uploading needs a token: {LOGIN}")
    api = hf.HfApi()
    with _explained(repo, "main", "--repo"):
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(f"--repo={repo} exists and is public: choose another name, or say --public")
        files = [hf.CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        api.create_commit(repo, files, commit_message="Student exported by proreflow_jax")
    return f"{api.endpoint}/{repo}"
