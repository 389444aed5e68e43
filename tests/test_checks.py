"""What the arguments of every entrance must be; that every entrance asks is for `test_fuzz.py`."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_doge.checks import check_choice, check_count, check_flag, check_names, check_number, check_path, check_seed


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)])
def test_whole_numbers_of_every_library_are_whole_numbers(value):
    assert type(check_count("n", value)) is type(check_seed("n", value)) is type(check_number("n", value)) is int
    assert check_count("n", value) == check_number("n", value) == 2


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), Fraction(1, 2)])
def test_numbers_of_every_library_are_numbers(value):
    assert type(check_number("x", value)) is float
    assert check_number("x", value, above=0, below=1) == 0.5


@pytest.mark.parametrize("value", [np.True_, True, torch.tensor(True)])
def test_flags_of_every_library_are_flags(value):
    assert check_flag("f", value) is True


ODD = [
    "5",
    b"5",
    "",
    None,
    True,
    np.True_,
    float("nan"),
    [1],
    np.array([1]),
    {},
    1j,
    1.7,
    10**5000,
    -(10**5000),
    object(),
]


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_what_is_no_whole_number_is_refused_in_words_that_show_it(value):
    for check in (check_count, check_seed):
        with pytest.raises(ValueError, match=r"^`n` must be .*, but got ") as refused:
            check("n", value)
        assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("value", "law", "message"),
    [
        (0, {"above": 0}, "positive, but got 0"),
        (float("inf"), {"above": 0}, "positive and finite"),
        (10**400, {"above": 0}, "positive and finite"),
        (float("nan"), {"finite": False}, "a number, not NaN"),
        (1, {"least": 0, "below": 1}, r"in \[0, 1\)"),
        (0, {"above": 0, "most": 1}, r"in \(0, 1\]"),
        (-1, {"least": 0, "unit": "GiB"}, "at least 0 GiB, but got -1"),
        ("5", {}, "a number, but got '5'. Give the number itself, not a text"),
        (True, {}, "a number"),
    ],
)
def test_numbers_out_of_range_are_refused(value, law, message):
    with pytest.raises(ValueError, match=f"`x` must be {message}"):
        check_number("x", value, **law)


def test_none_passes_where_the_argument_is_optional():
    assert check_count("n", None, optional=True) is None
    with pytest.raises(ValueError, match="`n` must be a whole number, but got 'x'"):
        check_count("n", "x", optional=True)


@pytest.mark.parametrize("value", ["no", 1, None, np.array([True]), "True"])
def test_a_text_is_no_flag(value):
    with pytest.raises(ValueError, match="`f` must be True or False, but got"):
        check_flag("f", value)


@pytest.mark.parametrize("value", ["c", ["a"], np.array(["a", "b"]), None, {}])
def test_what_is_no_choice_is_refused(value):
    with pytest.raises(ValueError, match=r"`c` must be one of \['a', 'b'\], but got"):
        check_choice("c", value, ("a", "b"))


@pytest.mark.parametrize("value", [3, "", b"x", "a\0b", None, "\ud800", ["x"]])
def test_what_is_no_path_is_refused(value):
    with pytest.raises(ValueError, match="`p` must be a path, but got"):
        check_path("p", value)
    assert check_path("p", Path("x")) == Path("x")


@pytest.mark.parametrize("names", ["wiki", [], [3], ["a", " "], ["a", "a"], 7, ["\udc80"]])
def test_what_are_no_names_are_refused(names):
    with pytest.raises(ValueError, match=r"^Names must be"):
        check_names(names, what="Names")
