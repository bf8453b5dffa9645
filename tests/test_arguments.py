"""Numbers on the command line: finite, in their range, and one message where they are not."""

import argparse

import pytest

from visionattn.arguments import add_old_spelling, call_with, number, whole_number


def test_what_is_taken():
    assert number()("-2.5e3") == -2500.0
    assert number(0, 1)("0") == 0
    assert number(0, 1)("1") == 1
    assert whole_number(1)("100") == 100
    assert whole_number(-2, 3)("-2") == -2
    assert isinstance(whole_number(0)("7"), int)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (number(), "nan", "must be a finite number; got 'nan'"),
        (number(), "-inf", "must be a finite number; got '-inf'"),
        (number(), "1e999", "must be a finite number; got '1e999'"),
        (number(0, above=True), "0", "must be a finite number above 0; got '0'"),
        (number(0, above=True), "-4", "must be a finite number above 0; got '-4'"),
        (number(1, 64), "1e6", "must be a finite number of at least 1 and at most 64; got '1e6'"),
        (number(high=2), "3", "must be a finite number of at most 2; got '3'"),
        (number(1), "two", "must be a finite number of at least 1; got 'two'"),
        (whole_number(1), "0", "must be a whole number of at least 1; got '0'"),
        (whole_number(1, 9), "10", "must be a whole number from 1 to 9; got '10'"),
        (whole_number(1), "1.5", "must be a whole number of at least 1; got '1.5'"),
        (whole_number(1), "9" * 5000, "must be a whole number of at least 1; got"),
    ],
)
def test_what_is_refused(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kind(text)
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 250


def test_the_parser_names_the_option(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--focal", type=number(0, above=True))
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--focal", "nan"])
    assert stop.value.code == 2
    assert "argument --focal: must be a finite number above 0; got 'nan'" in capsys.readouterr().err


def test_old_spellings_are_answered_with_the_new_ones(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--image-size", type=int, nargs=2, required=True)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    add_old_spelling(parser, "--input-size", "--image-size")
    add_old_spelling(parser, "--precision", "--dtype", {"fp16": "float16"})
    assert vars(parser.parse_args(["--image-size", "1", "2"])) == {"image_size": [1, 2], "dtype": "float32"}
    assert capsys.readouterr().err == ""
    found = vars(parser.parse_args(["--input-size", "3", "4", "--precision", "fp16"]))
    assert found == {"image_size": [3, 4], "dtype": "float16"}
    assert capsys.readouterr().err == (
        "visionattn: note: --input-size is now --image-size.\nvisionattn: note: --precision is now --dtype float16.\n"
    )
    assert "--precision" not in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--image-size", "1", "2", "--precision", "fp8"])


def test_a_function_is_called_with_the_arguments_of_its_names():
    args = argparse.Namespace(command="go", left=1, right=2)
    assert call_with(lambda right, *, left=0: (left, right), args) == (1, 2)
    with pytest.raises(AttributeError, match="scale"):
        call_with(lambda scale=1: scale, args)
