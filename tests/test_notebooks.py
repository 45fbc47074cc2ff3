"""Every notebook runs in a copy, and is committed as it ran: pytest tests/test_notebooks.py"""

import base64
import re

import nbformat
import pytest
from conftest import ROOT
from nbformat import v4

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE_PATH = r"(?<![\w.)}])/(home|root|tmp|Users|mnt|opt|usr|var|work)/|\b[A-Z]:\\"
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_runs(path, executed):
    executed[path].result()


def output_findings(output) -> list[str]:
    data = output.get("data", {})
    found = []
    if output.output_type == "error" or output.get("name") == "stderr":
        found.append(f"{output.output_type} output")
    if any("widget" in kind for kind in data):
        found.append("a widget")
    if len(base64.b64decode(data.get("image/png", ""))) > 150_000:
        found.append("a picture above 150 KB")
    return found


def cell_findings(cell) -> list[str]:
    found = []
    texts = [cell.source]
    for output in cell.outputs:
        found += output_findings(output)
        data = output.get("data", {})
        texts += [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
    lines = len(cell.source.splitlines())
    if lines > 15:
        found.append(f"{lines} lines")
    if re.search(r"^\s*class\s", cell.source, re.MULTILINE):
        found.append("a class")
    if re.search(ABSOLUTE_PATH, "\n".join(map(str, texts))):
        found.append("an absolute path")
    return found


def findings(path) -> list[str]:
    """What a committed notebook must not be."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("was not run from top to bottom")
    first = "".join(output.get("text", "") for output in code[0].outputs)
    if not re.search(r"torch \d.*seed \d.*(synthetic|data: \S)", first, re.DOTALL):
        found.append("its first cell prints no versions, no seed or not whose data")
    for number, cell in enumerate(code, start=1):
        found += [f"cell {number}: {finding}" for finding in cell_findings(cell)]
    if path.stem < "07":
        proves = any("assert " in cell.source for cell in code)
        if not proves or "## Questions" not in notebook.cells[-1].source:
            found.append("a teaching notebook proves something and ends in questions")
    return found


@every_notebook
def test_is_committed_as_it_ran(path):
    assert path.stat().st_size < 500_000
    assert findings(path) == []


def test_findings_are_found(tmp_path):
    """The check itself: a notebook with every fault."""
    picture = base64.b64encode(bytes(200_000)).decode()
    widget = "application/vnd.jupyter.widget-view+json"
    outputs = [
        v4.new_output("error", ename="E", evalue="", traceback=[]),
        v4.new_output("display_data", {"image/png": picture, widget: {}}),
        v4.new_output("stream", name="stderr", text="/home/somebody/x.py: oh"),
    ]
    source = "class A:\n    pass" + "\nx = 1" * 20
    cell = v4.new_code_cell(source, execution_count=7, outputs=outputs)
    nbformat.write(v4.new_notebook(cells=[cell]), tmp_path / "00.ipynb")
    assert findings(tmp_path / "00.ipynb") == [
        "was not run from top to bottom",
        "its first cell prints no versions, no seed or not whose data",
        "cell 1: error output",
        "cell 1: a widget",
        "cell 1: a picture above 150 KB",
        "cell 1: stream output",
        "cell 1: 22 lines",
        "cell 1: a class",
        "cell 1: an absolute path",
        "a teaching notebook proves something and ends in questions",
    ]
