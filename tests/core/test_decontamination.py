# ruff: noqa: RUF001 (digits and marks of other scripts are what is tested)
import html
import pickle
import re
import string
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from row_files import find_overlaps

from sdft_ray.core.decontamination import SHORTEST_WORDS, Overlap, TaskIndex, split_words
from sdft_ray.core.words import count_words, runs, split_unspaced

QUESTION = "Which gas do green plants take in from the air around them by day, and which by night?"


def found(row: str, text: str, n: int = 13) -> list[str]:
    return [overlap.ngram for overlap in find_overlaps({"r": [row]}, {"quiz": [text]}, n)]


def test_split_words_leaves_out_case_and_punctuation():
    assert split_words("Which GAS, (say) do plants?") == ["which", "gas", "say", "do", "plants"]


def test_find_overlaps_of_n_shared_words_anywhere():
    row = "Hello! which gas do GREEN plants take in - from the air around them by night"
    assert found(row, QUESTION) == ["which gas do green plants take in from the air around them by"]
    assert found(row.replace("air", "water"), QUESTION) == []


def test_find_overlaps_needs_n_words_in_a_row():
    row = "Which gas do green plants take in from the air?"
    assert found(row, QUESTION, n=10) == ["which gas do green plants take in from the air"]
    assert found(row, QUESTION, n=11) == []


def test_find_overlaps_of_a_short_text_only_as_a_whole():
    eight = "Which gas do all green plants take in?"
    assert found(f"Tell me. {eight} Thanks.", eight) == ["which gas do all green plants take in"]
    assert found("Which gas do all green plants take", eight) == []


def test_find_overlaps_of_everyday_words_is_none():
    assert found("It is in the middle of the night, you know.", "in the middle of the night") == []


def test_find_overlaps_names_row_task_and_words_once_a_pair():
    rows = {"a": ["nothing of the kind", QUESTION], "b": [QUESTION, QUESTION], "c": ["something else"]}
    tasks = {"quiz": [QUESTION, QUESTION], "test": ["Q: " + QUESTION], "other": ["no such thing"]}
    ngram = "which gas do green plants take in from the air around them by"
    assert find_overlaps(rows, tasks, 13) == [
        Overlap("a", "quiz", ngram),
        Overlap("a", "test", ngram),
        Overlap("b", "quiz", ngram),
        Overlap("b", "test", ngram),
    ]


def test_find_overlaps_without_tasks_is_none():
    assert find_overlaps({"a": [QUESTION]}, {}, 13) == []


@pytest.mark.parametrize(
    "item",
    [
        "哪一种气体被绿色植物在白天吸收并且用来制造糖和淀粉同时放出氧气",
        "緑色植物が昼に取り入れて糖やでんぷんを作り酸素を出す元になる気体はどれですか",
        "พืชสีเขียวดูดก๊าซชนิดใดจากอากาศรอบตัวในเวลากลางวันเพื่อสร้างน้ำตาลและแป้ง",
        "녹색 식물은 낮에 공기에서 어떤 기체를 흡수하여 당과 녹말을 만드는가",
        "长江和黄河都发源于哪一座高原之上呢",
    ],
)
def test_find_overlaps_in_scripts_without_spaces(item):
    assert found(item, item)
    assert found(f"请回答：{item}？谢谢。", item)
    assert not found(item[: len(item) // 3], item)


@pytest.mark.parametrize(
    "spelled",
    [
        lambda item: unicodedata.normalize("NFD", item),
        lambda item: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in item),
        lambda item: item.replace("tudi", "tu\u00addi").replace(" ", " \u200b"),
    ],
    ids=["accents apart", "full width", "invisible"],
)
def test_find_overlaps_whatever_the_spelling_of_unicode(spelled):
    item = "Quelle est la capitale de la région où les élèves étudient la géographie"
    assert spelled(item) != item and found(spelled(item), item)


@pytest.mark.parametrize(
    ("row", "item"),
    [
        (
            "Tom said: &quot;Which gas do they take in?&quot; It&#39;s R&amp;D, no more",
            'Tom said: "Which gas do they take in?" It\'s R&D, no more',
        ),
        ("A shop sold 1,200 apples and 12,450 pears in May", "A shop sold 1200 apples and 12450 pears in May"),
        ("A shop sold $1{,}200$ apples and 3,5 pears in May", "A shop sold 1,200 apples and 3,5 pears in May"),
        ("Which gas do _green_ plants take in from __the air__?", "Which gas do green plants take in from the air?"),
        ("Let $x_{1}$ and $x_{2}$ be the roots of the equation", "Let $x_1$ and $x_2$ be the roots of the equation"),
        (
            "أَيُّ غازٍ تَمتَصُّهُ النباتات الخضـــراء من الهواء حولها في النهار",
            "أي غاز تمتصه النباتات الخضراء من الهواء حولها في النهار",
        ),
        ("باع متجر ١٢٠ تفاحة و ٣٥ كمثرى في شهر مايو", "باع متجر 120 تفاحة و 35 كمثرى في شهر مايو"),
        (
            "WELCHES GAS NEHMEN PFLANZEN AUF DER STRASSE TAGSÜBER AUF",
            "Welches Gas nehmen Pflanzen auf der Straße tagsüber auf",
        ),
    ],
    ids=["entities", "commas", "latex", "emphasis", "subscripts", "vowels", "digits", "case"],
)
def test_find_overlaps_whatever_the_marks_and_signs(row, item):
    assert found(row, item) and found(item, row)


def test_find_overlaps_of_a_name_in_code_counts_its_words():
    assert split_words("def has_close_elements(numbers)") == ["def", "has", "close", "elements", "numbers"]


def test_find_overlaps_counts_words_of_hindi_with_their_signs():
    assert split_words("हिंदी में लिखा") == ["हिंदी", "में", "लिखा"]
    assert not found("अरे, क्या आप मुझे बता सकते हैं", "क्या आप मुझे बता सकते हैं")


def test_find_overlaps_of_everyday_chinese_is_none():
    assert found("下列说法正确的是哪一项？请选择。", "下列说法正确的是哪一项") == []


# --- the index against the plain algorithm --------------------------------------------------------------------


SIGNS = r"\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff"


def plain_words(text: str) -> list[str]:
    text = re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", html.unescape(text))
    text = re.sub("[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]", "", text)
    text = re.sub("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c7\u0640\u064b-\u0652\u0670]", "", text)
    text = re.sub(r"\d", lambda digit: str(int(digit[0])) if digit[0] < "\uabfa" else digit[0], text)
    return split_unspaced(re.findall(rf"(?:[^\W_]|[{SIGNS}])+", unicodedata.normalize("NFKC", text).casefold()))


def plain_ngrams(text: str, n: int) -> list[str]:
    return list(map(" ".join, runs(plain_words(text), n)))


def plain_overlaps(rows: dict, tasks: dict, n: int) -> list[Overlap]:
    """Compare every run of every row with every run of every task."""
    indexes = {}
    for task, texts in tasks.items():
        indexes[task] = {}
        for text in texts:
            size = min(n, count_words(plain_words(text)))
            if size >= min(n, SHORTEST_WORDS):
                indexes[task].setdefault(size, set()).update(plain_ngrams(text, size))
    sizes = sorted({size for index in indexes.values() for size in index}, reverse=True)
    overlaps = []
    for row, texts in rows.items():
        grams = [(size, gram) for text in texts for size in sizes for gram in plain_ngrams(text, size)]
        for task, index in indexes.items():
            shared = [gram for size, gram in grams if gram in index.get(size, ())]
            overlaps += [Overlap(row, task, gram) for gram in shared[:1]]
    return overlaps


PIECES = [
    "a",
    "B",
    "the",
    "The",
    "gas",
    "it's",
    "CO2",
    "x_y",
    "&amp;",
    "ـ",
    "أَ",
    "שָׁ",
    "été",
    "ÉTÉ",
    "İ",
    "ß",
    "K",
    "٣",
    "녹색",
    "식물은",
]
PIECES += [*"绿色植物のガス", "พืชสี", "น้ำ", "ខ្មែរ", "和氧气 CO2", "a\tb\nc", "\x1f"]
words = st.lists(st.sampled_from(PIECES), max_size=30)
marks = st.sampled_from([" ", " ", " ", ", ", " - ", "", "。", "\u00a0", "\n"])


@st.composite
def texts_with_shared_parts(draw) -> tuple[dict, dict]:
    """Return rows and tasks of few different words, whose texts repeat parts of each other."""
    parts = draw(st.lists(words, min_size=1, max_size=4))
    text = st.builds(
        lambda chosen, mark: mark.join(piece for part in chosen for piece in part),
        st.lists(st.one_of(st.sampled_from(parts), words), max_size=3),
        marks,
    )
    several = st.lists(text, max_size=3)
    return tuple(draw(st.dictionaries(st.sampled_from(names), several, max_size=3)) for names in ("rst", "xyz"))


@given(given=texts_with_shared_parts(), n=st.integers(1, 16))
@example(({"r": ["a b c d e f g h i j k"]}, {"x": ["b c d e f g h i"], "y": ["c d e f g h i j k"]}), 13)
@example(({"r": ["a b c d e f g h. i j k l m n o p q."]}, {"x": ["a b c d e f g h", "i j k l m n o p q"]}), 9)
def test_find_overlaps_finds_what_the_plain_algorithm_finds(given, n):
    rows, tasks = given
    assert find_overlaps(rows, tasks, n) == plain_overlaps(rows, tasks, n)


@given(
    text=st.lists(st.sampled_from(string.ascii_letters + "  绿"), min_size=40, max_size=80).map("".join),
    before=st.integers(0, 40),
    n=st.integers(1, 14),
)
def test_find_overlaps_wherever_a_row_holds_the_text(text, before, n):
    rows = {"r": [" ".join(f"w{i}" for i in range(before)) + f" {text.upper()}; {text[::-1]}"]}
    assert find_overlaps(rows, {"x": [text]}, n) == plain_overlaps(rows, {"x": [text]}, n)


@pytest.mark.parametrize("size", range(1, 16))
@pytest.mark.parametrize("before", range(7))
def test_a_run_of_any_size_is_found_at_any_place(size, before):
    shared = [f"s{i}" for i in range(size)]
    row = " ".join([*(f"b{i}" for i in range(before)), *shared, "end"])
    tasks = {"x": [" ".join(["start", *shared, "other"])]}
    assert find_overlaps({"r": [row]}, tasks, size) == [Overlap("r", "x", " ".join(shared))]


def test_words_of_every_character_are_those_of_the_plain_algorithm():
    for start in range(0, 0x30000, 64):
        text = "".join(f"a{chr(code)}B " for code in range(start, start + 64) if not 0xD800 <= code < 0xE000)
        assert [*map(" ".join, runs(split_words(text), 1))] == plain_ngrams(text, 1)


def test_index_is_asked_row_by_row_and_works_in_another_process():
    index = TaskIndex({"quiz": iter([QUESTION]), "none": []}, 13)
    (overlap,) = index.find("r", iter(["Hello.", QUESTION]))
    assert (overlap.row, overlap.task) == ("r", "quiz")
    assert index.find("s", ["Hello."]) == []
    assert pickle.loads(pickle.dumps(index)).find("r", [QUESTION]) == [overlap]
