from sdft_ray.core.words import count_words, runs, split_unspaced


def test_runs_of_words_with_spaces_are_every_slice():
    words = ["so", "it", "isn\u2019t", "8", "and"]
    assert list(runs(split_unspaced(words), 4)) == [tuple(words[:4]), tuple(words[1:])]
    assert list(runs(words, 6)) == []


def test_runs_of_scripts_without_spaces_have_characters_for_words():
    pieces = split_unspaced(["CO2\u548c\u6c27\u6c14"])
    assert pieces == ["CO2", "\u548c", "\u6c27", "\u6c14"]
    assert count_words(pieces) == 2
    assert list(runs(pieces, 2)) == [("CO2", "\u548c", "\u6c27")]


def test_count_words_of_thai_is_a_quarter_of_its_letters():
    assert count_words(split_unspaced(["\u0e01" * 8])) == 2
