"""What a stranger's tar, parquet or folder may not do: one line that names the file and the flag, nothing read outside."""

import json
import os
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from made_images import LAYOUTS, block, encode, jsonl, members, originals, parquet, webdataset, write_tar
from test_data_captions import png_header, refused

from proreflow_jax.data import images, kinds

ERRORS = (ValueError, FileNotFoundError)


def opened(folder, fields, **more):
    return kinds.open_data(block(folder, **(fields | more)))


def tar_source(folder, held, key="txt", **more):
    """A source of one tar with these members, and a good sample in front that lets it open."""
    write_tar(folder / "a.tar", [("good.png", encode(0)), ("good.txt", b"good"), ("good.json", b'{"text": "good"}'), *held])
    return opened(folder, {"kind": "webdataset", "path": str(folder / "a.tar"), "caption_key": key}, **more)


# --- tars -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["in a header", "after a header", "in an image", "between members", "in the end mark"])
def test_a_cut_tar_is_refused_and_leaves_no_index(tmp_path, place):
    fields = webdataset(tmp_path, originals())
    path = tmp_path / "a-001.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-2:]
        end = tar.offset
    held = {"in a header": 100, "after a header": 512, "in an image": last[0].offset_data + 9}
    held |= {"between members": last[1].offset, "in the end mark": end + 511}
    path.write_bytes(path.read_bytes()[: held[place]])
    with pytest.raises(ValueError) as error:
        opened(tmp_path, fields)
    refused(error, "a-001.tar", "not a whole uncompressed tar", "--config.data.path")
    assert len(list((tmp_path / "index").iterdir())) == 1  # of the whole one


def test_damaged_headers_compressed_and_foreign_files_are_refused(tmp_path):
    fields = webdataset(tmp_path, originals())
    path = tmp_path / "a-000.tar"
    good = path.read_bytes()
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    flipped = bytearray(good)
    flipped[second + 10] ^= 4
    for bad in (bytes(flipped), b"", b"\x1f\x8b" + good[2:], b"<html>" * 999, bytes(10240)):
        path.write_bytes(bad)
        if bad == bytes(10240):  # an empty tar is whole
            assert len(opened(tmp_path, fields)) == 4
            continue
        with pytest.raises(ValueError) as error:
            opened(tmp_path, fields)
        refused(error, "a-000.tar", "--config.data.path")


def test_names_and_links_in_a_tar_are_never_paths(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode(5))
    inside = tmp_path / "in"
    inside.mkdir()
    with tarfile.open(inside / "a.tar", "w") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
    rest = [
        ("../secret.png", encode(1)),
        ("../secret.txt", b"up"),
        ("/etc/passwd.png", encode(2)),
        ("/etc/passwd.txt", b"root"),
    ]
    write_tar(inside / "b.tar", [*rest, ("._x.png", b"apple"), ("._x.txt", b"apple"), ("dir.png/a.TXT", b"x")])
    before = sorted(tmp_path.rglob("*"))
    source = opened(tmp_path, {"kind": "webdataset", "path": str(inside), "caption_key": "txt"})
    assert [source[i]["caption"] for i in range(len(source))] == ["up", "root"]
    np.testing.assert_array_equal(source[0]["image"], images.decode_image(encode(1), 16))
    assert [path for path in sorted(tmp_path.rglob("*")) if "index" not in path.parts] == before


BAD_SAMPLES = {  # members of one sample -> what is said
    "no caption": ([("x.png", encode(1))], "no txt beside it"),
    "empty caption": ([("x.png", encode(1)), ("x.txt", b" \n\t")], "no caption"),
    "latin caption": ([("x.png", encode(1)), ("x.txt", b"caf\xe9")], "not UTF-8 (byte 4)"),
    "control": ([("x.png", encode(1)), ("x.txt", b"a\x1b[31m")], "control character"),
    "long": ([("x.png", encode(1)), ("x.txt", b"x" * 4097)], "longer than 4096"),
    "huge caption": ([("x.png", encode(1)), ("x.txt", bytes(1 << 21))], "over the limit"),
    "bomb": ([("x.png", png_header(2**31 - 1, 9)), ("x.txt", b"a")], "limit"),
    "pixels": ([("x.png", png_header(8200, 8200)), ("x.txt", b"a")], "8200 x 8200"),
    "text as image": ([("x.png", b"hello"), ("x.txt", b"a")], "not an image"),
    "name of escapes": ([("x\x1b[2J.png", b"hello"), ("x\x1b[2J.txt", b"a")], r"x\x1b[2J.png"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_a_bad_sample_is_one_line_and_is_replaced(tmp_path, kind):
    held, why = BAD_SAMPLES[kind]
    with pytest.raises(ValueError) as error:
        tar_source(tmp_path, held)[1]
    refused(error, "a.tar", "x", why, "--config.data.max_bad")
    assert "\x1b" not in str(error.value)
    assert tar_source(tmp_path, held, max_bad=0.5)[1]["caption"] == "good"


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{", b"[" * 100_000, b'{"text": 5}', b'{"text": []}', b"{}", b'{"text": "\\ud800"}', b'{"text": "\xff"}'],
)
def test_a_json_without_caption_is_one_line(tmp_path, text):
    source = tar_source(tmp_path, [("x.png", encode(1)), ("x.json", text)], key="json/text")
    with pytest.raises(ValueError) as error:
        source[1]
    refused(error, "x.png", "caption")


def test_of_several_members_with_one_name_the_first_counts_and_json_may_hold_a_list(tmp_path):
    held = [("d/x.json", b'{"text": ["one", "two"]}'), ("d/x.webp", encode(3)), ("d/x.PNG", encode(1)), ("d/x.json", b"{}")]
    source = tar_source(tmp_path, held, key="json/text")
    assert source[1]["caption"] == "one"
    np.testing.assert_array_equal(source[1]["image"], images.decode_image(encode(1), 16))


@pytest.mark.parametrize("key", ["captions/text", "json", "txt/a", "jpg", "../txt", "", "json/a/b"])
def test_a_caption_key_of_another_kind_is_refused(tmp_path, key):
    with pytest.raises(ValueError) as error:
        tar_source(tmp_path, [], key=key)
    refused(error, f"--config.data.caption_key={key!r}")


def test_missing_shards_and_places_are_named(tmp_path):
    fields = webdataset(tmp_path, originals())
    cases = {
        str(tmp_path / "a-{000..003}.tar"): "2 of 4 files are missing, such as",
        str(tmp_path / "b*.tar"): "no file is so named",
        str(tmp_path / "nowhere"): "nowhere",
        "gs://bucket/a.tar": "mount the bucket",
    }
    (tmp_path / "empty").mkdir()
    cases[str(tmp_path / "empty")] = "holds no .tar"
    for path, why in cases.items():
        with pytest.raises(ERRORS) as error:
            opened(tmp_path, fields, path=path)
        refused(error, why, "--config.data")
    write_tar(tmp_path / "empty" / "a.tar", [("readme.md", b"no")])
    with pytest.raises(ValueError, match="holds no image"):
        opened(tmp_path, fields, path=str(tmp_path / "empty"))


# --- parquet ----------------------------------------------------------------------------------------------------------


def test_a_broken_parquet_file_is_one_line(tmp_path):
    fields = parquet(tmp_path, originals())
    path = tmp_path / "train-00001-of-00002.parquet"
    good = path.read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for bad in (b"", b"PAR1", good[:-9], good[: len(good) // 2], b"x" * 500, good[:footer] + bytes(12) + good[footer + 12 :]):
        path.write_bytes(bad)
        with pytest.raises(ValueError) as error:
            opened(tmp_path, fields)
        refused(error, path.name, "--config.data.path")


def test_a_damaged_row_group_ends_the_run_and_is_not_replaced(tmp_path):
    images_, captions = zip(*originals(), strict=True)
    path = tmp_path / "a.parquet"
    held = pyarrow.table({"image": images_, "text": captions})
    pyarrow.parquet.write_table(held, path, row_group_size=2, write_page_checksum=True)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(originals()[3][0]) + 100] ^= 1
    path.write_bytes(damaged)
    source = opened(tmp_path, {"kind": "parquet", "path": str(path), "caption_key": "text"}, max_bad=0.9)
    assert source[0]["caption"] == "a dog"
    with pytest.raises(ValueError) as error:
        source[3]
    refused(error, "a.parquet: row group 1 is damaged")


def write_columns(folder, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return {"kind": "parquet", "path": str(folder), "image_key": "image", "caption_key": "text"}


def test_columns_of_other_names_and_types_are_refused(tmp_path):
    good = {"image": [encode(0)], "text": ["a"]}
    cases = {
        "image_key": [{"image": ["a"], "text": ["a"]}, {"text": ["a"]}, {"image": [{"path": "a.png"}], "text": ["a"]}],
        "caption_key": [{"image": [encode(0)], "text": [1]}, {"image": [encode(0)], "caption": ["a"]}],
    }
    for flag, tables in cases.items():
        for columns in tables:
            with pytest.raises(ValueError) as error:
                opened(tmp_path, write_columns(tmp_path, **columns))
            refused(error, "a.parquet", f"--config.data.{flag}")
    assert opened(tmp_path, write_columns(tmp_path, **good))[0]["caption"] == "a"
    with pytest.raises(ValueError, match="holds no row"):
        empty = {"image": pyarrow.array([], "binary"), "text": pyarrow.array([], "string")}
        opened(tmp_path, write_columns(tmp_path, **empty))


def test_a_path_in_a_parquet_file_is_never_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(encode(5))
    rows = [{"bytes": encode(0), "path": None}, {"bytes": None, "path": str(tmp_path / "secret.png")}]
    source = opened(tmp_path, write_columns(tmp_path, image=rows, text=["a", "b"]))
    with pytest.raises(ValueError, match="is not followed"):
        source[1]


def test_bad_captions_of_a_parquet_file_are_counted(tmp_path):
    text = pyarrow.array([b"good", b"caf\xe9", b"", None], pyarrow.binary()).view(pyarrow.string())
    source = opened(tmp_path, write_columns(tmp_path, image=[encode(0)] * 4, text=text), max_bad=0.8)
    assert [source[i]["caption"] for i in range(4)] == ["good"] * 4


def test_large_row_groups_and_several_splits_are_refused(tmp_path, monkeypatch):
    fields = parquet(tmp_path, originals())
    with monkeypatch.context() as patch:
        patch.setattr("proreflow_jax.data.parquet.GROUP_LIMIT", 1000)
        with pytest.raises(ValueError, match="row group 0 has .* over the limit of 1000.*docs/data.md"):
            opened(tmp_path, fields)
    monkeypatch.setattr("proreflow_jax.data.parquet.KEPT_BYTES", 1000)  # room for one group
    source = opened(tmp_path, fields)
    assert [source[i]["caption"] for i in (0, 6, 3, 0)] == [originals()[i][1] for i in (0, 6, 3, 0)]
    (tmp_path / "train-00000-of-00002.parquet").rename(tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"several splits, test and train: name one by .*test-\*.parquet"):
        opened(tmp_path, fields)


# --- folders ----------------------------------------------------------------------------------------------------------

OUTSIDE = ["../secret.png", "/etc/passwd.png", "b/../../secret.png", "..", "b//x.png", "b\\x.png", "x\x00.png", "", None, 5]


@pytest.mark.parametrize("name", OUTSIDE)
def test_metadata_that_leads_outside_is_refused(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(encode(5))
    (tmp_path / "in").mkdir()
    fields = jsonl(tmp_path / "in", originals())
    with open(tmp_path / "in" / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": name, "text": "a"}))
    with pytest.raises(ValueError) as error:
        opened(tmp_path, fields)
    refused(error, "metadata.jsonl, line 8", "file_name")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("text", [b"caf\xe9", b"[1]", b"{", b"", b"file_name,text\n", b'file_name,text\n"a', b"x" * (2 << 20)])
def test_broken_metadata_is_one_line(tmp_path, name, text):
    (tmp_path / "a.png").write_bytes(encode(0))
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ERRORS) as error:
        opened(tmp_path, {"kind": "folder", "path": str(tmp_path), "caption_key": "text"})
    refused(error, name)


def test_lost_images_and_columns_are_named(tmp_path):
    fields = jsonl(tmp_path, originals())
    with pytest.raises(ValueError) as error:
        opened(tmp_path, fields, caption_key="caption")
    refused(error, "no column 'caption'", "--config.data.caption_key")
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match="both metadata.jsonl and metadata.csv"):
        opened(tmp_path, fields)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "b" / "z9.jpg").unlink()
    with pytest.raises(FileNotFoundError) as error:
        opened(tmp_path, fields)
    refused(error, "names 1 images that are not there", "'b/z9.jpg'")
    for bad in (tmp_path / "nowhere", tmp_path / "b" / "z8.jpg"):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            opened(tmp_path, fields, path=str(bad))


@pytest.mark.parametrize("layout", ["beside", "jsonl", "csv", "webdataset", "parquet"])
def test_a_missing_caption_is_replaced(tmp_path, layout):
    rows = [(image, None if i == 2 else caption) for i, (image, caption) in enumerate(originals())]
    fields = LAYOUTS[layout](tmp_path, rows)
    assert opened(tmp_path, fields, max_bad=0.5)[2]["caption"] == "four"
    with pytest.raises(ValueError) as error:
        opened(tmp_path, fields)[2]
    refused(error, "--config.data.max_bad")


def test_a_pipe_in_a_folder_does_not_keep_us_waiting(tmp_path):
    for name in ("a.png", "b.txt"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "a.txt").write_text("a")
    for name in ("b.png", "c.png"):
        (tmp_path / name).write_bytes(encode(0))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfa\r\n  caption\r\n")
    source = opened(tmp_path, {"kind": "folder", "path": str(tmp_path), "caption_key": "txt"}, max_bad=0.7)
    assert [source[i]["caption"] for i in range(3)] == ["a caption"] * 3


def test_an_image_over_the_limit_of_bytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("proreflow_jax.data.folder.BYTE_LIMIT", 300)
    monkeypatch.setattr("proreflow_jax.data.webdataset.BYTE_LIMIT", 300)
    write_tar(tmp_path / "a.tar", members([(encode(0), "a")]))
    (tmp_path / "a.png").write_bytes(encode(0))
    (tmp_path / "a.txt").write_bytes(b"a")
    for fields in ({"kind": "folder", "path": str(tmp_path)}, {"kind": "webdataset", "path": str(tmp_path)}):
        with pytest.raises(ValueError, match="over the limit of 300"):
            opened(tmp_path, fields)
