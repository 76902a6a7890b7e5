"""In a notebook progress is a bar on standard output; standard error would be red blocks."""

import sys
import types

import pytest

from grpocem_jax.utils import progress, terminal


def ipython(config):
    """A stand-in for the module IPython, as a kernel or a shell on a terminal loads it."""
    shell = types.SimpleNamespace(config=config)
    return types.SimpleNamespace(get_ipython=lambda: shell)


@pytest.fixture(params=["kernel", "terminal", "none"])
def where(request, monkeypatch):
    if request.param == "none":
        monkeypatch.delitem(sys.modules, "IPython", raising=False)
    else:
        config = {"IPKernelApp": {}} if request.param == "kernel" else {"TerminalIPythonApp": {}}
        monkeypatch.setitem(sys.modules, "IPython", ipython(config))
    return request.param


def test_progress_is_a_bar_in_a_notebook_and_lines_in_a_file(where, capsys):
    shown = progress.Progress(2)
    shown.update(1, reward="0.5")
    shown.write("step 1")
    shown.update(2, reward="0.75")
    shown.close()
    terminal.say("held-out reward", sys.stderr)
    out, err = capsys.readouterr()
    if where == "kernel":
        assert err == ""
        assert "2/2 [" in out
        assert "reward=0.75" in out
        assert "step 1\n" in out
        assert out.endswith("held-out reward\n")
    else:
        assert out == ""
        assert "step 2/2  reward 0.75" in err
        assert "2/2 [" not in err


def test_the_bar_is_the_one_that_notebooks_draw():
    import tqdm.auto

    assert progress.tqdm is tqdm.auto.tqdm
