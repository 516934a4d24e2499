from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from sdft_ray.core.selection import (
    Generation,
    Rules,
    Selected,
    final_choice,
    final_number,
    is_correct,
    is_repetitive,
    read_answer,
    select_response,
)


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


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. Paris", "B"),
        ("B) Paris", "B"),
        ("(B) Paris", "B"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("answer is **B**", "B"),
        ("The correct answer is (B)", "B"),
        ("The correct answer is B, because plants need light.", "B"),
        ("The correct option is D.", "D"),
        ("So the answer is option C.", "C"),
        ("\\boxed{B}", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("It boils.\n#### C", "C"),
        ("First I thought the answer is A. But the answer is C.", "C"),
        ("A. It is wet. B. It is dry. The answer is A.", "A"),
        ("Plants need light, so (C).", "C"),
    ],
)
def test_final_choice_forms(text, letter):
    assert final_choice(text) == letter


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer is a dog.",
        "Answer: A dog barks.",
        "The answer is I think light.",
        "I think so.",
        "A dog.",
        "It is (A) or (B).",
        "A. wet\nB. dry",
        "Plants need light.",
        "The answer is Both.",
        "The answer is B's.",
    ],
)
def test_final_choice_words_are_no_letters(text):
    assert final_choice(text) is None


@pytest.mark.parametrize(
    ("checker", "reference", "given", "answer"),
    [
        ("number", "So 6 it is.\n#### 1,234.50", None, "2469/2"),
        ("number", "a story of 3", "1,234.5", "2469/2"),
        ("number", "none", None, None),
        ("choice", "(B) Paris", None, "B"),
        ("choice", "Paris", "b", "B"),
        ("choice", "Paris", None, None),
        ("math", "Thus $x = 3$ and \\boxed{\\frac32}.", None, "\\frac{3}{2}"),
        ("math", "The answer to the first question is 66, so\n#### 48", None, "48"),
        ("math", "a story", "2x + 1", "2x + 1"),
        ("math", "a story", None, None),
    ],
)
def test_read_answer_of_a_row(checker, reference, given, answer):
    assert read_answer(checker, reference, given) == answer


@pytest.mark.parametrize(
    ("checker", "answer", "text", "correct"),
    [
        ("number", "8", "It is 8.0.", True),
        ("number", "8", "It is 9.", False),
        ("number", "8", "It is eight.", False),
        ("choice", "B", "The answer is (B).", True),
        ("choice", "B", "The answer is (C).", False),
        ("math", "\\frac{1}{2}", "Half of it: \\boxed{0.5}.", True),
        ("math", "(x+1)^2", "So $x^2 + 2x + 1$.", True),
        ("math", "x=3", "We find \\boxed{3}.", True),
        ("math", "\\sqrt{8}", "\\boxed{2\\sqrt2}", True),
        ("math", "2, 3", "\\boxed{3, 2}", True),
        ("math", "50\\%", "That is 50%.", True),
        ("math", "8", "Four and four make 8.", True),
        ("math", "8", "\\boxed{9}", False),
        ("math", "8", "I'm ready to help.", False),
        ("math", "(1, 2)", "\\boxed{(2, 1)}", False),
    ],
)
def test_is_correct_by_checker(checker, answer, text, correct):
    assert is_correct(checker, answer, text) is correct


def test_is_correct_of_an_endless_expression_is_false_and_the_next_one_is_judged():
    assert not is_correct("math", "5", "\\boxed{9^{9^{9^9}}}")
    assert is_correct("math", "5", "\\boxed{5}")


def test_is_correct_of_mathematics_works_in_any_thread():
    with ThreadPoolExecutor(4) as threads:
        texts = [f"\\boxed{{{n}}}" for n in range(20)]
        assert list(threads.map(lambda text: is_correct("math", "7", text), texts)) == [n == 7 for n in range(20)]


ROW = {"prompt": "What is 4 + 4?", "reference": "4 + 4 = 8\n#### 8", "answer": "8"}
OPEN_ROW = {"prompt": "How are you?", "reference": "Fine.", "answer": None}
FILTERS = {"leak": True, "refusal": True, "repeated": True, "too_long": 4.0}
LOOP = "so it is 8 and " * 20


def select(row, *generations, **changes):
    made = [Generation(*each) for each in generations]
    return select_response(row, made, Rules("none" if row["answer"] is None else "number", FILTERS | changes))


@pytest.mark.parametrize(
    ("text", "finish_reason", "row", "reason"),
    [
        ("Four and four make 8.", "stop", ROW, "kept"),
        ("Four and four make 8.0", "stop", ROW, "kept"),
        ("Four and four make 9.", "stop", ROW, "wrong_answer"),
        ("Four and four make eight.", "stop", ROW, "no_answer"),
        ("Four and four make 8.", "length", ROW, "truncated"),
        ("  \n ", "stop", ROW, "empty"),
        ("The answer to this question is:", "stop", ROW, "empty"),
        ("These are the steps:\n4 + 4 = 8", "stop", ROW, "kept"),
        ("for i in x:", "stop", {**OPEN_ROW, "reference": "for x in y:"}, "kept"),
        ("engine broke", "error", ROW, "error"),
        ("It is 8", "abort", ROW, "error"),
        ("The reference answer says 8", "stop", ROW, "leak"),
        ("In my own words: 8", "stop", ROW, "leak"),
        (LOOP, "stop", ROW, "repeated"),
        ("I cannot help with 8.", "stop", ROW, "refusal"),
        (" ".join(f"{i} apples" for i in range(100)) + " 8", "stop", ROW, "kept"),
        (" ".join(f"{i} apples" for i in range(200)) + " 8", "stop", ROW, "too_long"),
        ("Anything goes here.", "stop", OPEN_ROW, "kept"),
        ("Your response is good.", "stop", OPEN_ROW, "leak"),
        ("<think>4, 4, hm</think>\n\nFour and four make 8.", "stop", ROW, "kept"),
        ("<think>It is 8.</think>", "stop", ROW, "empty"),
        ("<think>It is 8.", "stop", ROW, "truncated"),
        ("<think>Is it 8?</think>It is 9.", "stop", ROW, "wrong_answer"),
    ],
)
def test_select_response_table(text, finish_reason, row, reason):
    selected = select(row, (text, finish_reason))
    if reason == "kept":
        assert selected == Selected(text.rpartition("</think>")[2].strip(), "distilled", "kept")
    else:
        assert selected == Selected(row["reference"], "reference", reason)


@pytest.mark.parametrize(
    ("text", "off"),
    [
        ("The reference answer says 8", {"leak": False}),
        ("I cannot help with 8.", {"refusal": False}),
        (LOOP, {"repeated": False}),
        ("8 " + "and more " * 200 + "8", {"too_long": None, "repeated": False}),
    ],
)
def test_select_response_a_filter_that_is_off_keeps_the_rewrite(text, off):
    assert select(ROW, (text, "stop")).reason in FILTERS
    assert select(ROW, (text, "stop"), **off).reason == "kept"


def test_select_response_keeps_the_first_sample_that_passes():
    samples = [("It is 9.", "stop"), ("It is", "length"), ("It is 8.", "stop"), ("8 it is.", "stop")]
    assert select(ROW, *samples) == Selected("It is 8.", "distilled", "kept", 2)
    assert select(ROW, *samples[:2]) == Selected(ROW["reference"], "reference", "wrong_answer")


def test_select_response_thoughts_stay_where_the_recipe_says_so():
    text = "<think>4, 4</think>It is 8."
    assert select_response(ROW, [Generation(text, "stop")], Rules("number", FILTERS, False)).response == text


def test_select_response_two_texts_without_numbers_are_not_equal():
    assert select({**ROW, "answer": "yes"}, ("yes", "stop")).reason == "no_answer"


def test_select_response_a_phrase_of_the_row_itself_is_no_leak():
    generation = ("Check your answer twice.", "stop")
    assert select({**OPEN_ROW, "prompt": "How do I check your answer?"}, generation).reason == "kept"
    assert select({**OPEN_ROW, "reference": "Check your answer."}, generation).reason == "kept"
    assert select(OPEN_ROW, generation).reason == "leak"


@pytest.mark.parametrize(
    "text",
    [
        "I cannot help with that.",
        "I can\u2019t assist with this request.",
        "I'm sorry, but I can't say.",
        "Sorry, I cannot do it.",
        "Unfortunately, I am unable to see pictures.",
        "I'm not able to browse.",
        "As an AI language model, I have no feelings.",
        "Well, as a large language model I have none.",
        "I am just an AI, so no.",
        "I apologize, but I will not.",
    ],
)
def test_select_response_refusal_forms(text):
    assert select(OPEN_ROW, (text, "stop")).reason == "refusal"
    assert select({**OPEN_ROW, "reference": "I'm sorry, but I cannot say."}, (text, "stop")).reason == "kept"


@pytest.mark.parametrize(
    "text",
    [
        "I can help with that.",
        "She said: I cannot help you.",
        "I cannot believe how well I am.",
        "Sorry is the hardest word.",
        "He works as an AI researcher.",
        "Unfortunately, the bridge is closed.",
    ],
)
def test_select_response_words_that_refuse_nothing(text):
    assert select(OPEN_ROW, (text, "stop")).reason == "kept"


def test_select_response_a_reference_that_repeats_itself_allows_it():
    row = {**OPEN_ROW, "reference": "row, row, row your boat " * 8}
    assert select(row, ("row, row, row the boat " * 8, "stop")).reason == "kept"


def test_is_repetitive_lists_and_short_texts_are_not():
    assert not is_repetitive("")
    assert not is_repetitive("yes yes yes")
    assert not is_repetitive("\n".join(f"{i}. item {i} of the list" for i in range(30)))
