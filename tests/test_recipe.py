"""What is wrong with a recipe is said in one clear line a problem, all at once; what is right is frozen."""

from pathlib import Path

import pydantic
import pytest
import yaml
from refusals import complaint

from sdft_ray.errors import UserError
from sdft_ray.models.depth import require_depth
from sdft_ray.spec.compute import load_compute
from sdft_ray.spec.loading import dump_yaml, load_recipe, read_yaml
from sdft_ray.spec.pruning import Protect
from sdft_ray.spec.recipe import Recipe

GOOD = {
    "model": {"path": "MODEL"},
    "rows": {"gym": "chain_sum", "limit": 10},
    "prune": {"blocks": 2},
    "evaluate": {"tasks": ["arc_easy"]},
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLAIN = {"path": "texts.jsonl", "fields": {"response": "text"}, "plain": True, "answer": "none"}
SUMS = {"gym": "chain_sum", "limit": 10}
HUB_ROWS = {"repo": "a/b", "revision": COMMIT, "fields": {"prompt": "q", "response": "a"}}


def load(folder: Path, changes: dict | None = None, overrides: tuple[str, ...] = (), without: str = "") -> Recipe:
    data = {key: value for key, value in {**GOOD, **(changes or {})}.items() if key != without}
    return load_text(folder, yaml.safe_dump(data, sort_keys=False), overrides)


def load_text(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"distill": {"tempreature": 1}}, "distill.tempreature: unknown key. Did you mean temperature?"),
        ({"distil": {}}, "distil: unknown key. Did you mean distill?"),
        ({"train": {"lora": {"rnk": 4}}}, "train.lora.rnk: unknown key. Did you mean rank?"),
        (
            {"prune": {"blocks": 2, "calibration": {"max_token": 5}}},
            "prune.calibration.max_token: unknown key. Did you mean max_tokens?",
        ),
        (
            {"prune": {"blocks": 2, "calibration": [{"text": "boolq"}, {"max_token": 5}]}},
            "prune.calibration.1.max_token: unknown key. Did you mean max_tokens?",
        ),
        (
            {"prune": {"blocks": 2, "calibration": {"rows": {"path": "f.jsonl", "fields": {"prompt": "q"}}}}},
            "prune.calibration.rows.fields: names no response. Set response, or messages for conversations.",
        ),
        (
            {"prune": {"blocks": 2, "calibration": []}},
            "prune.calibration: names no corpus. Give at least one.",
        ),
        ({"model": {"path": ""}}, 'model.path: got ""; expected text. Change this value.'),
        ({"evaluate": {"tasks": [""]}}, 'evaluate.tasks.0: got ""; expected text. Change this value.'),
        ({"draft": {"tokens": [33]}}, "draft.tokens.0: got 33; expected less than or equal to 32. Change this value."),
        ({"train": {"seed": -1}}, "train.seed: got -1; expected greater than or equal to 0. Change this value."),
        ({"train": {"seed": 2**32}}, f"train.seed: got {2**32}; expected less than {2**32}. Change this value."),
        (
            {"train": {"lora": {"targets": []}}},
            "train.lora.targets: got []; expected 'all-linear' or at least 1 item. Change this value.",
        ),
        (
            {"merge": {"others": {"x": {"path": "p"}}, "slerp": {"t": [0.5, 2]}}},
            "merge.slerp.t.1: got 2; expected less than or equal to 1. Change this value.",
        ),
        (
            {"rows": {"path": "f.jsonl", "fields": {"prompt": "q", "response": "q"}}},
            "rows.fields.response: q is the column of the prompt, too. Give another column.",
        ),
        (
            {"prune": {"blocks": 2, "calibration": {"text": "boolq", "rows": "own"}}},
            "prune.calibration: gives both text and rows. Keep one.",
        ),
        (
            {"prune": {"blocks": 2, "calibration": {"rows": "mine"}}},
            'prune.calibration.rows: got "mine"; expected own or a section with one of gym, path, repo. Change this '
            "value.",
        ),
        (
            {"prune": {"blocks": 2, "calibration": {"positions": "response"}}},
            "prune.calibration: a plain text has no response, which positions names. Set positions: last.",
        ),
        (
            {"prune": {"blocks": 2, "contiguous": False, "metric": "angular"}},
            "prune.contiguous: false has no use with angular. Set prune.metric: influence, or loss.",
        ),
        (
            {"prune": {"blocks": 2, "metric": "tail", "contiguous": False}},
            "prune.contiguous: false has no use with tail. Set prune.metric: influence, or loss.",
        ),
        (
            {"prune": {"blocks": 2, "metric": "loss", "candidates": 1}},
            "prune.candidates: 1 leaves the loss nothing to choose from. Set candidates to 2 or more.",
        ),
        (
            {"rows": {"gym": "chain_sum", "limit": 10, "helt_out": 3}},
            "rows.helt_out: unknown key. Did you mean held_out?",
        ),
        (
            {"train": {"lora": {"zzz": 4}}},
            "train.lora.zzz: unknown key. Known: alpha, dropout, rank, targets.",
        ),
        ({"arms": {"sft": {"lrr": 1}}}, "arms.sft.lrr: unknown key. Did you mean lr?"),
        ({"train": {"epochs": "3"}}, 'train.epochs: got "3"; expected a whole number. Change this value.'),
        ({"train": {"epochs": 1.5}}, "train.epochs: got 1.5; expected a whole number. Change this value."),
        ({"train": {"epochs": True}}, "train.epochs: got true; expected a whole number. Change this value."),
        ({"train": {"epochs": 0}}, "train.epochs: got 0; expected greater than 0. Change this value."),
        ({"train": None}, "train: got null; expected a section with keys. Change this value."),
        ({"distill": {"top_p": 2}}, "distill.top_p: got 2; expected less than or equal to 1. Change this value."),
        ({"train": {"method": "lroa"}}, "train.method: got \"lroa\"; expected 'lora' or 'full'. Change this value."),
        ({"model": {"path": 3}}, "model.path: got 3; expected text. Change this value."),
        (
            {"model": {"path": "s3:/bucket/model"}},
            "model.path: s3:/bucket/model is an address, and a path is needed. Give the path of a copy.",
        ),
        (
            {"rows": {"path": "file:///data/rows.jsonl", "fields": {"prompt": "q", "response": "a"}}},
            "rows.path: file:///data/rows.jsonl is an address, and a path is needed. Write /data/rows.jsonl.",
        ),
        (
            {"prune": {"blocks": 2, "calibration": {"text": "https:/host/texts.txt"}}},
            "prune.calibration.text: https:/host/texts.txt is no address. Write https://host/texts.txt.",
        ),
        ({"prune": {}}, "prune.blocks: is missing. Add it, prune.target or prune.remove."),
        *(
            (
                {"prune": {"remove": [2, 3], name: value}},
                f"prune.{name}: decides nothing beside prune.remove. Keep one of them.",
            )
            for name, value in {
                "blocks": 2,
                "target": {"parameters": 5},
                "metric": "loss",
                "contiguous": True,
                "protect": {"first": 1},
                "candidates": 3,
            }.items()
        ),
        (
            {"prune": {"blocks": 2, "target": {"parameters": 5}}},
            "prune.target: decides how many blocks go, and so does prune.blocks. Keep one of them.",
        ),
        (
            {"prune": {"target": {"parameters": 0}}},
            "prune.target.parameters: got 0; expected greater than 0. Change this value.",
        ),
        ({"prune": {"remove": []}}, "prune.remove: names no block. Give at least one."),
        ({"prune": {"remove": [4, 2, 4]}}, "prune.remove: names block 4 twice. Remove one."),
        (
            {"prune": {"remove": [-1]}},
            "prune.remove.0: got -1; expected greater than or equal to 0. Change this value.",
        ),
        ({"model": {"repo": "a/b"}}, "model.revision: is missing. Add it."),
        (
            {"model": {"repo": "a/b", "revision": "main"}},
            "model.revision: 'main' moves. Pin a commit: git ls-remote https://huggingface.co/REPO.",
        ),
        (
            {"rows": {**HUB_ROWS, "revision": "v1.0"}},
            "rows.revision: 'v1.0' moves. Pin a commit: git ls-remote https://huggingface.co/REPO.",
        ),
        (
            {"model": {"repo": "a/b", "path": "x"}},
            "model: has none or several of package, path, repo. Give exactly one of them.",
        ),
        (
            {"rows": {"limit": 3}},
            "rows: has none or several of gym, path, repo. Give exactly one of them.",
        ),
        ({"rows": {"gym": "chain_sum"}}, "rows: a gym has no end. Set limit."),
        ({"rows": 3}, "rows: got 3; expected a section with one of gym, path, repo. Change this value."),
        (
            {"rows": [SUMS, None]},
            "rows.1: got null; expected a section with one of gym, path, repo. Change this value.",
        ),
        ({"rows": {"pth": "a"}}, "rows: has none or several of gym, path, repo. Did you mean path?"),
        (
            {"model": {"path": "~nobody-1729/model"}},
            "model.path: ~nobody-1729/model begins with the home of nobody here. Write the whole path.",
        ),
        (
            {"rows": {"path": "~nobody-1729/*.jsonl", "fields": {"prompt": "q", "response": "a"}}},
            "rows.path: ~nobody-1729/*.jsonl begins with the home of nobody here. Write the whole path.",
        ),
        ({"model": {"Path": "a"}}, "model: has none or several of package, path, repo. Did you mean path?"),
        ({"train": {"LR": 1}}, "train.LR: unknown key. Did you mean lr?"),
        ({"rows": []}, "rows: names no source. Give at least one."),
        ({"rows": [SUMS, {"gym": "products"}]}, "rows.1: a gym has no end. Set limit."),
        ({"rows": [SUMS, {**SUMS, "wieght": 2}]}, "rows.1.wieght: unknown key. Did you mean weight?"),
        (
            {"rows": [{**SUMS, "weight": -1}, {**SUMS, "weight": 1}]},
            "rows.0.weight: got -1; expected greater than or equal to 0. Change this value.",
        ),
        (
            {"rows": [{**SUMS, "weight": 0}, {**SUMS, "weight": 0}]},
            "rows: weights sum to 0, so no rows are left. Raise a weight.",
        ),
        (
            {"rows": [{**SUMS, "weight": 2}, {**SUMS}, {**SUMS}]},
            "rows: some sources have a weight, and of 1, 2 it is missing. Give a weight to each, or to none.",
        ),
        (
            {"rows": {**SUMS, "template": "Rewrite {reference}"}},
            "rows.template: lacks {prompt} or {reference}. Write both.",
        ),
        (
            {"evaluate": {"tasks": ["held_out"]}, "rows": [{**SUMS, "held_out": 0}, {**SUMS, "answer": "none"}]},
            "evaluate.tasks: held_out needs checkable rows, but rows.answer is none. Remove held_out.",
        ),
        (
            {"prune": {"blocks": 2, "calibration": {"rows": {**SUMS, "weight": 2}}}},
            "prune.calibration.rows.weight: has no use in a calibration corpus. Remove weight.",
        ),
        ({"arms": {}}, "arms: names no arm. Give at least one of sft, distilled, logits."),
        ({"evaluate": {"tasks": ["piqa", "piqa"]}}, "evaluate.tasks: has a name twice. Remove one."),
        (
            {"evaluate": {"tasks": ["held_out"]}, "rows": {"gym": "chain_sum", "limit": 10, "held_out": 0}},
            "evaluate.tasks: names held_out, but rows.held_out is 0. Raise rows.held_out.",
        ),
        (
            {"evaluate": {"tasks": ["held_out"]}, "rows": {"gym": "chain_sum", "limit": 10, "answer": "none"}},
            "evaluate.tasks: held_out needs checkable rows, but rows.answer is none. Remove held_out.",
        ),
        (
            {"evaluate": {"tasks": ["held_out"], "pass_at": {"k": [1, 20]}}},
            "evaluate.pass_at.k: 20 is more than the 10 samples. Raise evaluate.pass_at.samples.",
        ),
        (
            {"evaluate": {"tasks": ["held_out"], "pass_at": {"k": [0]}}},
            "evaluate.pass_at.k.0: got 0; expected greater than 0. Change this value.",
        ),
        ({"draft": {"tokens": [0]}}, "draft.tokens.0: got 0; expected greater than 0. Change this value."),
        (
            {"evaluate": {"tasks": ["held_out"], "pass_at": {"temperature": 0.0}}},
            "evaluate.pass_at.temperature: got 0.0; expected greater than 0. Change this value.",
        ),
        (
            {"evaluate": {"tasks": ["piqa"], "pass_at": {}}, "rows": {**SUMS, "answer": "none"}},
            "evaluate.pass_at: needs held-out rows with checkable answers. Remove evaluate.pass_at.",
        ),
        (
            {"evaluate": {"tasks": ["piqa"], "pass_at": {}}},
            "evaluate.pass_at: belongs to held_out, which is no task. Add held_out to evaluate.tasks.",
        ),
        (
            {"distill": {"template": "Say {prompt}"}},
            "distill.template: lacks {prompt} or {reference}. Write both.",
        ),
        (
            {"distill": {"template_options": {"tokenize": False}}},
            "distill.template_options: tokenize is set by sdft. Remove it.",
        ),
        ({"distill": {"filters": {"leaks": False}}}, "distill.filters.leaks: unknown key. Did you mean leak?"),
        (
            {"distill": {"filters": {"leak": False, "leak_phrases": ["given text"]}}},
            "distill.filters: leak_phrases do nothing where leak is false. Set leak: true.",
        ),
        (
            {"rows": {"gym": "chain_sum", "limit": 10, "filters": {"leaks": False}}},
            "rows.filters.leaks: unknown key. Did you mean leak?",
        ),
        (
            {"rows": {"gym": "chain_sum", "limit": 10, "decontaminate": ["sciq", "sciq"]}},
            "rows.decontaminate: has a name twice. Remove one.",
        ),
        (
            {"evaluate": {"tasks": ["held_out"], "pass_at": {"k": [5, 5]}}},
            "evaluate.pass_at.k: has a name twice. Remove one.",
        ),
        (
            {"prune": {"blocks": 1, "calibration": {"rows": "own", "field": "body"}}},
            "prune.calibration: gives both field and rows. Keep one.",
        ),
        (
            {"rows": PLAIN, "evaluate": {"tasks": ["sciq"]}},
            "arms.distilled: no row is rewritten, for all are plain. Set arms: {sft: {}}.",
        ),
        (
            {"rows": PLAIN, "evaluate": {"tasks": ["sciq"]}, "arms": {"sft": {}}, "draft": {"prompts": 1}},
            "draft.prompts: 1 is more than the 0 held-out rows with prompts. Lower draft.prompts.",
        ),
        (
            {"train": {"keep": "best"}, "merge": {"linear": {}, "others": {"b": {"rows": {**SUMS, "validation": 0}}}}},
            "train.keep: needs validation rows, but merge.others.b.rows.validation is 0. "
            "Raise merge.others.b.rows.validation.",
        ),
        (
            {"rows": {"gym": "chain_sum", "limit": 10, "answer": "letter"}},
            "rows.answer: got \"letter\"; expected 'number', 'math', 'choice' or 'none'. Change this value.",
        ),
    ],
)
def test_recipe_with_one_mistake_is_one_clear_line(tmp_path, changes, line):
    assert complaint(load, tmp_path, changes) == line


@pytest.mark.parametrize("section", ["model", "rows", "prune", "evaluate"])
def test_recipe_without_a_section_names_it(tmp_path, section):
    assert complaint(load, tmp_path, without=section) == f"{section}: is missing. Add it."


def test_recipe_with_several_mistakes_reports_all_at_once(tmp_path):
    changes = {
        "model": {"repo": "a/b", "revision": "main"},
        "rows": {"path": "x.jsonl", "fields": {"prompt": "q", "respons": "a"}},
        "distill": {"top_p": 2},
        "train": {"epochs": "3", "lora": {"rnk": 4}},
        "foo": 1,
    }
    with pytest.raises(UserError) as error:
        load(tmp_path, changes, without="prune")
    assert sorted(error.value.problems) == [
        "distill.top_p: got 2; expected less than or equal to 1. Change this value.",
        "foo: unknown key. Known: arms, distill, draft, evaluate, export, merge, model, prune, rows, train.",
        "model.revision: 'main' moves. Pin a commit: git ls-remote https://huggingface.co/REPO.",
        "prune: is missing. Add it.",
        "rows.fields.respons: unknown key. Did you mean response?",
        'train.epochs: got "3"; expected a whole number. Change this value.',
        "train.lora.rnk: unknown key. Did you mean rank?",
    ]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("train:\n  lr: 0.1\n  epochs: 1\n  lr: 0.2\n", 4, "key lr occurs twice"),
        ("prune: {blocks: 2, blocks: 3}\n", 1, "key blocks occurs twice"),
        ("prune:\n  blocks: 2\nprune:\n  blocks: 3\n", 3, "key prune occurs twice"),
        ("prune:\n\tblocks: 2\n", 2, "cannot start any token"),
        ("train:\n  seed: !!bool maybe\n", 2, "'maybe' is no bool"),
        ("train:\n  lr: !!float ''\n", 2, "'' is no float"),
        ("train: !!map [1]\n", 1, "expected a mapping node"),
        ("train:\n  seed: !!timestamp soon\n", 2, "timestamp"),
        ("train: 1\n!!timestamp 2001-01-01: 2\n", 2, "timestamp"),
        (f"train: {{seed: {'1' * 5000}}}\n", 1, "a number is too large"),
    ],
)
def test_recipe_that_is_not_valid_yaml_names_the_line(tmp_path, text, line, what):
    with pytest.raises(UserError) as error:
        load_text(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'recipe.yaml'}:{line}: not valid YAML (")
    assert what in str(error.value)
    assert len(error.value.problems) == 1


def test_recipe_with_a_list_for_a_key_is_a_user_error(tmp_path):
    with pytest.raises(UserError):
        load_text(tmp_path, "? [a, b]\n: 3\n")


@pytest.mark.parametrize("text", ["", "- 1\n", "just words\n"])
def test_recipe_that_is_no_mapping_is_one_clear_line(tmp_path, text):
    with pytest.raises(UserError) as error:
        load_text(tmp_path, text)
    path = tmp_path / "recipe.yaml"
    assert str(error.value) == f"{path}: is not a mapping of keys to values. See configs/ for examples."


def test_recipe_file_that_cannot_be_read_is_one_clear_line(tmp_path):
    assert (
        complaint(load_recipe, tmp_path / "none.yaml")
        == f"{tmp_path / 'none.yaml'}: cannot be read (No such file or directory). Check the path."
    )
    (tmp_path / "latin.yaml").write_bytes("model: {path: Modèle}".encode("latin-1"))
    assert (
        complaint(load_recipe, tmp_path / "latin.yaml")
        == f"{tmp_path / 'latin.yaml'}: is not UTF-8 text. Give a YAML file."
    )


@pytest.mark.parametrize(
    ("written", "number"),
    [
        *[("1e-4", 1e-4), ("2E-4", 2e-4), ("1.0e-4", 1e-4), ("5e+0", 5.0), ("+.5e-1", 0.05), ("0.1", 0.1), ("1", 1.0)],
        *[("010", 10.0), ("0o10", 8.0), ("0x10", 16.0), ("5.", 5.0), ("+.5", 0.5)],
    ],
)
def test_recipe_number_is_read_however_it_is_written(tmp_path, written, number):
    lr = load_text(tmp_path, yaml.safe_dump(GOOD) + f"train: {{lr: {written}}}\n").train.lr
    assert (lr, type(lr)) == (number, float)


@pytest.mark.parametrize("written", ["yes", "no", "on", "off", "y", "=", "<<", "1:30", "1_000", "2024-01-02", "0b11"])
def test_recipe_word_that_yaml_1_1_reads_as_something_else_is_text(tmp_path, written):
    text = yaml.safe_dump({**GOOD, "rows": {**HUB_ROWS, "subset": "SUBSET"}}).replace("SUBSET", written)
    recipe = load_text(tmp_path, text)
    assert recipe.rows[0].subset == written
    with pytest.raises(UserError, match=r"^train\.epochs: got "):
        load_text(tmp_path, f"{text}train: {{epochs: {written}}}\n")
    assert load_text(tmp_path, dump_yaml(read_yaml(tmp_path / "recipe.yaml") | {"train": {}})) == recipe


@pytest.mark.parametrize("written", ["1e-4", "0o10", "+.5", "yes", "null", "0x1F", ".inf", "a: b", "#", "é", ""])
def test_dumped_text_is_read_as_the_same_text(tmp_path, written):
    (tmp_path / "data.yaml").write_text(dump_yaml({"text": written}), encoding="utf-8")
    assert read_yaml(tmp_path / "data.yaml") == {"text": written}


@pytest.mark.parametrize("written", ["9223372036854775808", '"\\ud800"'])
def test_recipe_value_that_json_cannot_hold_names_the_line(tmp_path, written):
    with pytest.raises(UserError) as error:
        load_text(tmp_path, yaml.safe_dump(GOOD) + f"train:\n  lr: 1\n  seed: {written}\n")
    line = yaml.safe_dump(GOOD).count("\n") + 3
    assert str(error.value).startswith(f"{tmp_path / 'recipe.yaml'}:{line}: not valid YAML (")


def test_sweep_given_as_a_recipe_is_one_clear_line(tmp_path):
    assert (
        complaint(load_text, tmp_path, "recipe: x.yaml\naxes: {train.lr: [1]}\n")
        == f"{tmp_path / 'recipe.yaml'}: is a sweep, not a recipe. Give a recipe."
    )


@pytest.mark.parametrize(
    ("load", "text", "line"),
    [
        (load_recipe, "ray: {address: auto}\ntrain: {workers: 2}\n", "is a compute file, not a recipe. Give a recipe."),
        (load_compute, yaml.safe_dump(GOOD), "is a recipe, not a compute file. Give a compute file."),
        (
            load_compute,
            "recipe: x.yaml\naxes: {train.lr: [1]}\n",
            "is a sweep, not a compute file. Give a compute file.",
        ),
        (
            load_compute,
            "ray: {}\nmodel: {}\n",
            "unknown key. Known: distill, evaluate, ray, score, throughput, track, train.",
        ),
    ],
)
def test_file_of_another_kind_is_one_line_and_not_one_for_each_key(tmp_path, load, text, line):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load(tmp_path / "a.yaml")
    where = "compute.model" if "unknown" in line else tmp_path / "a.yaml"
    assert str(error.value) == f"{where}: {line}"


@pytest.mark.parametrize("written", [".nan", ".inf", "-.inf"])
def test_recipe_number_that_is_not_finite_is_refused(tmp_path, written):
    with pytest.raises(UserError) as error:
        load_text(tmp_path, yaml.safe_dump(GOOD) + f"train: {{lr: {written}}}\n")
    assert error.value.problems[0].startswith("train.lr: ")


def test_set_overrides_are_typed_and_the_last_one_wins(tmp_path):
    overrides = (
        "train.lr=2e-4",
        "train.epochs=2",
        "train.epochs=3",
        "evaluate.tasks=[piqa, sciq]",
        "evaluate.chat_template=true",
        "train.lora.targets=[q_proj]",
        "train.rows=null",
    )
    recipe = load(tmp_path, {"train": {"lr": 1e-5, "rows": 4}}, overrides)
    assert (recipe.train.lr, recipe.train.epochs, recipe.train.rows) == (2e-4, 3, None)
    assert recipe.evaluate.tasks == ("piqa", "sciq")
    assert recipe.evaluate.chat_template is True
    assert recipe.train.lora.targets == ("q_proj",)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.lrr=3", "train.lrr: unknown key. Did you mean lr?"),
        ("trian.lr=3", "trian: unknown key. Did you mean train?"),
        ("train.lr=abc", 'train.lr: got "abc"; expected a number. Change this value.'),
        ("train.epochs='3'", 'train.epochs: got "3"; expected a whole number. Change this value.'),
        ("rows.0.weight=2", "rows.0: 0 is a place in a list, and this is none. Leave out 0."),
        ("train.lr", "--set train.lr: is not KEY=VALUE. Write for example --set train.lr=2e-4."),
        ("=3", "--set =3: is not KEY=VALUE. Write for example --set train.lr=2e-4."),
        ("train..lr=3", "--set train..lr=3: is not KEY=VALUE. Write for example --set train.lr=2e-4."),
        (".train=3", "--set .train=3: is not KEY=VALUE. Write for example --set train.lr=2e-4."),
        ("train.lr.=3", "--set train.lr.=3: is not KEY=VALUE. Write for example --set train.lr=2e-4."),
        ("0=3", "0: unknown key. Known: arms, distill, draft, evaluate, export, merge, model, prune, rows, train."),
        ("model.path.x=3", "--set model.path.x: path has no keys below it. Check the dotted path."),
    ],
)
def test_set_override_that_is_wrong_is_one_clear_line(tmp_path, override, line):
    assert complaint(load, tmp_path, overrides=(override,)) == line


def test_recipe_is_frozen(tmp_path):
    recipe = load(tmp_path)
    with pytest.raises(pydantic.ValidationError):
        recipe.train.lr = 1.0
    with pytest.raises(pydantic.ValidationError):
        recipe.prune = None


def test_recipe_round_trips_through_its_own_plain_form(tmp_path):
    recipe = load(tmp_path, {"rows": HUB_ROWS, "arms": {"sft": {"lr": 0.1}}})
    assert load_text(tmp_path, yaml.safe_dump(recipe.model_dump(mode="json"))) == recipe


def test_train_settings_of_an_arm_are_the_common_ones_with_its_overrides(tmp_path):
    changes = {
        "train": {"lr": 1e-3, "epochs": 2, "lora": {"rank": 4, "alpha": 8}},
        "arms": {"sft": {}, "distilled": {"lr": 5e-5, "lora": {"rank": 16}}},
    }
    recipe = load(tmp_path, changes)
    assert recipe.train_settings("sft") == recipe.train
    distilled = recipe.train_settings("distilled")
    assert (distilled.lr, distilled.epochs, distilled.lora.rank) == (5e-5, 2, 16)
    assert recipe.train.lr == 1e-3


@pytest.mark.parametrize(
    ("arms", "names"),
    [
        ({"sft": {}}, ("sft",)),
        ({"distilled": {}}, ("distilled",)),
        ({"distilled": {}, "sft": {}}, ("sft", "distilled")),
    ],
)
def test_arms_are_the_named_ones_the_baseline_first(tmp_path, arms, names):
    assert load(tmp_path, {"arms": arms}).arms.names == names


def test_arms_may_not_change_the_rows(tmp_path):
    assert complaint(load, tmp_path, {"arms": {"sft": {"rows": 3}}}).startswith("arms.sft.rows: unknown key. ")


@pytest.mark.parametrize(
    ("depth", "first", "last", "line"),
    [
        (4, 0, 0, "prune.blocks: 4 removes every block of a 4-block model. Give 1 to 3."),
        (3, 1, 1, "prune.protect: leaves 2 of 4 blocks to remove 3 from. Lower prune.protect."),
    ],
)
def test_require_depth_of_more_blocks_than_there_are_says_so(depth, first, last, line):
    assert complaint(require_depth, depth, Protect(first=first, last=last), 4) == line


def test_overrides_reach_into_a_list_of_sources(tmp_path):
    recipe = load(tmp_path, {"rows": [{**SUMS}, {**SUMS}]}, ["rows.0.weight=2", "rows.1.weight=0.5", "rows.1.limit=12"])
    assert [(source.weight, source.limit) for source in recipe.rows] == [(2, 10), (0.5, 12)]
    for override, says in (
        ("rows.2.weight=1", "2 is no place in a list of 2. Give a number from 0 to 1."),
        ("rows.weight=1", "weight is no place in a list of 2. Give a number from 0 to 1."),
        ("rows.0.limit.most=1", "limit has no keys below it. Check the dotted path."),
    ):
        assert (
            complaint(load, tmp_path, {"rows": [{**SUMS}, {**SUMS}]}, [override])
            == f"--set {override.partition('=')[0]}: {says}"
        )


def test_set_override_that_a_later_one_undoes_is_refused(tmp_path):
    assert (
        complaint(load, tmp_path, overrides=("train.lr=1", "train={epochs: 2}"))
        == "--set train.lr: a later --set train undoes it. Give --set train first."
    )
    assert load(tmp_path, overrides=("train={epochs: 2}", " train.lr =1")).train.lr == 1
