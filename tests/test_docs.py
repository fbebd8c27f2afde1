"""The documentation says what the code does: its blocks run, its tables and its map are the code's,
its links lead somewhere."""

import ast
import contextlib
import doctest
import inspect
import io
import re
import sys
import tomllib
from pathlib import Path
from unittest import mock

import attrs
import pytest

import megafn as mf
from hugging_face_models import write_corpus, write_directory
from megafn.pure.families.built_in import BUILT_IN_SPECS
from megafn.pure.pretrained.architectures import _NOT_BUILT, ARCHITECTURES, architecture_of
from megafn.pure.validation.rules import CHOICES
from pool import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def python_of(page):
    """The Python blocks of a page as one script whose line numbers are the page's."""
    lines = []
    inside = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- blocks


def run_page(name, *arguments):
    """Runs a page's blocks as a script with these arguments; what it printed."""
    page = DOCS / name
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [name, *arguments]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        exec(compile(python_of(page), page, "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def test_the_tutorial_runs_as_it_stands(pool):
    printed, *others = pool(4, run_page, "tutorial.md")
    iterations = re.findall(r"^ *(\d+)  loss \d", printed, re.M)
    assert iterations == [str(i) for i in range(1, 9)]
    assert others == [""] * 3


def test_the_finetuning_page_runs_as_it_stands(pool, tmp_path):
    corpus = tmp_path / "corpus.txt"
    write_corpus(corpus)
    write_directory("gpt2", tmp_path / "source", corpus)
    arguments = map(str, (tmp_path / "source", corpus, tmp_path / "out"))
    printed, *others = pool(4, run_page, "finetuning.md", *arguments)
    assert printed and others == [""] * 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "trained",
        "adapters",
        "adapted",
    }


def run_command(folder, arguments):
    """Runs one command of megafn in a folder; its exit code, and what it printed."""
    from megafn.__main__ import main

    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        code = main(arguments)
    return code, printed.getvalue()


def blocks_of(page):
    """(language, line number, text) of each fenced block of a page."""
    text = (DOCS / page).read_text()
    return [
        (match[1], text.count("\n", 0, match.start()) + 1, match[2])
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    ]


def same_text(shown, printed, tolerance):
    """Whether words are equal, and numbers within this share of one another."""
    number = r"\d[\d,]*(?:\.\d+)?"
    if re.sub(r" +", " ", re.sub(number, "#", shown)) != re.sub(
        r" +", " ", re.sub(number, "#", printed)
    ):
        return False
    pairs = zip(re.findall(number, shown), re.findall(number, printed), strict=True)
    return all(
        float(a.replace(",", "")) == pytest.approx(float(b.replace(",", "")), rel=tolerance)
        for a, b in pairs
    )


def test_the_planning_page_prints_what_it_shows(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    printed = ""
    on_four = r"OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m megafn (.+)"
    on_eight_nodes = r"torchrun --nnodes 8 --nproc-per-node 8 .* -m megafn train (.+)"
    for language, line, text in blocks_of("planning.md"):
        if language == "python":
            code = compile("\n" * line + text, "planning.md", "exec")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, names)
            printed = output.getvalue()
        elif language == "text":
            # A loss depends a little on the processor; what is computed or counted does not.
            tolerance = 0.05 if "loss" in text else 0
            assert same_text(text, printed, tolerance), f"line {line}: printed was\n{printed}"
        for command in text.splitlines() if language == "sh" else ():
            if match := re.fullmatch(on_four, command):
                codes = {code for code, _ in pool(4, run_command, tmp_path, match[1].split())}
                assert codes == {0}
            elif match := re.fullmatch(on_eight_nodes, command):
                assert mf.validate(mf.load_config(match[1]), world_size=64) == ()
            else:
                python, *arguments = command.split()
                assert (python, arguments[:2]) == ("python", ["-m", "megafn"])
                code, printed = run_command(tmp_path, arguments[2:])
                assert code == 0 and printed
    assert mf.load_config("best.toml") == names["ready"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"plan.png", "memory.png"}
    assert "matrix products" in printed
    assert names["records"][-1]["loss"] < names["records"][0]["loss"] - 0.5


@pytest.mark.parametrize(
    "page", [page for page in PAGES if ">>>" in page.read_text()], ids=lambda page: page.name
)
def test_examples_of_a_page_print_what_it_says(page):
    result = doctest.testfile(
        str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE, encoding="utf-8"
    )
    assert result.attempted > 0 and result.failed == 0


def sections(page):
    """{heading: the text below it} of a page."""
    parts = re.split(r"^#+ (.+)\n", (DOCS / page).read_text(), flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("heading", list(sections("extending.md"))[1:])
def test_excerpts_of_the_extending_page_are_those_of_the_script_that_it_links(heading):
    text = sections("extending.md")[heading]
    (script,) = set(re.findall(r"\]\((scripts/\w+\.py)\)", text))
    excerpts = re.findall(r"```python\n(.+?)```", text, re.S)
    assert excerpts
    for excerpt in excerpts:
        assert excerpt in (DOCS / script).read_text()


def test_the_readme_shows_the_quickstart_as_it_is():
    script = (DOCS / "scripts" / "quickstart.py").read_text().split('"""')[2].strip()
    assert script in (ROOT / "README.md").read_text()


def test_the_readmes_toml_is_a_config_that_runs():
    (block,) = re.findall(r"```toml\n(.+?)```", (ROOT / "README.md").read_text(), re.S)
    assert mf.validate(mf.from_dict(tomllib.loads(block)), world_size=4) == ()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_index_names_every_page_and_script():
    index = (DOCS / "README.md").read_text()
    pages = {page.name for page in PAGES} - {"README.md"} | {
        f"scripts/{script.name}" for script in (DOCS / "scripts").glob("*.py")
    }
    assert pages == set(re.findall(r"\]\(([\w/-]+\.(?:md|py))\)", index))


# ------------------------------------------------------------------------------------------- tables


def tables(page):
    """{heading: [cells of each row]} of a page; the head of each table is left out."""
    rows = {}
    heading = ""
    for line in (DOCS / page).read_text().splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.setdefault(heading, []).append(cells)
    return {heading: table[2:] for heading, table in rows.items()}


def shown(attribute):
    if attribute.default is attrs.NOTHING:
        return "required"
    if isinstance(attribute.default, attrs.Factory):
        return "computed"
    return "defaults" if attrs.has(type(attribute.default)) else f"`{attribute.default!r}`"


CONFIGS = {
    name: getattr(mf, name)
    for name in mf.__all__
    if name.endswith("Config") or name in ("Machine", "RopeScaling")
}


def test_the_configuration_page_has_every_config():
    assert set(tables("configuration.md")) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_page_has_every_field_with_its_default(name):
    rows = tables("configuration.md")[name]
    assert [row[:2] for row in rows] == [
        [f"`{a.name}`", shown(a)] for a in attrs.fields(CONFIGS[name])
    ]
    assert all(len(row) == 4 and row[3] for row in rows)


def test_the_configuration_page_names_every_choice():
    rows = {
        a.name: row
        for a, row in zip(
            attrs.fields(mf.TrainConfig), tables("configuration.md")["TrainConfig"], strict=True
        )
    }
    sections = {
        name: tables("configuration.md")[row[2].strip("`")]
        for name, row in rows.items()
        if row[2].strip("`") in CONFIGS
    }
    for path, choices in (CHOICES | {"model.family": tuple(BUILT_IN_SPECS)}).items():
        *section, field = path.split(".")
        meaning = next(
            row[3]
            for row in (sections[section[0]] if section else rows.values())
            if row[0] == f"`{field}`"
        )
        assert [choice for choice in choices if f"`{choice}`" not in meaning] == [], path


def test_the_finetuning_page_has_every_architecture():
    rows = tables("finetuning.md")["Supported architectures"]
    assert [(row[0].strip("`"), row[1].strip("`")) for row in rows] == [
        (architecture.name, architecture.model_type) for architecture in ARCHITECTURES.values()
    ]
    assert all(row[2] for row in rows)


def test_what_the_finetuning_page_says_is_refused_is_refused():
    refused = [
        name.strip("`")
        for cells, why in tables("finetuning.md")["What is refused"]
        for name in cells.split(", ")
        if why
    ]
    assert sorted(refused) == sorted(_NOT_BUILT)
    for model_type in refused:
        with pytest.raises(mf.ConfigError, match=f"model_type = '{model_type}'"):
            architecture_of({"model_type": model_type})


def imports():
    """Modules of megatron.core that megafn's code imports, or imports from."""
    names = set()
    for path in (ROOT / "megafn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
                # `from megatron.core import parallel_state` imports a module, not a name
                below = (
                    [f"{node.module}.{alias.name}" for alias in node.names]
                    if node.module == "megatron.core"
                    else [node.module]
                )
                if node.module == "megatron.core.tensor_parallel" and [
                    alias.name for alias in node.names
                ] == ["random"]:
                    below = ["megatron.core.tensor_parallel.random"]
                names.update(below)
            elif isinstance(node, ast.Import):
                names.update(
                    alias.name for alias in node.names if alias.name.startswith("megatron")
                )
    return {name.removeprefix("megatron.core.") for name in names}


def test_the_megatron_core_page_names_every_module_that_is_imported_and_no_other():
    named = [row[0].strip("`") for row in tables("megatron-core.md")["What is used"]]
    assert named == sorted(named) and set(named) == imports()


def test_what_the_megatron_core_page_says_of_megafn_is_there():
    import importlib

    for *_, here, why in tables("megatron-core.md")["What is not used, and what is used instead"]:
        path = here.strip("`")
        try:
            importlib.import_module(path)
        except ModuleNotFoundError:
            module, _, name = path.rpartition(".")
            assert hasattr(importlib.import_module(module), name), path
        assert why


# ---------------------------------------------------------------------------------------------- map

PACKAGE = ROOT / "megafn"


def drawn_rooms():
    """{folder: its modules} in the tree of the architecture page; paths begin below megafn."""
    tree = re.search(r"```\n(megafn/.+?)```", (DOCS / "architecture.md").read_text(), re.S)[1]
    rooms = {}
    folders = []
    for line in tree.splitlines():
        indent, folder, modules = re.fullmatch(r"([│├└─ ]*)(\w+)/ *(.*)", line).groups()
        folders[len(indent) // 4 :] = [folder]
        rooms["/".join(folders[1:])] = set(modules.split()) - {"__init__"}
    return rooms


def real_rooms():
    """The same of the package itself."""
    rooms = {}
    for path in PACKAGE.rglob("*.py"):
        folder = path.parent.relative_to(PACKAGE).as_posix()
        rooms.setdefault("" if folder == "." else folder, set()).add(path.stem)
    return {folder: modules - {"__init__"} for folder, modules in rooms.items()}


def test_the_map_shows_every_folder_and_module_and_no_other():
    assert drawn_rooms() == real_rooms()


@pytest.mark.parametrize("folder", sorted(drawn_rooms()))
def test_the_map_has_a_paragraph_for_each_folder_that_names_its_modules(folder):
    modules = drawn_rooms()[folder]
    if modules:
        named = re.findall(r"`(\w+)`", sections("architecture.md")[folder or "megafn"])
        assert modules - set(named) == set()


def test_paths_in_the_architecture_page_exist():
    page = (DOCS / "architecture.md").read_text()
    paths = re.findall(r"`((?:pure|runtime)/[\w/]+(?:\.py)?)`", page)
    assert len(paths) > 20
    assert [path for path in paths if not (PACKAGE / path).exists()] == []


def test_imports_run_in_the_order_of_the_architecture_page():
    order = re.findall(
        r"^\d+\. `([\w/]+)`$", sections("architecture.md")["The order of imports"], re.M
    )
    rooms = {folder for folder, modules in real_rooms().items() if modules}
    assert set(order) == {folder for folder in rooms if folder not in ("", "commands", "demo")}
    for folder in order:
        for path in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("megafn."):
                    module = node.module.removeprefix("megafn.").replace(".", "/")
                    other = module if module in order else module.rpartition("/")[0]
                    assert order.index(other) <= order.index(folder), f"{path}: {node.module}"


# --------------------------------------------------------------------------------------- docstrings


# A constant such as MACHINES is a plain mapping, which has no docstring of its own.
@pytest.mark.parametrize("name", [name for name in mf.__all__ if not name.isupper()])
def test_a_public_name_says_in_its_first_line_what_it_does(name):
    value = getattr(mf, name)
    own = inspect.getdoc(value) if "__doc__" in vars(value) or inspect.isfunction(value) else None
    assert own and re.match(r"\S.{9,160}[.:;](\s|$)", own.splitlines()[0] + "\n"), (
        f"{name}: {own!r}"
    )


@pytest.mark.parametrize(
    "name", [name for name in mf.__all__ if inspect.isfunction(getattr(mf, name))]
)
def test_a_public_pure_function_has_an_executed_example(name):
    function = getattr(mf, name)
    if not function.__module__.startswith("megafn.pure"):
        pytest.skip("it runs something")
    assert ">>>" in function.__doc__


def test_nothing_public_is_undocumented():
    pages = "".join(
        page.read_text()
        for page in [*PAGES, ROOT / "README.md", *Path(DOCS / "scripts").glob("*.py")]
    )
    for name in (
        "train",
        "fit",
        "setup",
        "train_step",
        "evaluate",
        "batches",
        "init_groups",
        "build_groups",
        "validate",
        "make_schedule",
    ):
        assert re.search(rf"\b{name}\b", pages), name
