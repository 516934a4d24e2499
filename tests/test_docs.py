"""What the documents point at is there: links, anchors, file names, the picture; YAML files parse, and the examples in
docstrings are true."""

import doctest
import importlib
import json
import re
import runpy
from pathlib import Path

import llms
import pytest
import yaml
from architectures import NOTES, VARIANTS, WHOLES, name_variant
from tiny import WRAPPERS

from sdft_ray import pipeline
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.wording import validate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").glob("*.md"))
FURNITURE = [
    *(ROOT / name for name in (".pre-commit-config.yaml", "CITATION.cff", "mkdocs.yml")),
    *sorted((ROOT / ".github").rglob("*.yml")),
]
WITH_EXAMPLES = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in sorted((ROOT / "sdft_ray").rglob("*.py"))
    if ">>>" in path.read_text()
]
OF_OTHERS = {"commandr.py"}  # files of dependencies that the documents name
FILE = re.compile(
    r"(?<![\w./{-])((?:[\w-]+/)*[\w-]+\.py\b|(?:configs|docs|tests|jobs|requirements|benchmarks|tools)/[\w./-]*\w)"
)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    return [link for link in found if not link.startswith(("http://", "https://"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_relative_links_point_at_files_and_headings(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link} points at nothing"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link} has no such heading"


def test_docs_links_of_the_site_stay_in_docs():
    for page in (ROOT / "docs").glob("*.md"):
        assert not [link for link in links(page) if link.startswith("..")], f"{page.name} links out of docs/"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_named_files_exist(page):
    for name in set(FILE.findall(page.read_text())) - OF_OTHERS:
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "sdft_ray")), f"{page.name} names {name}"


def test_docs_upgrade_surface_names_what_its_files_reach_into():
    page = (ROOT / "docs" / "footguns.md").read_text().partition("## Upgrade surface")[2]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 30
    for _, reached, files, _ in rows:
        code = "".join((ROOT / "sdft_ray" / name).read_text() for name in FILE.findall(files))
        for name in re.findall(r"`([^`]+)`", reached):
            words = re.findall(r"\w{4,}", name.partition("(")[0])
            assert not words or words[-1] in code, f"{files}: {name} is not there"


def test_page_of_architectures_has_the_rows_and_words_of_its_generator():
    page = (ROOT / "docs" / "architectures.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row != "architecture"] == [*(name_variant(*row) for row in VARIANTS), *WRAPPERS]
    assert NOTES in page and WHOLES in page


def test_design_names_every_stage():
    table = (ROOT / "docs" / "design.md").read_text().partition("| stage | what it does |")[2].partition("\n\n")[0]
    named = {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split(" | ")[0])}
    assert named == pipeline.MODULES.keys()


def test_readme_recipe_is_one_that_the_schema_accepts():
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert validate(Recipe, yaml.safe_load(text)).prune.blocks == 4


def test_docs_site_has_every_page_and_no_other():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)
    named = {page for entry in site["nav"] for page in entry.values()}
    assert named == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_docs_of_the_site_have_a_sentence_each_in_llms_txt():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)
    assert site["hooks"] == ["tools/llms.py"]
    lines = llms.render("sdft_ray", "What it is", site["nav"], ROOT / "docs").splitlines()
    assert lines[:3] == ["# sdft_ray", "", "> What it is"]
    pages = [re.fullmatch(r"- \[.+\]\((.+\.md)\): .{20,}\.", line) for line in lines[6:]]
    assert all(pages) and {page[1] for page in pages} == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_docs_picture_and_table_are_of_the_committed_figures():
    figures = json.loads((ROOT / "docs" / "figures" / "demo.json").read_text())
    picture = (ROOT / "docs" / "figures" / "demo.svg").read_text()
    draw = runpy.run_path(str(ROOT / "tools" / "picture.py"))["draw"]
    assert picture == draw(figures), "Do: python tools/picture.py"
    for model in figures["models"]:
        (line,) = re.findall(rf"^{model['model']}  .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
        values = [f"{100 * task['value']:.1f} ±{100 * task['stderr']:.1f}" for task in model["tasks"].values()]
        for value in (*values, f"{100 * model['mean']:.1f}", f"{model['recovery']:.1f}"):
            assert value in line


@pytest.mark.parametrize("file", FURNITURE, ids=lambda file: file.name)
def test_furniture_is_yaml_with_what_it_must_have(file):
    content = yaml.load(file.read_text(), yaml.BaseLoader)
    required = {
        "ci.yml": {"on", "jobs"},
        "CITATION.cff": {"cff-version", "message", "title", "authors"},
        ".pre-commit-config.yaml": {"repos"},
        "mkdocs.yml": {"site_name", "nav"},
        "bug.yml": {"name", "description", "body"},
        "feature.yml": {"name", "description", "body"},
        "config.yml": {"blank_issues_enabled"},
    }
    assert required[file.name] <= content.keys()


def test_workflow_runs_what_is_there():
    jobs = yaml.load((ROOT / ".github/workflows/ci.yml").read_text(), yaml.BaseLoader)["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run", "make docs"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert re.search(r"^docs:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings_are_true(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted and not found.failed
