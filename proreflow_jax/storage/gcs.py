"""A path in an object store, gs://bucket/name, with pathlib's words: the only file that speaks to Google Cloud Storage.

An object is whole or absent, so a write needs no temporary and no rename. There are no folders, only names with a common
beginning: `mkdir` does nothing, and a folder exists while an object lies below it. Every error of the client becomes an
OSError of one line that names the path. `ObjectPath` is no os.PathLike on purpose: `open` and `Path` would take it for a
local file. So etils.epath cannot stand here; it knows no generations and no conditional puts either.
"""

import fnmatch
import functools
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from proreflow_jax import UserError

SCHEME = "gs://"
EXTRA = "pip install gcsfs google-cloud-storage (the extra `gcs`)"
RIGHTS = "roles/storage.objectUser and storage.buckets.get"
QUICK_S = 20.0  # a first look at a bucket gives up after so long; work under way is tried again for two minutes
STATUSES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "ABORTED")
CLIENTS = ("google.", "gcsfs.", "aiohttp.", "requests.", "urllib3.")  # modules of errors about network and rights


class Listed(SimpleNamespace):
    """One object of a listing: name (relative), size in bytes, generation."""

    name: str
    size: int
    generation: int


@dataclass(frozen=True, order=True)
class ObjectPath:
    """gs://bucket/key. Methods have pathlib's meaning; FileNotFoundError, PermissionError or ConnectionError, one line."""

    bucket: str
    key: str  # without slashes at its ends; empty for the bucket itself

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: object) -> "ObjectPath":
        return ObjectPath(self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name or self.bucket

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> "ObjectPath":
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> "ObjectPath":
        return self.parent / name

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: names need no folder."""

    def stat(self) -> SimpleNamespace:
        """st_size, in bytes, and generation of an object."""
        with _told(self):
            blob = self._blob()
            blob.reload()
        return SimpleNamespace(st_size=blob.size, generation=blob.generation)

    def is_file(self) -> bool:
        with _told(self):
            return bool(self.key) and self._blob().exists()

    def is_dir(self) -> bool:
        with _told(self):
            return any(True for _ in client().list_blobs(self.bucket, prefix=self._prefix(), max_results=1))

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def objects(self) -> list[Listed]:
        """All objects below, by name."""
        prefix = self._prefix()
        with _told(self):
            blobs = list(client().list_blobs(self.bucket, prefix=prefix))
        return [Listed(name=b.name[len(prefix) :], size=b.size, generation=b.generation) for b in blobs]

    def iterdir(self) -> Iterator["ObjectPath"]:
        prefix = self._prefix()
        with _told(self):
            blobs = client().list_blobs(self.bucket, prefix=prefix, delimiter="/")
            names = {blob.name for blob in blobs if blob.name != prefix} | {name.rstrip("/") for name in blobs.prefixes}
        yield from (ObjectPath(self.bucket, name) for name in sorted(names))

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """Of one level: a pattern with a slash is not known here."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def read(self) -> tuple[bytes, int]:
        """(the bytes, their generation), checksums compared."""
        with _told(self):
            blob = self._blob()
            return blob.download_as_bytes(), blob.generation

    def read_bytes(self) -> bytes:
        return self.read()[0]

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def put(self, data: bytes, replace: bool = True, generation: int | None = None, quick: bool = False) -> int:
        """Writes an object whole or not at all and returns its generation.

        Raises FileExistsError if the object exists (replace=False), or is not of `generation` (0: does not exist).
        """
        match = {"if_generation_match": generation} if generation is not None else {}
        match = match if replace else {"if_generation_match": 0}
        with _told(self):
            blob = self._blob()
            blob.upload_from_string(data, content_type="application/octet-stream", retry=_retry(quick), **match)
            return blob.generation

    def upload(self, file: Path) -> None:
        """Writes a local file's bytes, whole or not at all."""
        with _told(self):
            self._blob().upload_from_filename(str(file), content_type="application/octet-stream", retry=_retry())

    def download(self, file: Path, generation: int) -> None:
        """Writes this generation to a local file, checksums compared. Raises FileNotFoundError if it is gone."""
        with _told(self):
            self._blob().download_to_filename(str(file), if_generation_match=generation)

    def unlink(self, missing_ok: bool = False, generation: int | None = None) -> None:
        """Deletes an object. Raises FileExistsError if it is not of `generation`."""
        match = {} if generation is None else {"if_generation_match": generation}
        try:
            with _told(self):
                self._blob().delete(retry=_retry(), **match)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def write_bytes(self, data: bytes) -> None:
        self.put(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.put(text.encode(encoding))

    def open(self, mode: str = "r", encoding: str = "utf-8") -> Any:
        """The whole object in memory ("r", "rb"), or a buffer that is put when its `with` block ends well ("w", "wb")."""
        if mode in ("r", "rb"):
            return io.StringIO(self.read_text(encoding)) if mode == "r" else io.BytesIO(self.read_bytes())
        return self._writing(mode, encoding)

    @contextmanager
    def _writing(self, mode: str, encoding: str) -> Iterator[Any]:
        buffer = {"w": io.StringIO, "wb": io.BytesIO}[mode]()
        yield buffer
        self.write_bytes(buffer.getvalue() if mode == "wb" else buffer.getvalue().encode(encoding))

    def _blob(self) -> Any:
        return client().bucket(self.bucket).blob(self.key)

    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""


def check_bucket(path: ObjectPath, write: bool) -> None:
    """Lists one name below the path, and reads the bucket's metadata, as orbax does before it writes.

    Raises an OSError of one line, within about QUICK_S, if the bucket cannot be used.
    """
    options = {"retry": _retry(quick=True), "timeout": QUICK_S / 2}
    with _told(ObjectPath(path.bucket, "")):
        if write:
            client().get_bucket(path.bucket, **options)
        list(client().list_blobs(path.bucket, prefix=path._prefix(), max_results=1, **options))


@functools.cache
def client() -> Any:
    """The client of this process, with the machine's credentials. Raises ValueError if the library is not installed."""
    prepare_gcs()
    try:
        import gcsfs  # noqa: F401 - orbax reaches it through etils
        from google.cloud import storage
    except ImportError as error:
        raise UserError(f"{SCHEME} paths need {error.name}, which is not installed: {EXTRA}") from None
    return storage.Client()


def prepare_gcs() -> None:
    """Sets gcsfs up for orbax: no cached listings, and the plain JSON API. Call it before orbax opens gs://.

    A cached listing would hide files that other processes write, and those of tensorstore in this one.
    """
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from fsspec.config import conf

    conf.setdefault("gcs", {})["use_listings_cache"] = False


def is_trouble(error: BaseException) -> bool:
    """Whether an error is about the network or rights, not about the stored bytes."""
    if isinstance(error, FileNotFoundError) or getattr(error, "code", None) in (404, "404"):
        return False
    if isinstance(error, PermissionError | ConnectionError | TimeoutError) or str(error).startswith((*STATUSES, "Forbidden:")):
        return True
    return type(error).__module__.startswith(CLIENTS)


def _retry(quick: bool = False) -> Any:
    """The retry policy after passing faults. Every put and delete here may happen twice without harm."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(QUICK_S) if quick else DEFAULT_RETRY


@contextmanager
def _told(path: ObjectPath) -> Iterator[None]:
    """Turns the client's errors into OSErrors of one line that name the path."""
    try:
        yield
    except Exception as error:
        kind, said = type(error).__name__, " ".join(str(error).split())[:200]
        if not type(error).__module__.startswith(CLIENTS) and not isinstance(error, ConnectionError | TimeoutError):
            raise
        raise _translated(kind, getattr(error, "code", None), path, f"{kind}: {said}") from None


def _translated(kind: str, code: Any, path: ObjectPath, said: str) -> OSError:
    if code == 404:
        return FileNotFoundError(f"{path} does not exist" if path.key else f"the bucket {path} does not exist: name another")
    if code == 412:
        return FileExistsError(f"{path} is there already, or was changed meanwhile")
    if code in (401, 403) or kind in ("DefaultCredentialsError", "RefreshError"):
        return PermissionError(f"no right to use {path}: log in, or give the account {RIGHTS} ({said})")
    return ConnectionError(f"{path} cannot be reached: {said}")


WRITING = ".writing"  # in an object store's folder that is not finished


LOCK = ".lock"
