"""How often generated answers go wrong as texts: counted as the filters of rewrites count, from what is stored."""

import json

import pytest

from sdft_ray.core.rows import Row
from sdft_ray.generated import HeldOutItem, describe, describe_sampled
from sdft_ray.results import read_items

NO_FILTERS = [{"refusal_phrases": ()}]
CIRCLES = "so it is 4 and " * 20


def answer(id: str, generated: str, ended: bool | None = True) -> HeldOutItem:
    return HeldOutItem(id=id, value=0.0, generated=generated, ended=ended, bits=1.0, bytes=1)


def rows(**references: str) -> dict[str, Row]:
    return {name: Row(f"{name}?", reference, id=name) for name, reference in references.items()}


def test_describe_counts_each_fault_and_the_length():
    items = [
        answer("good", "It is 4."),
        answer("circles", CIRCLES, ended=False),
        answer("nothing", ""),
        answer("announces", "The answer is:"),
        answer("refuses", "I'm sorry, but I cannot help with that."),
        answer("thinks", f"<think>\n{CIRCLES}", ended=False),
        answer("thought", "<think>4 and 4, hm.</think>It is 8."),
        answer("spanish", "No puedo ayudarte con eso."),
    ]
    known = rows(**dict.fromkeys((item.id for item in items), "It is 4."))
    found = describe(items, known, NO_FILTERS)
    assert found.answers == 8
    assert found.ended == 6 / 8
    assert found.repeated == 2 / 8, "also in a thought without an end"
    assert found.empty == 3 / 8, "nothing, an announcement, a thought without an end"
    assert found.refused == 1 / 8
    assert found.characters == pytest.approx(sum(len(item.generated) for item in items) / 8)
    known["spanish"] = known["spanish"]._replace(origin=1)
    own = [*NO_FILTERS, {"refusal_phrases": ("no puedo",)}]
    assert describe(items, known, own).refused == 2 / 8, "by the filters of its source"


def test_describe_counts_no_fault_that_the_reference_has():
    known = rows(circles=CIRCLES, refuses="I cannot help with that.", announces="They are:")
    items = [answer("circles", CIRCLES), answer("refuses", "I cannot help."), answer("announces", "These are:")]
    found = describe(items, known, NO_FILTERS)
    assert (found.repeated, found.refused, found.empty) == (0, 0, 0)


def test_describe_of_what_an_older_version_stored_does_not_know_what_ended(tmp_path):
    old = {"id": "a", "value": 1.0, "generated": "4", "bits": 2.0, "bytes": 1}
    lines = [old, {**old, "id": "b", "ended": True}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = read_items(tmp_path, HeldOutItem)
    assert [item.ended for item in items] == [None, True]
    found = describe(items, rows(a="4", b="4"), NO_FILTERS)
    assert found.ended is None and found.characters == 1


def test_describe_sampled_is_the_mean_over_rows_and_its_paired_difference_to_the_base():
    def sampled(*right: int) -> list[HeldOutItem]:
        return [answer(str(i), "4").model_copy(update={"right": count}) for i, count in enumerate(right)]

    base, model = sampled(4, 2, 0, 1), sampled(4, 1, 0, 0)
    assert describe_sampled(base, None, 1, 4).share.value == pytest.approx((1 + 2 / 4 + 0 + 1 / 4) / 4)
    found = describe_sampled(model, base, 2, 4)
    # Of the six pairs of four samples none is wrong altogether in 6, 3, 0 and 0; of the base in 6, 5, 0 and 3.
    assert found.share.value == pytest.approx((6 + 3) / 6 / 4)
    assert found.over_base.value == pytest.approx(-(2 + 3) / 6 / 4)
    assert found.share.low < found.share.value < found.share.high and found.over_base.high <= 0
    same = describe_sampled(base, base, 4, 4).over_base
    assert (same.value, same.low, same.high) == (0, 0, 0)
