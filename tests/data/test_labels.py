"""Files of labels in all their forms, and what is refused."""

import json

import pytest
from PIL import Image

from visionattn.data.labels import read_labels
from visionattn.errors import DataError


@pytest.fixture
def root(tmp_path):
    for name in ("a", "b", "c", "d", "e"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    return tmp_path


def write(root, text, name="labels.csv"):
    (root / name).write_text(text)
    return root


FORMS = {
    "columns": ("labels.csv", "file,split,cat,dog\na.png,train,1,0\nb.png,val,1,1\nc.png,test,0,0\n"),
    "names": ("labels.csv", "image,split,labels\na.png,train,cat\nb.png,valid,dog; cat\nc.png,TEST,\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_several_classes(form, root):
    name, text = FORMS[form]
    found = read_labels(write(root, text, name), multilabel=True)
    assert found.names == ("cat", "dog")
    assert found.files == (["a.png", "b.png"], ["c.png"])
    assert [values.tolist() for values in found.values] == [[[1, 0], [1, 1]], [[0, 0]]]
    assert found.root == root


@pytest.mark.parametrize(
    "content",
    [
        {"a.png": ["dog"], "b.png": ["cat", "dog"], "c.png": [], "d.png": ["cat"], "e.png": ["cat"]},
        {file: {"cat": cat, "dog": dog} for file, cat, dog in zip("abcde", (0, 1, 0, 1, 1), (1, 1, 0, 0, 0))},
    ],
)
def test_json(content, root):
    content = {file if "." in file else f"{file}.png": value for file, value in content.items()}
    found = read_labels(write(root, json.dumps(content), "labels.json"), multilabel=True)
    assert found.names == ("cat", "dog")
    assert (len(found.files[0]), len(found.files[1])) == (4, 1)
    values = dict(zip(found.files[0] + found.files[1], [*found.values[0].tolist(), *found.values[1].tolist()]))
    assert values == {"a.png": [0, 1], "b.png": [1, 1], "c.png": [0, 0], "d.png": [1, 0], "e.png": [1, 0]}
    assert "1 of 5" in found.told


def test_numbers(root):
    text = json.dumps({f"{name}.png": number / 2 for number, name in enumerate("abcde")})
    found = read_labels(write(root, text, "labels.json"), multilabel=False)
    assert found.names == ("target",)
    assert sorted(float(value) for part in found.values for value in part[:, 0]) == [0, 0.5, 1, 1.5, 2]
    (root / "labels.json").unlink()
    found = read_labels(write(root, "file,age,size\na.png,1e2,-3\nb.png,2,4\n", "other.csv") / "other.csv", False)
    assert found.names == ("age", "size")


def test_the_first_folder_says_the_part(root):
    for part in ("train", "val"):
        (root / part).mkdir()
        Image.new("RGB", (4, 4)).save(root / part / "a.png")
    found = read_labels(write(root, "file,age\ntrain/a.png,1\nval/a.png,2\n"), False)
    assert found.files == (["train/a.png"], ["val/a.png"])


@pytest.mark.parametrize(
    ("text", "multilabel", "words"),
    [
        ("", False, r"labels\.csv is empty"),
        ("file,age\n", False, "lists no images"),
        ("name,age\na.png,1\n", False, r"first line of .* must be 'file' and then"),
        ("file,age,age\na.png,1,2\n", False, "unique column names"),
        ("file,age\na.png,1,2\n", False, "line 2 must have 2 values; it has 3"),
        ("file,age\na.png,old\n", False, r"age of a\.png must be a finite number; got old"),
        ("file,age\na.png,nan\n", False, "must be a finite number; got nan"),
        ("file,age\na.png,\n", False, "must be a finite number; got nothing"),
        ("file,cat,dog\na.png,1,2\n", True, r"dog of a\.png must be 0 or 1; got 2"),
        ("file,cat\na.png,1\n", True, "must have at least two classes"),
        ("file,age\na.png,1\na.png,2\n", False, r"lists a\.png more than once"),
        ("file,age\na.png,1\nlost.png,2\n", False, r"lists images that do not exist: lost\.png"),
        ("file,split,age\na.png,train,1\nb.png,holdout,2\n", False, "must be train, val or test; got 'holdout'"),
        ("file,split,age\na.png,train,1\nb.png,,2\n", False, "must be train, val or test; got none"),
        ("file,split,age\na.png,train,1\nb.png,train,2\n", False, "has no test images"),
        ('file,age\n"a.png,1\n', False, "is not a valid CSV file"),
    ],
)
def test_what_is_refused(text, multilabel, words, root):
    with pytest.raises(DataError, match=words):
        read_labels(write(root, text), multilabel)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not a valid JSON file"),
        ("[1]", "must be an object of files and numbers"),
        ('{"a.png": "old"}', r"a\.png has old"),
        ('{"a.png": {"age": null}, "b.png": {"age": 1}}', r"age of a\.png must be a finite number; got nothing"),
        ('{"a.png": {"age": [1]}, "b.png": {"age": 1}}', r"must be a finite number; got \[1\]"),
        ('{"a.png": Infinity, "b.png": 1}', "must be a finite number; got inf"),
    ],
)
def test_what_is_refused_in_json(text, words, root):
    with pytest.raises(DataError, match=words):
        read_labels(write(root, text, "labels.json"), False)


def test_where_it_is_looked_for(root):
    with pytest.raises(DataError, match="it has neither"):
        read_labels(root, False)
    with pytest.raises(DataError, match=r"\.csv or \.json file, or a folder with one; got .*a\.png"):
        read_labels(root / "a.png", False)
    with pytest.raises(DataError, match=r"lost\.csv"):
        read_labels(root / "lost.csv", False)
    for name in ("labels.csv", "labels.json"):
        write(root, "", name)
    with pytest.raises(DataError, match="it has both"):
        read_labels(root, False)
