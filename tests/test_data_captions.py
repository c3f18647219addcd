"""What a tfds folder gives, and what a stranger's folder, image or prompt file may not do."""

import importlib
import io
import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.splits import SplitDict

from proreflow_jax.data import captions, images, loader, prompts

F = tfds.features
TEXTS = [["a dog", "ein Hund"], ["a cat on a mat"], ["one", "two", "three"], ["größe 日本"], ["e"]]


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind)
    return buffer.getvalue()


def picture(i, height=16, width=16):
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)


def coco_like(folder, images, texts=TEXTS, shards=(3, 2)):
    """A prepared dataset with coco_captions' features, in two shards."""
    below = {"text": F.Text(), "id": F.Scalar(np.int64)}
    features = F.FeaturesDict({"image": F.Image(), "image/filename": F.Text(), "captions": F.Sequence(below)})
    folder.mkdir()
    template = tfds.core.ShardedFileTemplate(folder, dataset_name="coco", split="val", filetype_suffix="array_record")
    serializer, rows = ExampleSerializer(features.get_serialized_info()), iter(zip(images, texts, strict=True))
    for shard, count in enumerate(shards):
        path = template.sharded_filepath(shard_index=shard, num_shards=len(shards))
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for _ in range(count):
            image, words = next(rows)
            said = [{"text": text, "id": 0} for text in words]
            example = features.encode_example({"image": image, "image/filename": "x.png", "captions": said})
            writer.write(serializer.serialize_example(example))
        writer.close()
    identity = DatasetIdentity("coco", tfds.core.Version("1.0.0"), str(folder), module_name="somebody.coco_captions")
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format("array_record")
    split = tfds.core.SplitInfo(name="val", shard_lengths=list(shards), num_bytes=0, filename_template=template)
    info.set_splits(SplitDict([split]))
    info.write_to_directory(folder)
    return folder


def opened(folder, split="val", image_key="image", caption_key="captions/text", resolution=16):
    return captions.open_tfds(folder, split, image_key, caption_key, resolution)


@pytest.fixture
def coco(tmp_path):
    return coco_like(tmp_path / "coco", [encode(picture(i)) for i in range(5)])


def refused(error, *parts):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    assert all(part in text for part in parts), text


def test_images_and_nested_captions_come_back(coco):
    source = opened(coco)
    assert len(source) == 5
    for i, words in enumerate(TEXTS):
        np.testing.assert_array_equal(source[i]["image"], picture(i))
        assert source[i]["caption"] == words[0]
        assert [source[i, j]["caption"] for j in range(6)] == [words[j % len(words)] for j in range(6)]
    assert opened(coco, caption_key="image/filename")[4]["caption"] == "x.png"
    with pytest.raises(IndexError):
        source[5]


def test_a_part_of_a_split_is_a_part(coco):
    source = opened(coco, split="val[2:4]")
    assert [source[i]["caption"] for i in range(len(source))] == ["one", "größe 日本"]


def test_the_loader_reads_it_from_many_threads(coco):
    with loader.Loader(opened(coco), 5, seed=0, prefetch=6) as batches:
        for (_, batch), _ in zip(batches, range(12), strict=False):
            assert sorted(batch["caption"]) == sorted(words[0] for words in TEXTS)
            assert batch["image"].shape == (5, 16, 16, 3)


def test_no_tensorflow_torch_or_jax_is_imported(coco):
    code = f"""
import sys
from proreflow_jax.data import captions, digits, loader, records
source = captions.open_tfds({str(coco)!r}, "val", "image", "captions/text", 8)
source[0]
print([name for name in ("tensorflow", "torch", "jax", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    image = images.decode_image(encode(Image.new(mode, (9, 9), 1 if mode == "1" else None)), 9)
    assert image.shape == (9, 9, 3) and image.dtype == np.uint8


def test_grey_keeps_its_values_and_transparency_lies_on_white():
    grey = picture(0)[..., 0]
    np.testing.assert_array_equal(images.decode_image(encode(grey), 16), np.repeat(grey[..., None], 3, -1))
    clear = np.dstack([picture(1), np.zeros((16, 16), np.uint8)])
    assert (images.decode_image(encode(clear), 16) == 255).all()


@pytest.mark.parametrize("height, width", [(16, 40), (40, 16), (16, 17)])
def test_the_centre_square_is_taken(height, width):
    image, top, left = picture(2, height, width), (height - 16) // 2, (width - 16) // 2
    np.testing.assert_array_equal(images.decode_image(encode(image), 16), image[top : top + 16, left : left + 16])


def test_resizing_the_square_is_resizing_the_short_side_and_cropping():
    whole = Image.fromarray(picture(3, 32, 96))
    slow = np.asarray(whole.resize((48, 16), Image.Resampling.BICUBIC))[:, 16:32]
    assert np.abs(images.decode_image(encode(whole), 16).astype(int) - slow).max() <= 1


def png_header(width, height):
    """A PNG whose header promises a size and whose pixels are missing."""
    data = bytearray(encode(picture(0)))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    crc = zlib.crc32(bytes(data[12:29]))
    return bytes(data[:29]) + crc.to_bytes(4, "big") + bytes(data[33:])


BAD_IMAGES = {
    "no image": (b"hello", "not an image"),
    "nothing": (b"", "not an image"),
    "cut": (encode(picture(0))[:300], "damaged"),
    "damaged": (encode(picture(0))[:200] + bytes(100) + encode(picture(0))[300:], "damaged"),
    "format": (encode(picture(0), "TIFF"), "not an image of JPEG"),
    "bits": (encode(picture(0)[..., 0].astype(np.uint16)), "mode I;16"),
    "bomb": (png_header(9000, 9000), "pixels"),
    "huge bomb": (png_header(2**31 - 1, 2**31 - 1), "exceeds limit"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_one_line_that_names_its_record(tmp_path, kind):
    bad, why = BAD_IMAGES[kind]
    images = [encode(picture(0)), bad] + [encode(picture(0))] * 3
    source = opened(coco_like(tmp_path / "coco", images))
    assert source[0]["image"].shape == (16, 16, 3)
    with pytest.raises(ValueError) as error:
        source[1]
    refused(error, "record 1", why, "--config.data.path")


def test_an_image_without_caption_is_named(tmp_path):
    source = opened(coco_like(tmp_path / "coco", [encode(picture(0))] * 5, [["a"], [], ["b"], ["c"], ["d"]]))
    with pytest.raises(ValueError) as error:
        source[1]
    refused(error, "record 1", "--config.data.caption_key")


@pytest.mark.parametrize(
    "wrong, flag",
    [
        ({"split": "train"}, "--config.data.split"),
        ({"image_key": "picture"}, "--config.data.image_key"),
        ({"image_key": "captions/text"}, "--config.data.image_key"),
        ({"caption_key": "caption"}, "--config.data.caption_key"),
        ({"caption_key": "captions/id"}, "--config.data.caption_key"),
        ({"resolution": 0}, "--config.data.resolution"),
    ],
)
def test_a_wrong_flag_is_named(coco, wrong, flag):
    with pytest.raises(ValueError) as error:
        opened(coco, **wrong)
    refused(error, flag)


def test_a_missing_folder_or_shard_and_a_cut_shard_are_named(coco, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        opened(tmp_path / "nowhere")
    refused(error, "nowhere", "--config.data.path")
    last = sorted(coco.glob("*array_record*"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ValueError) as error:
        opened(coco)
    refused(error, last.name, "holds 0 examples")
    last.unlink()
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        opened(coco)
    refused(error, last.name)


def edited(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def set_class(name, key="pythonClassName"):
    def change(value):
        value["featuresDict"]["features"]["image"].pop("pythonClassName")
        value["featuresDict"]["features"]["image"][key] = name

    return change


FOREIGN = ["evil.Image", "tensorflow_datasets.core.features.../evil.Image", "evil", "tensorflow_datasets.evil.Image"]


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_module_is_not_imported(coco, tmp_path, monkeypatch, key, name):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    edited(coco / "features.json", set_class(name, key))
    with pytest.raises(ValueError) as error:
        opened(coco)
    refused(error, "features.json", "refused")


def set_split(key, value):
    def change(info):
        if key == "filepath_template":  # the other spelling protobuf takes
            info["splits"][0].pop("filepathTemplate")
        info["splits"][0][key] = value

    return change


def rename_feature(value):
    features = value["featuresDict"]["features"]
    features["../../label"] = features.pop("image/filename")


@pytest.mark.parametrize(
    "name, change",
    [
        ("dataset_info.json", set_split("filepathTemplate", "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")),
        ("dataset_info.json", set_split("filepath_template", "/etc/{SPLIT}")),
        ("dataset_info.json", set_split("filepathTemplate", "{DATASET.__class__}")),
        ("dataset_info.json", set_split("name", "../val")),
        ("dataset_info.json", lambda info: info.update(name="../coco")),
        ("dataset_info.json", lambda info: info.update(fileFormat="../array_record")),
        ("dataset_info.json", lambda info: info.update(fileFormat="tfrecord")),
        ("dataset_info.json", lambda info: info.update(splits="all")),
        ("features.json", rename_feature),
    ],
)
def test_metadata_that_leads_outside_is_refused(coco, name, change):
    edited(coco / name, change)
    with pytest.raises(ValueError) as error:
        opened(coco)
    refused(error, name)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"{}"])
def test_broken_metadata_is_one_line(coco, name, text):
    (coco / name).write_bytes(text)
    with pytest.raises(ValueError) as error:
        opened(coco)
    refused(error, str(coco))


def test_prompts_come_line_by_line_without_blanks(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa dog\r\n\n  größe 日本 👩‍🚀 \n\t\na\tb\nlast".encode())
    source = prompts.Prompts(path)
    assert [source[i] for i in range(len(source))] == [
        {"caption": text} for text in ("a dog", "größe 日本 👩‍🚀", "a\tb", "last")
    ]
    with pytest.raises(IndexError):
        source[4]


@pytest.mark.parametrize(
    "line, why",
    [
        (b"caf\xe9", "not UTF-8 (byte 4)"),
        (b"x" * (images.LINE_LIMIT + 1), "longer than"),
        (b"a\x00b", "control"),
        (b"a\x1b[31mb", "control"),
        (b"a\rb", "control"),
        (b"\xed\xa0\x80", "not UTF-8"),
    ],
)
def test_a_bad_prompt_is_named_by_its_line(tmp_path, line, why):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"good\n\n" + line + b"\nmore\n")
    with pytest.raises(ValueError) as error:
        prompts.Prompts(path)
    refused(error, f"{path}, line 3", why, "--config.data.path")


def test_a_prompt_at_the_limit_is_taken_and_an_endless_line_is_not_read(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"x" * images.LINE_LIMIT + b"\r\n")
    assert len(prompts.Prompts(path)) == 1
    with open(path, "wb") as file:
        file.truncate(1 << 33)  # 8 GiB of zeros that take no room
    with pytest.raises(ValueError, match="line 1 is longer"):
        prompts.Prompts(path)


def test_no_prompts_are_refused_with_the_flag(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="--prompts"):
        prompts.Prompts(tmp_path / "empty.txt", flag="--prompts")
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(FileNotFoundError, match="--config.data.path"):
            prompts.Prompts(path)
