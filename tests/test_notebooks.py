"""Every notebook runs from top to bottom in a copy, and is committed as it ran.     python -m pytest tests/test_notebooks.py"""

import base64
import re

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_runs(path, executed):
    executed[path].result()


def findings(path) -> list[str]:
    """What a committed notebook must not be."""
    notebook, found = nbformat.read(path, 4), []
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("was not run from top to bottom")
    first = "".join(output.get("text", "") for output in code[0].outputs)
    if not re.search(r"torch \d.*seed \d.*(synthetic|data: \S)", first, re.DOTALL):
        found.append("its first cell prints no versions, no seed or not whose data")
    for number, cell in enumerate(code, start=1):
        texts = [cell.source]
        for output in cell.outputs:
            data = output.get("data", {})
            texts += [
                output.get("text", ""),
                str(data.get("text/plain", "")),
                str(data.get("text/html", "")),
            ]
            found += [f"cell {number}: {output.output_type} output"] * (
                output.output_type == "error" or output.get("name") == "stderr"
            )
            found += [f"cell {number}: a widget"] * any("widget" in kind for kind in data)
            found += [f"cell {number}: a picture above 150 KB"] * (
                len(base64.b64decode(data.get("image/png", ""))) > 150_000
            )
        found += [f"cell {number}: {len(cell.source.splitlines())} lines"] * (
            len(cell.source.splitlines()) > 15
        )
        found += [f"cell {number}: a class"] * bool(
            re.search(r"^\s*class\s", cell.source, re.MULTILINE)
        )
        found += [f"cell {number}: an absolute path"] * bool(
            re.search(
                r"(?<![\w.)}])/(home|root|tmp|Users|mnt|opt|usr|var|work)/|\b[A-Z]:\\",
                "\n".join(texts),
            )
        )
    if path.stem < "07" and not (
        "## Questions" in notebook.cells[-1].source
        and any("assert " in cell.source for cell in code)
    ):
        found.append("a teaching notebook proves something and ends in questions")
    return found


@every_notebook
def test_is_committed_as_it_ran(path):
    assert path.stat().st_size < 500_000 and findings(path) == []


def test_findings_are_found(tmp_path):
    """The check itself: a notebook with every fault."""
    v4 = nbformat.v4
    cells = [
        v4.new_code_cell(
            "class A:\n    pass" + "\nx = 1" * 20,
            outputs=[v4.new_output("stream", name="stderr", text="/home/somebody/x.py: oh")],
        ),
        v4.new_code_cell(
            "1 / 0",
            execution_count=7,
            outputs=[
                v4.new_output("error", ename="E", evalue="", traceback=[]),
                v4.new_output(
                    "display_data",
                    {
                        "image/png": base64.b64encode(bytes(200_000)).decode(),
                        "application/vnd.jupyter.widget-view+json": {},
                    },
                ),
            ],
        ),
    ]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "00.ipynb")
    found = " | ".join(findings(tmp_path / "00.ipynb"))
    for fault in (
        "top to bottom",
        "no versions",
        "stream output",
        "22 lines",
        "a class",
        "absolute path",
        "error output",
        "widget",
        "150 KB",
        "questions",
    ):
        assert fault in found, found
