# ruff: noqa: RUF001 (digits and marks of other scripts are what is tested)
import pytest

from sdft_ray.core.decontamination import Overlap, find_overlaps, ngrams

QUESTION = "Which gas do green plants take in from the air around them by day, and which by night?"


def found(row: str, text: str, n: int = 13) -> list[str]:
    return [overlap.ngram for overlap in find_overlaps({"r": [row]}, {"quiz": [text]}, n)]


def test_ngrams_are_words_without_case_and_punctuation():
    assert list(ngrams("Which GAS, (say) do plants?", 4)) == ["which gas say do", "gas say do plants"]
    assert list(ngrams("too short", 3)) == []


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


def test_find_overlaps_of_everyday_chinese_is_none():
    assert found("下列说法正确的是哪一项？请选择。", "下列说法正确的是哪一项") == []
