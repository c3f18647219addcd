"""A stand-in for Google Cloud Storage: its JSON API over HTTP on loopback, objects in memory, preconditions honoured.

It knows what google-cloud-storage, gcsfs and tensorstore ask for: reading with ranges, writing in one request, in two parts
or resumably, listing with delimiter and pages, deleting, `ifGenerationMatch` and its kin. A generation is never given twice.
What it lacks beside the real store: rights (one bucket refuses all), charges, and latency.
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

FORBIDDEN = "forbidden"  # a bucket that exists and may not be touched
PAGE = 1000
OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
LISTING = re.compile(r"/storage/v1/b/([^/]+)/o/?")
BUCKET = re.compile(r"/storage/v1/b/([^/]+)/?")
UPLOAD = re.compile(r"(?:/resumable)?/upload/storage/v1/b/([^/]+)/o/?")


class Object(NamedTuple):
    """One generation of an object."""

    data: bytes
    generation: int
    updated: float


class Refused(Exception):
    """An answer that is no success: its status code."""


class Bucket:
    """Objects by name, changed under one lock: a precondition and the change it guards are one step."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.lock = threading.Lock()
        self.clock = time.time_ns() // 1000

    def check(self, name: str, query: dict[str, str]) -> None:
        """Raises Refused(412) or, for a read of what the caller has, Refused(304); the lock is held."""
        found = self.objects[name].generation if name in self.objects else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != found:
            raise Refused(412)
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == found:
            raise Refused(304)

    def get(self, name: str, query: dict[str, str]) -> Object:
        with self.lock:
            self.check(name, query)
            found = self.objects.get(name)
            if found is None or "generation" in query and int(query["generation"]) != found.generation:
                raise Refused(404)
            return found

    def put(self, name: str, data: bytes, query: dict[str, str]) -> Object:
        with self.lock:
            self.check(name, query)
            self.clock = max(self.clock + 1, time.time_ns() // 1000)
            self.objects[name] = Object(data, self.clock, time.time())
            return self.objects[name]

    def delete(self, name: str, query: dict[str, str]) -> None:
        with self.lock:
            self.check(name, query)
            if self.objects.pop(name, None) is None:
                raise Refused(404)

    def listing(self, query: dict[str, str]) -> tuple[list[str], list[str], str | None]:
        """(names, prefixes, where the next page begins)."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        begin = max(query.get("startOffset", ""), query.get("pageToken", ""))
        end, most = query.get("endOffset"), min(int(query.get("maxResults", PAGE)), PAGE)
        names, prefixes = [], []
        with self.lock:
            known = sorted(name for name in self.objects if name.startswith(prefix) and name >= begin)
        for name in known:
            if end and name >= end:
                break
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            folder = name[: cut + 1] if cut >= 0 else None
            if folder is not None and folder in prefixes:
                continue
            if len(names) + len(prefixes) == most:
                return names, prefixes, name
            names, prefixes = (names, [*prefixes, folder]) if folder else ([*names, name], prefixes)
        return names, prefixes, None


class Store(ThreadingHTTPServer):
    """The server. `log`: (method, path) of every request; `broken`: the code it answers to all while that is set."""

    daemon_threads = True

    def __init__(self, buckets: tuple[str, ...], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.buckets = {name: Bucket() for name in (*buckets, FORBIDDEN)}
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytes]] = {}
        self.log: list[tuple[str, str]] = []
        self.broken = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Clients that are killed hang up in the middle: nothing to report."""

    def environment(self) -> dict[str, str]:
        """By which the three clients find it."""
        return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url, "NO_PROXY": "127.0.0.1"}

    def names(self, url: str) -> list[str]:
        """Of the objects whose gs:// url starts with `url`."""
        bucket, _, prefix = url.removeprefix("gs://").partition("/")
        return sorted(name for name in self.buckets[bucket].objects if name.startswith(prefix))

    def data(self, url: str) -> bytes:
        bucket, _, name = url.removeprefix("gs://").partition("/")
        return self.buckets[bucket].objects[name].data


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Store

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def _answer(self) -> None:
        body = self._body()
        split = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(split.query, keep_blank_values=True).items()}
        self.server.log.append((self.command, split.path))
        try:
            if self.server.broken:
                raise Refused(self.server.broken)
            self._route(split.path, query, body)
        except Refused as refused:
            code = refused.args[0]
            self._json({"error": {"code": code, "message": f"the stand-in says {code}"}} if code >= 400 else None, code)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        if found := UPLOAD.fullmatch(path):
            self._upload(unquote(found[1]), query, body)
        elif found := OBJECT.fullmatch(path):
            self._object(unquote(found[1]), unquote(found[2]), query, path.startswith("/download"))
        elif found := LISTING.fullmatch(path):
            self._list(unquote(found[1]), query)
        elif found := BUCKET.fullmatch(path):
            self._bucket(unquote(found[1]))
            self._json({"kind": "storage#bucket", "name": unquote(found[1]), "id": unquote(found[1]), "location": "US"})
        else:
            raise Refused(404)

    def _bucket(self, name: str) -> Bucket:
        if name == FORBIDDEN:
            raise Refused(403)
        if name not in self.server.buckets:
            raise Refused(404)
        return self.server.buckets[name]

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        held = self._bucket(bucket)
        names, prefixes, following = held.listing(query)
        items = [_about(bucket, name, held.objects[name]) for name in names if name in held.objects]
        answer = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        self._json(answer | ({"nextPageToken": following} if following else {}))

    def _object(self, bucket: str, name: str, query: dict[str, str], download: bool) -> None:
        held = self._bucket(bucket)
        if self.command == "DELETE":
            held.delete(name, query)
            return self._send(204, b"", {})
        found = held.get(name, query)
        if self.command != "GET" or not (download or query.get("alt") == "media"):
            return self._json(_about(bucket, name, found))
        about = _about(bucket, name, found)
        headers = {
            "Content-Type": "application/octet-stream",
            "x-goog-hash": f"crc32c={about['crc32c']}",
            "x-goog-generation": about["generation"],
            "x-goog-stored-content-length": about["size"],
            "ETag": f'"{about["generation"]}"',
        }
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._send(200, found.data, headers)
        size = len(found.data)
        begin = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        end = min(int(wanted[2]) + 1, size) if wanted[1] and wanted[2] else size
        if begin >= size:
            return self._send(416, b"", {"Content-Range": f"bytes */{size}"})
        return self._send(206, found.data[begin:end], headers | {"Content-Range": f"bytes {begin}-{end - 1}/{size}"})

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        held = self._bucket(bucket)
        if "upload_id" in query:
            return self._resume(query["upload_id"], body)
        kind = query.get("uploadType")
        if kind == "media":
            return self._json(_about(bucket, query["name"], held.put(query["name"], body, query)))
        if kind == "multipart":
            about, data = _two_parts(self.headers["Content-Type"], body)
            name = query.get("name") or json.loads(about)["name"]
            return self._json(_about(bucket, name, held.put(name, data, query)))
        name = query.get("name") or json.loads(body)["name"]
        upload = os.urandom(8).hex()
        self.server.uploads[upload] = (bucket, name, query, b"")
        where = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload}"
        return self._send(200, b"", {"Location": where, "X-GUploader-UploadID": upload})

    def _resume(self, upload: str, body: bytes) -> None:
        """A chunk of a resumable upload; the object appears with the last one."""
        bucket, name, query, before = self.server.uploads[upload]
        data = before + body
        said = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+))/(\d+|\*)", self.headers.get("Content-Range", f"bytes */{len(data)}"))
        if said[3] != "*" and int(said[3]) == len(data):
            del self.server.uploads[upload]
            return self._json(_about(bucket, name, self._bucket(bucket).put(name, data, query)))
        self.server.uploads[upload] = (bucket, name, query, data)
        return self._send(308, b"", {"Range": f"bytes=0-{len(data) - 1}"} if data else {})

    def _json(self, value: object, code: int = 200) -> None:
        data = b"" if value is None else json.dumps(value).encode()
        self._send(code, data, {"Content-Type": "application/json; charset=UTF-8"})

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _two_parts(kind: str, body: bytes) -> tuple[bytes, bytes]:
    """The contents of a multipart body with two parts; some clients end lines as mails do, some as Unix does."""
    boundary = re.search(r'boundary="?([^";]+)"?', kind)[1].encode()
    marks = list(re.finditer(rb"(?:^|\r?\n)--" + re.escape(boundary) + rb"(?:--)?[ \t]*(?:\r?\n|$)", body))
    first, second = body[marks[0].end() : marks[1].start()], body[marks[1].end() : marks[-1].start()]
    bare = lambda part: re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]
    return bare(first), bare(second)


def _about(bucket: str, name: str, found: Object) -> dict[str, str]:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(found.updated)) + f".{int(found.updated % 1 * 1000):03d}Z"
    crc = base64.b64encode(google_crc32c.value(found.data).to_bytes(4, "big")).decode()
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "id": f"{bucket}/{name}/{found.generation}",
        "generation": str(found.generation),
        "metageneration": "1",
        "size": str(len(found.data)),
        "crc32c": crc,
        "md5Hash": base64.b64encode(hashlib.md5(found.data).digest()).decode(),
        "etag": str(found.generation),
        "contentType": "application/octet-stream",
        "updated": stamp,
        "timeCreated": stamp,
    }


@contextmanager
def serve(*buckets: str) -> Iterator[Store]:
    """A store with these buckets and FORBIDDEN, until the block ends."""
    store = Store(buckets)
    threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
