"""COCO by the official files and by tfds: the same images and captions in the same order, and files that are refused."""

import io
import json

import made_coco
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.splits import SplitDict

from proreflow_jax.data import coco

F = tfds.features
PARTS = {"restval": slice(0, 5), "test": slice(5, 6), "val": slice(6, 9), "train": slice(9, 12)}  # train is not of val2014


@pytest.fixture
def official(tmp_path):
    return made_coco.write_coco(tmp_path)


def test_captions_and_images_come_by_rising_ids(official):
    split, found = coco.open_split(*map(str, official), 2017), made_coco.annotations()
    assert list(split.images) == sorted(row["id"] for row in found["images"])
    assert [caption.id for caption in split.captions] == sorted(row["id"] for row in found["annotations"])
    said = {row["id"]: row for row in found["annotations"]}
    assert all(c.text == said[c.id]["caption"].strip() and c.image == said[c.id]["image_id"] for c in split.captions)
    names = {row["id"]: row["file_name"] for row in found["images"]}
    for i, image in enumerate(split.images):
        assert split.read(i) == (official[1] / names[image]).read_bytes()


def test_the_first_caption_of_an_image_has_the_lowest_id(official):
    split = coco.open_official(*official, 2017)
    lowest = {}
    for caption in sorted(split.captions, key=lambda caption: -caption.id):
        lowest[caption.image] = caption.text
    assert coco.first_captions(split, 24) == [lowest[image] for image in sorted(lowest)]
    assert coco.first_captions(split, 5) == coco.first_captions(split, 24)[:5]
    with pytest.raises(ValueError, match=r"24 prompts of 25: lower --config\.evaluate\.examples"):
        coco.first_captions(split, 25)


def test_captions_are_drawn_without_replacement_and_always_the_same(official):
    split = coco.open_official(*official, 2017)
    count = len(split.captions)
    every = coco.drawn_captions(split, count)
    assert sorted(every) == sorted(caption.text for caption in split.captions) and count == 60
    assert every != [caption.text for caption in split.captions] and coco.drawn_captions(split, 7) == every[:7]
    numbers = [26, 35, 59, 28, 11]  # numpy's RandomState(0).permutation(60), which the protocol rests on
    assert every[:5] == [split.captions[i].text for i in numbers]
    with pytest.raises(ValueError, match="60 prompts of 61"):
        coco.drawn_captions(split, 61)


def write_tfds(folder, rows):
    """coco_captions as tfds prepares it, of the parts of PARTS; rows are (file bytes, id, [(caption id, text)])."""
    below = {"id": F.Scalar(np.int64), "text": F.Text()}
    features = F.FeaturesDict(
        {"image": F.Image(), "image/filename": F.Text(), "image/id": F.Scalar(np.int64), "captions": F.Sequence(below)}
    )
    folder.mkdir()
    splits, serializer = [], ExampleSerializer(features.get_serialized_info())
    for name, part in PARTS.items():
        template = tfds.core.ShardedFileTemplate(
            folder, dataset_name="coco_captions", split=name, filetype_suffix="array_record"
        )
        writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
        for encoded, image, captions in rows[part]:
            said = [{"id": id, "text": text} for id, text in captions]
            example = {"image": io.BytesIO(encoded), "image/filename": "x.png", "image/id": image, "captions": said}
            writer.write(serializer.serialize_example(features.encode_example(example)))
        writer.close()
        splits.append(tfds.core.SplitInfo(name=name, shard_lengths=[len(rows[part])], num_bytes=0, filename_template=template))
    identity = DatasetIdentity("coco_captions", tfds.core.Version("1.1.0"), str(folder), module_name="tfds.coco_captions")
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format("array_record")
    info.set_splits(SplitDict(splits))
    info.write_to_directory(folder)
    return folder


def test_tfds_gives_what_the_official_files_give(tmp_path):
    """val2014 is its restval, test and val; images are the same bytes, in the same order."""
    paths = made_coco.write_coco(tmp_path, 2014, 9)
    wanted = coco.open_official(*paths, 2014)
    said = {image: [(c.id, f"{c.text}\n") for c in wanted.captions if c.image == image] for image in wanted.images}
    rows = [(wanted.read(i), image, said[image]) for i, image in enumerate(wanted.images)][::-1]
    folder = write_tfds(tmp_path / "tfds", [*rows, *((rows[0][0], 900 + i, [(9000 + i, "a")]) for i in range(3))])
    found = coco.open_split("", str(folder), 2014)
    assert found[:2] == wanted[:2]
    assert [found.read(i) for i in range(9)] == [wanted.read(i) for i in range(9)]
    with pytest.raises(ValueError, match="tfds has COCO of 2014, the protocol is of 2017: give the official files"):
        coco.open_split("", str(folder), 2017)


def edited(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda found: found["info"].update(year=2014), "is of the year 2014, the protocol is of 2017"),
        (lambda found: found.pop("info"), "no captions file of COCO"),
        (lambda found: found["annotations"][3].pop("caption"), "no captions file of COCO"),
        (lambda found: found["annotations"][3].update(caption=" \n"), "caption 991 is empty or of no image"),
        (lambda found: found["annotations"][3].update(image_id=5), "caption 991 is empty or of no image"),
        (lambda found: found["annotations"][3].update(id=1000), "captions are missing or share an id"),
        (lambda found: found["annotations"].clear(), "captions are missing or share an id"),
        (lambda found: found["images"][2].update(file_name="../x.png"), "'../x.png', which is no plain file name"),
        (lambda found: found["images"][2].update(file_name="lost.png"), "lacks 1 of 24 images"),
    ],
)
def test_another_or_damaged_captions_file_is_one_line(official, change, needle):
    edited(official[0], change)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        coco.open_official(*official, 2017)
    assert needle in str(caught.value) and "\n" not in str(caught.value)


def test_a_picture_is_decoded_at_its_own_size_and_grey_becomes_rgb(official):
    split = coco.open_official(*official, 2017)
    shapes = [coco.decode_coco_image(split.read(i), "").shape for i in range(24)]
    assert {shape[:2] for shape in shapes} == set(made_coco.SIZES) and {shape[2] for shape in shapes} == {3}
    buffer, image = io.BytesIO(), made_coco.picture(0)
    assert image.ndim == 2
    Image.fromarray(image).save(buffer, "PNG")
    np.testing.assert_array_equal(coco.decode_coco_image(buffer.getvalue(), ""), np.repeat(image[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["text", "cut", "bomb", "deep"])
def test_what_is_no_picture_is_named(kind, monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((40, 40), np.uint16) if kind == "deep" else np.zeros((40, 40), np.uint8)).save(buffer, "PNG")
    encoded = {"text": b"no image", "cut": buffer.getvalue()[:-30]}.get(kind, buffer.getvalue())
    if kind == "bomb":
        monkeypatch.setattr(coco.pictures, "PIXEL_LIMIT", 1599)
    with pytest.raises(ValueError, match=r"image 7 is no image that can be judged .*--config\.evaluate\.images") as caught:
        coco.decode_coco_image(encoded, "image 7")
    assert "\n" not in str(caught.value)
