"""The pages of reports: the ladder, and tables that are cards on a phone."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from sdft_ray.core.recovery import mean_error
from sdft_ray.report import page, plots


def entry(model: str, values: list[float], error: float | None = 0.02) -> SimpleNamespace:
    scores = {str(i): SimpleNamespace(value=value, stderr=error) for i, value in enumerate(values)}
    return SimpleNamespace(model=model, quality=SimpleNamespace(tasks=scores, mean=float(np.mean(values))))


def test_ladder_has_every_step_in_order_and_the_base_as_a_line():
    names = ["pruned", "patched", "sft", "distilled", "slerp"]
    svg = plots.ladder([entry("base", [0.5, 0.7]), *(entry(name, [0.3, 0.5], error=None) for name in names)])
    assert [text for text in re.findall(r">([\w ]+)</text>", svg) if text in names] == names
    assert "base 60.0" in svg and "currentColor" in svg


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "drawn"), [("$<b>_{^$", "$&lt;b&gt;_{^$"), ("模型", "模型")])
def test_name_with_dollar_signs_tags_or_of_another_script_is_drawn_as_it_is(name, drawn):
    assert f">{drawn}</text>" in plots.ladder([entry("base", [0.5]), entry(name, [0.4])])


def test_mean_error_is_the_spread_of_means_over_tasks():
    random = np.random.default_rng(0)
    draws = np.stack([random.normal(0, error, 40_000) for error in (0.03, 0.01, 0.05)])
    assert mean_error([0.03, 0.01, 0.05]) == pytest.approx(draws.mean(axis=0).std(), rel=0.02)
    assert mean_error([0.03, None]) is None and mean_error([]) is None


def test_link_of_a_trial_is_an_address_and_none_in_an_object_store(tmp_path):
    assert page._link(str(tmp_path / "run #1" / "50% a"), tmp_path) == "run%20%231/50%25%20a/manifest.json"
    assert page._link("s3://bucket/root/train/a", tmp_path) is None


class Cards(HTMLParser):
    """The tables of a page that are cards: header, and lines of (text, name) a cell."""

    def __init__(self):
        super().__init__()
        self.inside, self.lines = False, []

    def handle_starttag(self, tag, attrs):
        fields = dict(attrs)
        self.inside = fields.get("class") == "cards" if tag == "table" else self.inside
        if self.inside and tag == "tr":
            self.lines.append([])
        if self.inside and tag in ("td", "th"):
            self.lines[-1].append(["", fields.get("data-name")])

    def handle_data(self, data):
        if self.inside and self.lines and self.lines[-1]:
            self.lines[-1][-1][0] += data.strip()


@pytest.mark.parametrize("times", [1, 2])
def test_page_of_sweeps_names_every_figure_of_a_card_as_the_head_of_its_column(collected, times, tmp_path):
    cards, report = Cards(), collected.model_copy(update={"maps": []})
    cards.feed(page.render_sweep(report, tmp_path) if times == 1 else page.render_several({"a": report, "b": report}))
    head, *lines = cards.lines
    assert len(lines) == times * (len(collected.models) + len(collected.groups))
    for line in lines:
        assert len(line) == len(head)
        for (text, name), (column, _) in list(zip(line, head, strict=True))[1:]:
            assert name == (column if text else None)


def test_legend_of_long_names_has_one_column_which_no_edge_cuts_off():
    bases = ("/data/models/SmolLM2-135M-Instruct", "/data/models/Qwen3-0.6B-Instruct-2507")
    figures = {"rows": 16, "recovery": 80.0, "recovery_sd": None, "chosen": True}
    groups = [SimpleNamespace(of=of, arm=arm, blocks=2, **figures) for of in bases for arm in ("sft", "distilled")]
    pruned = [SimpleNamespace(blocks=2, quality=SimpleNamespace(recovery=50.0))]
    svg = plots.recovery_lines(SimpleNamespace(groups=groups, pruned=pruned), "blocks", "rows", "blocks removed")
    places = re.findall(r' x="([\d.]+)" y[^>]*>[^<]+ 16 rows</text>', svg)
    assert len(places) == 4 and len({*places}) == 1
