"""The notebook runs from its first cell to its last, and shows what it says."""

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / 'examples' / 'digits.ipynb'


def outputs(notebook):
    """What the cells show, by kind."""
    shown = [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]
    return [output.data for output in shown if 'data' in output]


def test_the_notebook_in_the_repository_has_no_outputs():
    """Those of a machine would be in every change of it."""
    notebook = pytest.importorskip('nbformat').read(NOTEBOOK, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert len(code) == 5
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """As it is, in a kernel of its own; the table has both methods, and both have learnt."""
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}
    ).execute()
    (table,) = (data['text/markdown'] for data in outputs(notebook) if 'text/markdown' in data)
    head, _, accuracy, *rows = ([cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines())
    assert head[1:] == ['MixUp', 'MixUp and SynerMix']
    assert all(float(value) > 80 for value in accuracy[1:])
    assert len(rows) == 7
    assert any('image/png' in data for data in outputs(notebook))
    assert not list(tmp_path.iterdir())
