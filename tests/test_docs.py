"""What the pages say can be typed: every command is one that the command line takes, every file and name is there."""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from vdnn.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
COMMANDS = typer.main.get_command(app)


def commands(text: str) -> list[str]:
    """Lines of code blocks and spans in backticks that begin with `vdnn` and a word; a backslash joins lines."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^\s*(vdnn [a-z].*)$", text, re.M)
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`(vdnn [a-z][^`]*)`(?!`)", text)]
    return [found.split("  #")[0].strip() for found in (*lines, *spans)]


def refusal(command: str) -> str:
    """Why the command line does not take it; "" if it does. Nothing is run."""
    name, *arguments = shlex.split(command)[1:]
    known = COMMANDS.commands.get(name)  # type: ignore[attr-defined]
    if known is None:
        return f"no command {name}"
    if not arguments or "…" in command:
        return ""  # it is spoken of, not typed
    try:
        known.make_context(name, arguments)
    except Exception as error:  # the parser's own, or its request to show the help
        return str(error) or type(error).__name__
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_taken_as_it_is_written(page: Path) -> None:
    refused = {command: why for command in commands(page.read_text()) if (why := refusal(command))}
    spoken = {command: why for command, why in refused.items() if why.startswith("Missing")}  # `vdnn report RESULT`
    assert not refused.keys() - spoken.keys(), refused


def test_every_example_of_the_help_is_taken() -> None:
    helps = {name: command.help or "" for name, command in COMMANDS.commands.items()}  # type: ignore[attr-defined]
    for name, text in helps.items():
        examples = re.findall(r"Example: (vdnn .*)", text)
        assert examples, name
        assert not [why for example in examples if (why := refusal(example))], examples


def test_a_command_that_is_not_there_is_noticed() -> None:
    assert commands("```\nvdnn simulate x \\\n  --gpu t4  # why\n```\nand `vdnn list\ngpus`") == [
        "vdnn simulate x    --gpu t4",
        "vdnn list gpus",
    ]
    assert refusal("vdnn simulate x --gpu t4") == ""
    assert "--gup" in refusal("vdnn simulate x --gup t4")
    assert refusal("vdnn simluate x") == "no command simluate"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_name_of_a_page_is_there(page: Path) -> None:
    text = page.read_text()
    for file in set(re.findall(r"`((?:vdnn|tests|experiments|examples)/[\w/.]+\.\w+)`", text)):
        assert (ROOT / file).exists(), file
    for target in set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)):
        assert (page.parent / target).exists(), target
    for dotted in set(re.findall(r"\bvdnn(?:\.[A-Za-z_]+)+", text)):
        module, _, attribute = dotted.rpartition(".")
        found: object = None
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(dotted)
        assert found is not None or hasattr(importlib.import_module(module), attribute), dotted
