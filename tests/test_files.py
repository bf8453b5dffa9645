"""A file is written completely or not at all."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys

import pytest

from visionattn.errors import DataError, InputError, MissingPackageError, StorageError, require, shorten
from visionattn.files import (
    TEMPORARY,
    atomic_folder,
    atomic_path,
    check_folder,
    check_output,
    exclusive,
    read_json,
    read_text,
)


def test_the_file_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.suffix == ".txt"
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Could not write"), atomic_path(tmp_path / "file" / "a.txt"):
        pass


def forked(function):
    """Exit code of another process that calls a function; a fork is spared the imports."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
def test_a_full_disk_leaves_nothing(tmp_path):
    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with (
            pytest.raises(StorageError, match="No partial file was left"),
            atomic_path(tmp_path / "a.bin") as temporary,
        ):
            temporary.write_bytes(bytes(10_000))

    assert forked(write) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_its_extra():
    with pytest.raises(MissingPackageError, match=r"pip install 'visionattn\[export\]'"):
        require("not_a_package", "export")


def test_a_symbolic_link_keeps_pointing_to_the_file_that_is_replaced(tmp_path):
    target, link = tmp_path / "real" / "a.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    with atomic_path(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
def test_only_regular_files_are_replaced(tmp_path, kind):
    path = {"device": "/dev/null"}.get(kind, tmp_path / "output.txt")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(StorageError, match="Could not write"), atomic_path(path):
        pass
    assert kind == "loop" or not os.path.isfile(path)


def test_a_name_of_the_greatest_length_is_written(tmp_path):
    path = tmp_path / ("n" * 251 + ".png")
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"


def test_what_a_killed_process_left_is_removed(tmp_path):
    def write():
        with atomic_path(tmp_path / "a.png") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(write) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(TEMPORARY)
    with atomic_path(tmp_path / "other.txt") as temporary, atomic_path(tmp_path / "a.txt") as mine:
        assert not left.exists()
        assert temporary.exists()
        assert mine.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "other.txt"]


def test_an_output_that_exists_stays_unless_it_may_be_overwritten(tmp_path):
    path = tmp_path / "a.ONNX"
    assert check_output(path, suffixes=(".onnx",)) == path
    path.write_text("mine")
    with pytest.raises(InputError, match=r"a\.ONNX exists\. Give --overwrite to replace it"):
        check_output(path)
    assert check_output(path, overwrite=True) == path
    with pytest.raises(InputError, match=r"must end in \.onnx"):
        check_output(tmp_path / "a.tflite", suffixes=(".onnx",))
    for other in (tmp_path, "/dev/null", "n\0ul", "n" * 300):
        with pytest.raises(InputError, match="Cannot write"):
            check_output(other, overwrite=True)


def test_a_folder_has_one_writer(tmp_path):
    with exclusive(tmp_path), pytest.raises(StorageError, match="Another run is writing"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):  # released
        pass


SCHEMA = {"count": int, "rate": (int, float), "names": [str], "more": {"flag": bool}}
GOOD = {"count": 3, "rate": 0.5, "names": ["a"], "more": {"flag": True}, "later": None}


def test_a_state_file_that_is_as_it_must_be_is_read(tmp_path):
    path = tmp_path / "state.json"
    path.write_text(json.dumps(GOOD))
    assert read_json(path, SCHEMA) == GOOD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**GOOD, "count": "3"}, "count must be int, not str"),
        ({**GOOD, "count": True}, "count must be int, not bool"),
        ({**GOOD, "names": ["a", 1]}, r"names\[1\] must be str"),
        ({**GOOD, "names": {}}, "names is not a list"),
        ({**GOOD, "more": []}, "more is not a dictionary"),
        ({"count": 3}, "the entry rate is missing"),
        ([], "not a dictionary"),
    ],
)
def test_a_state_file_that_is_damaged_is_refused(tmp_path, content, message):
    path = tmp_path / "state.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_json(path, SCHEMA)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_json_is_refused(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"Could not read|is damaged"):
        read_json(path, SCHEMA)


def test_what_messages_echo_is_on_one_line_and_short():
    assert shorten("a\nb\tc  d") == "a b c d"
    assert shorten("a\x1b[31mred") == "a\\x1b[31mred"
    assert shorten("\udcff.png") == "\\udcff.png"
    assert len(shorten("x" * 10**6)) <= 120
    assert shorten("ab" * 100).startswith("abab")


def test_a_users_text_is_read_with_and_without_a_mark(tmp_path):
    path = tmp_path / "a.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text("id,größe\n", encoding=encoding)
        assert read_text(path) == "id,größe\n"


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    for content, message in (
        ("id".encode("utf-16"), r"not text in UTF-8 \(byte 0\)"),
        (b"a\0b", "NUL bytes"),
        (b"x" * 11, "more than the 10 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_text(path, limit=10)
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("pipe", "not a regular file"),
        ("n" * 300, "too long"),
        ("a\0b", "null"),
        ("none", "No such"),
    ):
        with pytest.raises(DataError, match=message):
            read_text(tmp_path / name)


def test_a_folder_that_cannot_be_held_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "a\0b", "n" * 300, "file/sub"):
        with pytest.raises(StorageError, match="Cannot write to the folder"), exclusive(tmp_path / name):
            pass


def test_folders_that_cannot_be(tmp_path):
    assert check_folder(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert check_folder(tmp_path) == tmp_path
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for wrong, words in (
        ("file", "is not a folder"),
        ("file/below", "is not a folder"),
        ("pipe", "is not a folder"),
        ("a" * 300, "File name too long"),
    ):
        with pytest.raises(InputError, match=words):
            check_folder(tmp_path / wrong)
    with pytest.raises(InputError, match="null byte"):
        check_folder("a\0b")


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "new" / "bundle"
    with atomic_folder(path, mark="card") as folder:
        (folder / "card").write_text("1")
        assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["bundle"]
    assert (path / "card").read_text() == "1"
    with pytest.raises(InputError, match=r"exists\. Give --overwrite"), atomic_folder(path, mark="card"):
        pass
    with pytest.raises(KeyError), atomic_folder(path, True, "card") as folder:
        (folder / "card").write_text("2")
        raise KeyError
    assert (path / "card").read_text() == "1"
    with atomic_folder(path, True, "card") as folder:
        (folder / "other").write_text("3")
    assert [p.name for p in path.iterdir()] == ["other"]
    assert [p.name for p in path.parent.iterdir()] == ["bundle"]


def test_folders_that_are_not_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "mine").write_text("")
    with pytest.raises(InputError, match="holds other files"), atomic_folder(tmp_path / "empty", True, "card"):
        pass
    with pytest.raises(InputError, match="mine is not a folder"), atomic_folder(tmp_path / "empty" / "mine"):
        pass
    with pytest.raises(StorageError, match="No partial folder was left"), atomic_folder(tmp_path / "full"):
        raise OSError(28, "No space left on device")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


def test_folders_of_a_killed_process_are_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    from visionattn.files import _MACHINE

    left = tmp_path / f"{TEMPORARY}{_MACHINE}-{process.pid}-x"
    (left / "new").mkdir(parents=True)
    with atomic_folder(tmp_path / "a"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
