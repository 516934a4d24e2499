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
    tasks = {"quiz": [QUESTION, QUESTION], "exam": ["Q: " + QUESTION], "other": ["no such thing"]}
    ngram = "which gas do green plants take in from the air around them by"
    assert find_overlaps(rows, tasks, 13) == [
        Overlap("a", "quiz", ngram),
        Overlap("a", "exam", ngram),
        Overlap("b", "quiz", ngram),
        Overlap("b", "exam", ngram),
    ]


def test_find_overlaps_without_tasks_is_none():
    assert find_overlaps({"a": [QUESTION]}, {}, 13) == []
