"""Catalogues of each layout, attribute batches, and the data module; and what is said of wrong input."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.retrieval_toys import write_table
from visionattn.data.retrieval import catalogue
from visionattn.data.retrieval.attribute_batches import AttributeSampler
from visionattn.data.retrieval.catalogue import MISSING, Catalogue, ImageStore, Item
from visionattn.data.retrieval.catalogue_files import read_catalogue, read_triplets
from visionattn.data.samplers import IGNORED, ResumableLoader, SampleKey
from visionattn.errors import ConfigError, DataError


def images(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def table(folder, text, names=("a.png", "b.png", "c.png", "d.png")):
    images(folder / "images", names)
    (folder / "table.csv").write_text(text)
    return folder / "table.csv"


SMALL = (
    "id,split,role,colour,kind\na,train,-,red,disc\nb,train,-,blue,\nc,test,query,red,disc\nd,test,gallery,green,disc\n"
)


def test_table(tmp_path):
    found = read_catalogue("table", table(tmp_path, SMALL))
    assert found.attributes == ("colour", "kind")
    assert found.values == {"colour": ["blue", "red"], "kind": ["disc"]}
    train, test = found.part("train"), found.part("test")
    assert train.images == ["a.png", "b.png"]
    assert train.labels.tolist() == [[1, 0], [0, MISSING]]
    # A value that was not trained on has a label behind those that were.
    assert test.labels.tolist() == [[1, 0], [2, 0]]
    assert (test.is_query.tolist(), test.is_gallery.tolist()) == ([True, False], [False, True])
    assert test.sources is None
    assert read_catalogue("table", tmp_path / "table.csv", attributes=["kind"]).attributes == ("kind",)


def test_rare_values_count_as_unknown(tmp_path):
    text = SMALL.replace("b,train,-,blue,", "b,train,-,red,disc")
    found = read_catalogue("table", table(tmp_path, text), min_count=2)
    assert found.values == {"colour": ["red"], "kind": ["disc"]}
    assert found.part("test").labels.tolist() == [[0, 0], [MISSING, 0]]
    with pytest.raises(DataError, match=r"No value of colour, kind has at least 3 training items"):
        read_catalogue("table", tmp_path / "table.csv", min_count=3)


def test_table_without_roles_ranks_each_item_against_the_others(tmp_path):
    text = "id,split,colour,image\n1,test,red,a.png\n2,test,red,b.png\n3,test,blue,c.png\n"
    test = read_catalogue("table", table(tmp_path, text)).part("test")
    assert test.is_query.all()
    assert test.is_gallery.all()
    assert test.sources.tolist() == [0, 1, 2]


def test_zip_of_images_in_several_processes(tmp_path):
    path = table(tmp_path, SMALL)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in (tmp_path / "images").iterdir():
            archive.write(file, file.name)
    store = read_catalogue("table", path, images=tmp_path / "photos.zip").images
    assert store.open("a.png").size == (8, 8)
    assert pickle.loads(pickle.dumps(store)).open("b.png").size == (8, 8)
    with pytest.raises(DataError, match=r"Could not read the image e\.png"):
        store.open("e.png")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SMALL.replace("d,test", "e,test"), r"has no images e\."),
        (SMALL.replace("b,train", "a,train"), r"the id a more than once\."),
        (SMALL.replace("split", "part"), r"no column split; it has id, part"),
        (
            SMALL.replace("b,train", "b,training"),
            r"line 3: the split must be one of 'train', 'val', 'test'; got 'training'",
        ),
        (
            SMALL.replace("c,test,query", "c,test,-"),
            r"line 4: the role must be one of 'query', 'gallery', 'both'; got '-'",
        ),
        ("id,split,role\na,train,-\n", r"no columns of attributes"),
        ("id,split,colour\n", r"has no rows"),
    ],
)
def test_wrong_tables(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        read_catalogue("table", table(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (SMALL.replace(",", ";").encode(), r"no column id, split; .* separated by ';'; a comma is expected"),
        (SMALL.encode("utf-16"), r"not text in UTF-8"),
        (SMALL.replace("a,train", "a\0,train").encode(), r"NUL bytes"),
        (SMALL.replace("kind", "colour").encode(), r"the column 'colour' twice"),
        (SMALL.replace("kind", "").encode(), r"the name is missing for column 5"),
        (SMALL.replace("b,train", '"b,train').encode(), r"line \d: "),
        (
            SMALL.replace("b,train,-,blue,", "b,train,-,dark,blue,").encode(),
            r"line 3 has 6 cells, but the header has 5",
        ),
        (SMALL[:-6].encode(), r"line 5 has 4 cells, but the header has 5"),
        (SMALL.replace("b,train", ",train").encode(), r"line 3: the id is empty"),
        (b"," * 2**21, r"a line of more than 1,048,576 characters"),
        (b"id,split,colour\n" + b"x" * 200_000 + b",train,red\n", r"line 2: field larger than field limit"),
        (b"", r"has no column id, split"),
    ],
)
def test_damaged_tables_are_refused_in_one_line(tmp_path, content, words):
    path = table(tmp_path, "")
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_catalogue("table", path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_table_with_a_mark_spaces_and_quotes(tmp_path):
    text = SMALL.replace("split", " split").replace("a,train,-,red", 'a, train,-,"red"').replace("\n", "\r\n\r\n")
    path = table(tmp_path, "")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_catalogue("table", path).items == read_catalogue("table", table(tmp_path / "plain", SMALL)).items


def test_an_id_of_two_images_is_refused(tmp_path):
    path = table(tmp_path, SMALL, ("a.png", "b.png", "c.png", "d.png", "more/a.jpg"))
    with pytest.raises(
        DataError, match=r"line 2: a\.png, more/a\.jpg all match a\. Add a column 'image' with the file"
    ):
        read_catalogue("table", path)


def test_pipes_and_impossible_names_end_with_one_line(tmp_path):
    path = table(tmp_path, SMALL)
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "images/e.png")
    assert read_catalogue("table", path).images.names == ["a.png", "b.png", "c.png", "d.png"]
    with pytest.raises(DataError, match="not a regular file"):
        read_catalogue("table", tmp_path / "pipe")
    for layout in ("asen", "market1501", "cub"):
        with pytest.raises(DataError, match=r"pipe"):
            read_catalogue(layout, tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a folder nor a zip file of images: it is not a regular file"):
        read_catalogue("table", path, images=tmp_path / "pipe")
    for name in ("n" * 300, "a\0b"):
        with pytest.raises(DataError, match="There is no file or folder"):
            read_catalogue("table", tmp_path / name)
        with pytest.raises(DataError, match="neither a folder nor a zip file"):
            read_catalogue("table", path, images=tmp_path / name)


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_damaged_archives(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "MEMBER", 10**6)
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(buffer, "PNG")
    members = {"deep.png": buffer.getvalue(), "bomb.png": bytes(10**7), "bad.png": b"no image", "no.txt": b""}
    path = zipped(tmp_path / "a.zip", {**members, "__MACOSX/deep.png": b"", "sub/.hidden.png": b"", "empty.png/": b""})
    store = ImageStore(path)
    assert store.names == ["bad.png", "bomb.png", "deep.png"]
    assert np.unique(np.asarray(store.open("deep.png"))).tolist() == [100]
    with pytest.raises(DataError, match=r"bomb\.png of .*: it exceeds the limit of 1,000,000 bytes"):
        store.open("bomb.png")
    with pytest.raises(DataError, match=r"Could not read the image bad\.png of"):
        store.open("bad.png")
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"Could not read the image deep\.png of"):
        ImageStore(path).open("deep.png")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="neither a folder nor a zip file"):
        ImageStore(path)


def test_other_wrong_input(tmp_path):
    path = table(tmp_path, SMALL.replace("d,test,gallery", "d,test,query"))
    found = read_catalogue("table", path)
    with pytest.raises(DataError, match=r"The split 'test' has no gallery"):
        found.part("test")
    with pytest.raises(DataError, match=r"must be one of 'train', 'test'; got 'val'"):
        found.part("val")
    with pytest.raises(ConfigError, match=r"no attribute cut\. There are colour, kind"):
        read_catalogue("table", path, attributes=["cut"])
    with pytest.raises(ConfigError, match=r"layout must be one of 'table', 'asen', .*; got 'darn'"):
        read_catalogue("darn", path)
    with pytest.raises(DataError, match=r"There is no file or folder"):
        read_catalogue("table", tmp_path / "no.csv")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"There are no images in"):
        read_catalogue("table", path, images=tmp_path / "nothing")
    with pytest.raises(DataError, match=r"neither a folder nor a zip file"):
        read_catalogue("table", path, images=path)


def test_asen(tmp_path):
    names = [f"photos/{number}.jpg" for number in range(6)]
    images(tmp_path, names)
    meta = {
        "ATTRIBUTES": ["collar", "length"],
        "ATTRIBUTES_VALUES": {"collar": ["round", "none"], "length": ["s", "l"]},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    for part, files in (("train", names[:2]), ("valid", names[2:4]), ("test", names[4:])):
        (tmp_path / f"filenames_{part}.txt").write_text("\n".join(files) + "\n")
    (tmp_path / "label_train.txt").write_text("0 0 1\n0 1 0\n1 1 1\n")
    for part in ("valid", "test"):
        (tmp_path / f"query_{part}.txt").write_text("0 0 1\n1 1 0\n")
        (tmp_path / f"candidate_{part}.txt").write_text("1 0 1\n0 1 0\n")
    found = read_catalogue("asen", tmp_path)
    assert found.values == {"collar": ["none"], "length": ["l", "s"]}
    assert found.part("train").images == ["photos/0.jpg", "photos/1.jpg"]
    assert found.part("train").labels.tolist() == [[0, 1], [MISSING, 0]]
    # An image is a query of one attribute and in the gallery of the other.
    test = found.part("test")
    assert test.images == ["photos/4.jpg", "photos/5.jpg", "photos/5.jpg", "photos/4.jpg"]
    assert test.labels.tolist() == [[0, MISSING], [MISSING, 1], [0, MISSING], [MISSING, 1]]
    assert test.is_query.tolist() == [True, True, False, False]
    for line in ("9 0 1", "-1 0 1", "0 -1 1", "0 0 -1", "0 0 7", "0 9 0", "0 0", "9" * 5000 + " 0 0"):
        (tmp_path / "query_test.txt").write_text(line + "\n")
        with pytest.raises(DataError, match=rf"query_test\.txt has the invalid line '{line[:5]}.* three known numbers"):
            read_catalogue("asen", tmp_path)
    for content in ("[]", '{"ATTRIBUTES": "collar"}', '{"ATTRIBUTES": [1]}', "{", "[" * 10**5, "{}"):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(DataError, match=r"meta\.json"):
            read_catalogue("asen", tmp_path)
    for words in ([], {"collar": "round"}):
        (tmp_path / "meta.json").write_text(json.dumps({**meta, "ATTRIBUTES_VALUES": words}))
        with pytest.raises(DataError, match=r"ATTRIBUTES_VALUES must give a list for each attribute"):
            read_catalogue("asen", tmp_path)


def test_market1501(tmp_path):
    train = [
        f"bounding_box_train/{identity:04d}_c{camera}s1_000001_00.jpg" for identity in range(2, 13) for camera in (1, 2)
    ]
    names = ["query/0100_c1s1_000001_00.jpg", "bounding_box_test/0100_c2s1_000001_00.jpg"]
    names += ["bounding_box_test/-1_c1s1_000001_00.jpg", "bounding_box_test/0000_c3s1_000001_00.jpg"]
    images(tmp_path, train + names)
    found = read_catalogue("market1501", tmp_path)
    assert found.attributes == ("identity",)
    test = found.part("test")
    assert test.images == [names[3], names[1], names[0]]  # without the box that is not to be ranked
    assert test.is_query.tolist() == [False, False, True]
    assert test.sources.tolist() == [2, 1, 0]
    # Every tenth training identity validates.
    assert {item.values[0] for item in found.parts["val"]} == {"0011"}
    assert len(found.values["identity"]) == 10
    assert found.part("val").sources.tolist() == [0, 1]


def test_cub(tmp_path):
    names = [f"{number:03d}.bird/{number}_{copy}.jpg" for number in range(1, 5) for copy in range(2)]
    images(tmp_path / "images", names)
    (tmp_path / "images.txt").write_text("".join(f"{n} {name}\n" for n, name in enumerate(names, 1)))
    (tmp_path / "classes.txt").write_text("".join(f"{n} bird{n}\n" for n in range(1, 5)))
    (tmp_path / "image_class_labels.txt").write_text("".join(f"{n} {(n + 1) // 2}\n" for n in range(1, 9)))
    found = read_catalogue("cub", tmp_path)
    assert found.values == {"class": ["bird1", "bird2"]}
    test = found.part("test")
    assert test.labels.flatten().tolist() == [2, 2, 3, 3]
    assert test.is_query.all()
    assert test.sources.tolist() == [0, 1, 2, 3]
    for line in ("one bird1", "1 bird1\n1 bird2", "1", "1 2 3", "9" * 5000 + " bird"):
        (tmp_path / "classes.txt").write_text(line + "\n")
        with pytest.raises(DataError, match=r"classes\.txt has the invalid line .* a unique number and a name"):
            read_catalogue("cub", tmp_path)
    (tmp_path / "classes.txt").write_text("7 bird\n")
    with pytest.raises(DataError, match=r"has no class in classes\.txt"):
        read_catalogue("cub", tmp_path)


def test_zappos(tmp_path):
    names = [f"shoes/{number}.jpg" for number in range(5)]
    images(tmp_path, names)
    (tmp_path / "filenames.json").write_text("\n".join(names) + "\n")
    (tmp_path / "tripletlists").mkdir()
    for number, condition in enumerate(("class", "closure", "gender", "heel")):
        (tmp_path / f"tripletlists/{condition}_tripletlist_test.txt").write_text(f"0 {number} 4\n")
    found = read_triplets(tmp_path, "test")
    rows = zip(found.anchors.tolist(), found.far.tolist(), found.near.tolist(), found.condition.tolist())
    assert [(found.names[a], found.names[f], found.names[n], found.conditions[c]) for a, f, n, c in rows] == [
        (names[0], names[number], names[4], condition)
        for number, condition in enumerate(("class", "closure", "gender", "heel"))
    ]
    (tmp_path / "tripletlists/heel_tripletlist_test.txt").write_text("0 1 7\n")
    with pytest.raises(DataError, match=r"heel_tripletlist_test\.txt has the invalid line '0 1 7'.*each below 5"):
        read_triplets(tmp_path, "test")


LABELS = torch.stack([torch.arange(60) % 5, torch.where(torch.arange(60) % 3 == 0, MISSING, torch.arange(60) // 30)], 1)


def batches(sampler):
    keys = list(sampler)
    return [keys[start : start + sampler.batch_size] for start in range(0, len(keys), sampler.batch_size)]


def test_batches_have_values_and_items_of_each_attribute():
    sampler = AttributeSampler(LABELS, values=4, items=3, num_replicas=1, rank=0, seed=0)
    found = batches(sampler)
    assert len(sampler) == sum(map(len, found)) == 2 * 24
    for batch in found:
        for column, part in enumerate((batch[:12], batch[12:])):
            labels = LABELS[[key.sample for key in part], column]
            assert MISSING not in labels
            groups = labels.view(4, 3)
            assert (groups == groups[:, :1]).all()
            assert len(groups[:, 0].unique()) == (4 if column == 0 else 2)
            assert len({key.sample for key in part}) == 12  # none twice, as there are enough


def test_batches_follow_from_seed_epoch_and_rank():
    def keys(seed=0, epoch=0, rank=0):
        sampler = AttributeSampler(LABELS, 4, 3, 2, rank, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert keys() == keys()
    for other in (keys(seed=1), keys(rank=1)):
        assert keys() != other
    assert [key.sample for key in keys()] != [key.sample for key in keys(epoch=1)]
    with pytest.raises(DataError, match="No training image has a value"):
        AttributeSampler(torch.full((4, 1), MISSING), 2, 2, 1, 0, 0)


class Keys(torch.utils.data.Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, key: SampleKey):
        return key.sample, key.epoch


def test_batches_resume_inside_an_epoch():
    def loader():
        sampler = AttributeSampler(LABELS, 2, 2, 1, 0, 3)
        return ResumableLoader(Keys(), sampler=sampler, batch_size=sampler.batch_size)

    whole = [batch[0].tolist() for batch in loader()]
    assert len(whole) == 7
    first = loader()
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    assert [batch[0].tolist() for batch in second] == whole[3:]


def data(tmp_path, **settings):
    lightning = pytest.importorskip("lightning")
    assert lightning
    from visionattn.data.retrieval.datamodule import RetrieveData

    made = RetrieveData(
        **{"root": str(write_table(tmp_path)), "values_per_batch": 2, "images_per_value": 2, **settings}
    )
    config = {"size": [24, 24], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    made.trainer = SimpleNamespace(lightning_module=SimpleNamespace(input_config=config), world_size=1, global_rank=0)
    return made


def test_data_module(tmp_path):
    found = data(tmp_path, erasing=0.5)
    assert found.attribute_values == {"colour": ["blue", "green", "red"], "kind": ["bars", "columns", "disc"]}
    found.setup("fit")
    first = [(images, labels) for images, labels, _ in found.train_dataloader()]
    again = [(images, labels) for images, labels, _ in found.train_dataloader()]
    assert len(first) == 2
    assert first[0][0].shape == (8, 3, 24, 24)
    assert all(torch.equal(a, b) for one, two in zip(first, again) for a, b in zip(one, two))
    (images, labels, places), *_ = list(found.val_dataloader())
    assert places.tolist() == list(range(9))
    assert torch.equal(labels, found.part("val").labels)
    assert images.shape == (9, 3, 24, 24)


def test_data_module_refuses(tmp_path):
    for settings, words in (
        ({"layout": "darn"}, "layout must be one of .*; got 'darn'"),
        ({"augmentation": "autoaugment"}, "augmentation must be one of .*; got 'autoaugment'"),
        ({"values_per_batch": 1}, "at least 2"),
    ):
        with pytest.raises(ConfigError, match=words):
            data(tmp_path / words.split()[-1].strip("'"), **settings)
    found = data(tmp_path / "size", image_size=[24])
    with pytest.raises(ConfigError, match="height and width"):
        found.setup("fit")


def test_damaged_image_is_skipped_and_named(tmp_path):
    found = data(tmp_path)
    found.setup("fit")
    part = found.part("val")
    (tmp_path / "images" / part.images[0]).write_bytes(b"no image")
    places = torch.cat([places for _, _, places in found.val_dataloader()]).tolist()
    assert places == [IGNORED, *range(1, len(part.images))]
    (why,) = found.skipped()
    assert part.images[0] in why
    # In training the image that stands in has its own labels.
    part = found.part("train")
    (tmp_path / "images" / part.images[5]).write_bytes(b"no image")
    seen = set()
    for _, labels, places in found.train_dataloader():
        assert torch.equal(labels, part.labels[places])
        seen.update(places.tolist())
    assert 5 not in seen


def test_sources_of_items_without_a_camera():
    # Half of the items may say a camera: the others are of one unnamed source.
    store = ImageStore.__new__(ImageStore)
    store.path, store.names = None, ["a", "b", "c"]
    items = [
        Item("a", "test", "query", ("1",), "c1"),
        Item("b", "test", "gallery", ("1",)),
        Item("c", "test", "gallery", ("1",)),
    ]
    sources = Catalogue(store, ("identity",), items).part("test").sources.tolist()
    assert sources[1] == sources[2] != sources[0]
