from fractions import Fraction

import pytest

from sdft_ray.core.selection import Generation, Selected, final_number, is_repetitive, select_response


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The total is 1,234.50", "1234.5"),
        ("it drops to -3", "-3"),
        ("so \u22127 remains", "-7"),
        ("half of it: 1/2", "1/2"),
        ("that is 50 %", "50"),
        ("that is 50%.", "50"),
        ("she paid $5.00.", "5"),
        ("a loss of -$5", "-5"),
        ("\\boxed{42} is it, see step 3", "42"),
        ("\\boxed{\\frac{3}{4}}", "3/4"),
        ("9 apples\n#### 8", "8"),
        ("#### 1,000\n", "1000"),
        ("12 34", "34"),
        ("10-3", "3"),
        ("5 - 3", "3"),
        ("5 -3", "-3"),
        ("(2) - 4", "4"),
        ("lists 5,1000", "1000"),
        ("1,234,567", "1234567"),
        ("the area is 12 m^2", "12"),
        ("\\boxed{12\\text{ cm}^2}", "12"),
        ("so \\frac{1}{2}", "1/2"),
        ("1.5e3", "1500"),
        ("take 3 eggs", "3"),
        ("pages 3-4", "4"),
        (".5", "0.5"),
        ("007", "7"),
        ("x = 3.", "3"),
        ("1/0", "1"),
    ],
)
def test_final_number_formats(text, number):
    assert final_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "none at all", "####", "\\boxed{}", "-", "$"])
def test_final_number_absent_is_none(text):
    assert final_number(text) is None


REFERENCE = "4 + 4 = 8\n#### 8"


@pytest.mark.parametrize(
    ("text", "finish_reason", "answer", "reason"),
    [
        ("Four and four make 8.", "stop", "8", "kept"),
        ("Four and four make 8.0", "stop", "8", "kept"),
        ("Four and four make 9.", "stop", "8", "wrong_answer"),
        ("Four and four make eight.", "stop", "8", "no_answer"),
        ("Four and four make 8.", "length", "8", "truncated"),
        ("  \n ", "stop", "8", "empty"),
        ("engine broke", "error", "8", "error"),
        ("It is 8", "abort", "8", "error"),
        ("The reference answer says 8", "stop", "8", "leak"),
        ("In my own words: 8", "stop", "8", "leak"),
        ("so it is 8 and " * 20, "stop", "8", "repeated"),
        ("Anything goes here.", "stop", None, "kept"),
        ("Your response is good.", "stop", None, "leak"),
    ],
)
def test_select_response_table(text, finish_reason, answer, reason):
    selected = select_response(REFERENCE, answer, Generation(text, finish_reason))
    if reason == "kept":
        assert selected == Selected(text.strip(), "distilled", "kept")
    else:
        assert selected == Selected(REFERENCE, "reference", reason)


def test_select_response_two_texts_without_numbers_are_not_equal():
    assert select_response("yes", "yes", Generation("yes", "stop")).reason == "no_answer"


def test_select_response_a_phrase_of_the_row_itself_is_no_leak():
    generation = Generation("Check your answer twice.", "stop")
    assert select_response("r", None, generation, may_say="How do I check your answer?").reason == "kept"
    assert select_response("r", None, generation, may_say="How?").reason == "leak"


def test_is_repetitive_lists_and_short_texts_are_not():
    assert not is_repetitive("")
    assert not is_repetitive("yes yes yes")
    assert not is_repetitive("\n".join(f"{i}. item {i} of the list" for i in range(30)))
