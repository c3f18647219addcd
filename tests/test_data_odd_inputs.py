"""Data sets of other people: turned photos, dotted keys, dangling links, columns of other types. Nothing is dropped unsaid."""

import io
import json
import logging
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from made_images import SIDE, block, encode, write_tar
from PIL import Image, ImageOps

from proreflow_jax.data import coco, folder, images, kinds, webdataset

ORIENTATION = 0x0112


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    """A photo as a camera stores it: white above, EXIF says how it is to be turned."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 255
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(buffer, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_stands_as_viewers_show_it(orientation, kind):
    encoded = turned(orientation, kind)
    upright = io.BytesIO()
    ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).save(upright, "PNG")
    expected = images.decode_image(upright.getvalue(), 16)
    np.testing.assert_allclose(images.decode_image(encoded, 16).astype(int), expected.astype(int), atol=1)


@pytest.mark.parametrize("orientation", [0, 9, 700])
def test_an_orientation_that_means_nothing_turns_nothing(orientation):
    np.testing.assert_array_equal(images.decode_image(turned(orientation), 16), images.decode_image(turned(1), 16))


def test_damaged_exif_is_no_reason_to_lose_a_photo():
    encoded = turned(6).replace(b"Exif\x00\x00MM", b"Exif\x00\x00XY").replace(b"Exif\x00\x00II", b"Exif\x00\x00XY")
    np.testing.assert_array_equal(images.decode_image(encoded, 16), images.decode_image(turned(1), 16))


def test_fids_reader_does_not_turn_them():
    """The published numbers were measured so, by Pillow and TensorFlow alike."""
    assert coco.decode_coco_image(turned(6), "image").shape == (48, 64, 3)
    np.testing.assert_array_equal(coco.decode_coco_image(turned(6), "image"), coco.decode_coco_image(turned(1), "image"))


# Tars


def tar(tmp_path, *members, key="txt"):
    path = write_tar(tmp_path / "a.tar", list(members))
    return webdataset.open_webdataset(str(path), key, tmp_path / "index")


def test_keys_with_dots_are_samples_of_their_own(tmp_path):
    dotted = [(f"pic.{i}.{end}", data) for i in range(5) for end, data in (("jpg", encode(i)), ("txt", b"number %d" % i))]
    source = tar(tmp_path, *dotted, ("plain.jpg", encode(9)), ("plain.txt", b"plain"))
    assert [source[i].caption for i in range(len(source))] == [*(f"number {i}" for i in range(5)), "plain"]
    assert [source[i].image for i in range(len(source))] == [*map(encode, range(5)), encode(9)]


def test_members_may_be_typed_by_name(tmp_path):
    """As webdataset's own writers do: 0.image.jpg beside 0.caption.txt."""
    source = tar(tmp_path, ("0.image.jpg", encode(0)), ("0.caption.txt", b"zero"), ("1.image.jpg", encode(1)))
    assert (source[0].image, source[0].caption, len(source)) == (encode(0), "zero", 2)
    with pytest.raises(images.Unusable, match="1.image.jpg.*no txt beside it"):
        source[1]


def test_a_caption_without_its_dots_belongs_to_the_one_image(tmp_path):
    source = tar(tmp_path, ("0.jpg", encode(0)), ("0.long.txt", b"long"), ("0.txt", b"short"))
    assert (len(source), source[0].caption) == (1, "short")


def test_several_images_of_a_key_are_counted_as_bad_where_no_caption_tells_them_apart(tmp_path):
    source = tar(tmp_path, ("0.left.jpg", encode(0)), ("0.right.jpg", encode(1)), ("0.txt", b"both"))
    assert len(source) == 2
    for i in range(2):
        with pytest.raises(images.Unusable, match="no txt beside it"):
            source[i]


def test_samples_without_an_image_are_counted_aloud(tmp_path, caplog):
    members = [("0.jpg", encode(0)), ("0.txt", b"zero"), ("1.avif", b"..."), ("1.txt", b"one"), ("2.txt", b"two")]
    for _ in range(2):  # from the shard, then from the kept index
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert len(tar(tmp_path, *members)) == 1
        (line,) = [record.getMessage() for record in caplog.records]
        assert "2 of 3 samples have no image (jpg, jpeg, png, webp)" in line


# Folders


@pytest.fixture
def photos(tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    for i in range(4):
        (place / f"{i}.jpg").write_bytes(encode(i))
        (place / f"{i}.txt").write_text(f"number {i}")
    return place


def test_a_dangling_link_is_one_bad_example(photos, tmp_path):
    (photos / "z.jpg").symlink_to("gone.jpg")
    (photos / "z.txt").write_text("gone")
    (photos / "zz.jpg").symlink_to("zz.jpg")
    (photos / "zz.txt").write_text("in a circle")
    source = kinds.open_data(block(tmp_path, kind="folder", path=photos, caption_key="txt", max_bad=0.5))
    assert [source[i]["caption"] for i in range(6)] == [f"number {i}" for i in (0, 1, 2, 3, 0, 0)]
    strict = kinds.open_data(block(tmp_path, kind="folder", path=photos, caption_key="txt", max_bad=0.0))
    with pytest.raises(ValueError, match=r"1 of 6 examples .* are bad.*'z.jpg'.*link.*gone"):
        strict[4]


def test_metadata_may_lie_one_folder_down(photos, caplog):
    below = photos.parent / "set"
    os.makedirs(below / "train")
    photos.rename(below / "train" / "cats")
    place = below / "train"
    (place / "cats" / "metadata.jsonl").write_text(
        '{"file_name": "3.jpg", "text": "three"}\n{"file_name": "1.jpg", "text": "one"}\n'
    )
    (place / "dogs").mkdir()
    (place / "dogs" / "a.jpg").write_bytes(encode(7))
    (place / "dogs" / "metadata.csv").write_text("file_name,text\na.jpg,a dog\n")
    with caplog.at_level(logging.INFO):
        source = folder.open_image_folder(str(below), "text")
    assert source.names == ["train/cats/3.jpg", "train/cats/1.jpg", "train/dogs/a.jpg"]
    assert [source[i].caption for i in range(3)] == ["three", "one", "a dog"]
    assert "2 of 5 images are named by no metadata" in caplog.text
    before = folder.folder_identity(str(below), "text")
    (place / "dogs" / "metadata.csv").write_text("file_name,text\na.jpg,a hound\n")
    assert folder.folder_identity(str(below), "text") != before


def test_metadata_of_a_folder_below_stays_in_that_folder(photos):
    (photos / "below").mkdir()
    (photos / "below" / "metadata.jsonl").write_text('{"file_name": "../0.jpg", "text": "zero"}\n')
    with pytest.raises(ValueError, match="may lead outside the folder"):
        folder.open_image_folder(str(photos), "text")


def test_an_image_that_two_files_of_metadata_name_is_refused(photos):
    (photos / "below").mkdir()
    (photos / "below" / "a.jpg").write_bytes(encode(5))
    (photos / "below" / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "one"}\n')
    (photos / "metadata.jsonl").write_text('{"file_name": "below/a.jpg", "text": "other"}\n')
    with pytest.raises(ValueError, match=r"below/a.jpg.* two"):
        folder.open_image_folder(str(photos), "text")


def test_files_that_are_left_out_are_counted_aloud(photos, caplog):
    for name in ("a.tiff", "b.tiff", "c.heic", "notes.md"):
        (photos / name).touch()
    with caplog.at_level(logging.INFO):
        assert len(folder.open_image_folder(str(photos), "txt")) == 4
    assert "1 .heic, 1 .md, 2 .tiff" in caplog.text


# Parquet


def rows(tmp_path, table, caption_key, image_key="image"):
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = kinds.open_data(
        block(tmp_path, kind="parquet", path=tmp_path / "a.parquet", image_key=image_key, caption_key=caption_key)
    )
    return [(source[i]["caption"], source[i]["image"]) for i in range(len(source))]


TEXTS = ["a dog", "a cat", "a dog"]
PICTURES = [encode(i) for i in range(3)]
KINDS = {
    "dictionary": pyarrow.array(TEXTS).dictionary_encode(),
    "string view": pyarrow.array(TEXTS, pyarrow.string_view()),
    "list view": pyarrow.array([[text, "more"] for text in TEXTS], pyarrow.list_view(pyarrow.string())),
    "fixed list": pyarrow.array([[text] for text in TEXTS], pyarrow.list_(pyarrow.string(), 1)),
    "list of a dictionary": pyarrow.array(
        [[text] for text in TEXTS], pyarrow.list_(pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    ),
}


@pytest.mark.parametrize("column", KINDS.values(), ids=KINDS)
def test_captions_of_every_arrow_type_of_text(tmp_path, column):
    try:
        read = rows(tmp_path, pyarrow.table({"image": PICTURES, "text": column}), "text")
    except pyarrow.ArrowNotImplementedError:
        pytest.skip("this pyarrow does not write that type")
    assert [caption for caption, _ in read] == TEXTS


def test_images_of_other_types_of_bytes_and_fields_below_a_struct(tmp_path):
    structs = [
        {"picture": {"bytes": picture, "path": "x"}, "words": {"en": text, "de": "x"}}
        for picture, text in zip(PICTURES, TEXTS, strict=True)
    ]
    read = rows(tmp_path, pyarrow.table({"sample": structs}), "sample/words/en", "sample/picture")
    assert [caption for caption, _ in read] == TEXTS
    np.testing.assert_array_equal(read[1][1], images.decode_image(PICTURES[1], SIDE))
    listed = pyarrow.table(
        {"image": pyarrow.array(PICTURES, pyarrow.binary_view()), "notes": [[{"text": text}] for text in TEXTS]}
    )
    assert [caption for caption, _ in rows(tmp_path, listed, "notes/text")] == TEXTS


def test_a_column_whose_name_holds_a_slash_is_that_column(tmp_path):
    assert [caption for caption, _ in rows(tmp_path, pyarrow.table({"image": PICTURES, "a/b": TEXTS}), "a/b")] == TEXTS


def test_a_field_that_is_not_there_is_named_with_those_that_are(tmp_path):
    table = pyarrow.table({"image": PICTURES, "words": [{"en": text} for text in TEXTS]})
    with pytest.raises(ValueError, match=r"no field 'fr' in 'words', it has \['en'\]: set --config.data.caption_key"):
        rows(tmp_path, table, "words/fr")
    with pytest.raises(ValueError, match=r"'words' is struct.*, not text"):
        rows(tmp_path, table, "words")
    assert json.dumps(TEXTS)
