"""What processes tell each other, with threads in their place and a table between them."""

import os
import signal
import time

import jax
import numpy as np
import pytest

from grpocem_jax.runs.rundir import Interrupted
from grpocem_jax.utils import memory
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.processes import ALONE, HEAD, Processes, ProcessLostError, lost, shielded
from tests.runs import OUT_OF_MEMORY
from tests.threads import together


@pytest.mark.parametrize(("total", "count"), [(8, 4), (5, 4), (9, 4), (1, 3), (2, 3), (7, 1)])
def test_every_row_is_done_once_and_all_processes_have_as_many(total, count):
    def work(processes):
        asked.append(processes.rows(total).tolist())
        own = processes.own(total)
        exact[processes.index] = list(own)
        return processes.divided(total, lambda rows: {"x": 10 * rows, "y": [str(x) for x in rows]})

    asked, exact = [], {}
    for found in together(count, work):
        np.testing.assert_array_equal(found["x"], 10 * np.arange(total))
        assert found["y"] == [str(x) for x in range(total)]
    assert len({len(rows) for rows in asked}) == 1
    assert [row for index in range(count) for row in exact[index]] == list(range(total))


def test_what_the_others_have_no_use_for_stays_where_it_is():
    def work(processes):
        before = processes.traffic[1]
        found = processes.divided(
            5,
            lambda rows: {"x": 1 + rows, "y": [str(x) for x in rows], "z": np.ones((3, 10**6))},
            kept={"x", "y", "z"} - shared,
        )
        return found, processes.traffic[1] - before

    shared = {"y"}
    (first, received), (second, _) = together(2, work)
    np.testing.assert_array_equal(first["x"], [1, 2, 3, 0, 0])
    np.testing.assert_array_equal(second["x"], [0, 0, 0, 4, 5])
    assert first["z"].sum(-1).tolist() == [1e6, 1e6, 1e6, 0, 0]
    assert first["y"] == second["y"] == list("01234")
    assert received == 2 * HEAD
    shared = {"x", "z"}
    assert [found["y"] for found, _ in together(2, work)] == [
        ["0", "1", "2", None, None],
        [None, None, None, "3", "4"],
    ]


@pytest.mark.parametrize("sizes", [(0, 0, 0), (0, 5000, 1000), (960, 970, 980)])
def test_what_one_returns_all_know_with_its_arrays_texts_and_missing_numbers(sizes):
    def work(processes):
        mine = {"a": np.full((2, 3), processes.index, np.int32), "b": ["ü", None, float("nan")]}
        mine["long"] = "x" * sizes[processes.index]
        return processes.each(lambda: mine)

    for found in together(3, work):
        assert [each["a"].tolist() for each in found] == [[[i] * 3] * 2 for i in range(3)]
        assert found[2]["a"].dtype == np.int32
        assert found[1]["b"][:2] == ["ü", None]
        assert np.isnan(found[0]["b"][2])
        assert [len(each["long"]) for each in found] == list(sizes)


def test_a_sum_of_arrays_has_their_structure_and_is_the_same_everywhere():
    def work(processes):
        i = processes.index
        return processes.total(lambda: ({"a": np.full((2, 2), 10.0**i)}, np.float32(i)))

    for tree, number in together(3, work):
        np.testing.assert_array_equal(tree["a"], np.full((2, 2), 111.0))
        assert float(number) == 3.0
        assert number.dtype == np.float32


def test_each_side_divides_its_own_work_while_the_other_does_another():
    def work(processes):
        side = processes.side(2)
        rows = [side.index, side.count]
        if processes.index < 2:  # the sides exchange something another number of times
            rows += [int(side.total(lambda: np.float32(10.0**processes.index)))]
            rows += side.divided(4, lambda own: {"x": own})["x"].tolist()
        return rows, processes.each(lambda: rows[0])

    first, second, third = together(3, work)
    assert first == ([0, 2, 11, 0, 1, 2, 3], [0, 1, 0])
    assert second == ([1, 2, 11, 0, 1, 2, 3], [0, 1, 0])
    assert third == ([0, 1], [0, 1, 0])


def test_an_error_of_a_side_reaches_the_other_with_the_number_of_its_process():
    def work(processes):
        side = processes.side(1)

        def own():
            return side.each(lambda: 1 / (processes.index - 2) if processes.index else 0)

        return processes.each(own)

    found = together(3, work)
    assert str(found[1]) == "process 2: ZeroDivisionError: division by zero"
    assert isinstance(found[2], ZeroDivisionError)
    assert "process 2: ZeroDivisionError: division by zero" in str(found[0])


def test_process_0_goes_ahead_and_does_alone_what_is_its_own():
    order, alone = [], []

    def work(processes):
        made = processes.ahead(lambda: order.append(processes.index) or processes.index)
        return made, processes.first(lambda: alone.append(processes.index) or {"of": "process 0"})

    found = together(3, work)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]
    assert alone == [0]
    assert found == [(i, {"of": "process 0"}) for i in range(3)]


def raising(processes, errors):
    """Work in which some processes raise, and what becomes of it."""

    def own():
        if processes.index in errors:
            raise errors[processes.index]

    return processes.each(own)


def test_an_error_of_one_is_raised_by_all_and_its_own_by_the_one():
    mine = InputError("the reward function judge raised ValueError")
    found = together(3, lambda processes: raising(processes, {1: mine}))
    assert found[1] is mine
    for index in (0, 2):
        assert str(found[index]) == f"process 1: {mine}"
        assert isinstance(found[index], InputError)


def test_of_several_errors_the_first_process_s_counts_everywhere():
    errors = {1: InputError("a"), 2: ValueError("b")}
    found = together(3, lambda processes: raising(processes, errors))
    assert [str(each) for each in found] == ["process 1: a", "a", "process 1: a"]


def test_memory_that_runs_out_in_one_is_lowered_alike_in_all():
    def work(processes):
        chunk = memory.population_chunk(8, lower=True)

        def attempt(size):
            sizes[processes.index].append(size)
            errors = {1: jax.errors.JaxRuntimeError(OUT_OF_MEMORY)} if size > 2 else {}
            return raising(processes, errors) and size

        return chunk.run(attempt)

    sizes = [[], []]
    assert together(2, work) == [2, 2]
    assert sizes == [[8, 4, 2]] * 2


def test_a_signal_to_one_ends_all_with_its_status():
    found = together(2, lambda processes: raising(processes, {1: Interrupted(143)}))
    assert [each.code for each in found] == [143, 143]


def test_one_that_leaves_takes_the_others_along():
    def work(processes):
        with processes.together():
            if processes.index == 0:
                raise OSError(28, "No space left on device")
            processes.each(lambda: 1)

    own, other = together(2, work)
    assert isinstance(own, OSError)
    assert "process 0: OSError: [Errno 28] No space left on device" in str(other)


def test_an_error_that_all_have_is_not_told_again():
    def work(processes):
        with processes.together():
            raising(processes, {0: InputError("once")})

    assert [str(each) for each in together(2, work)] == ["once", "process 0: once"]


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("outcome", [7, InputError("of another")])
def test_a_signal_does_not_break_off_an_exchange(outcome):
    """It is raised when the exchange is done, unless that itself has an error."""
    done = []

    def work():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        done.append(1)
        return outcome

    if outcome == 7:
        with pytest.raises(KeyboardInterrupt):
            shielded(work)
    else:
        assert shielded(work) is outcome
    assert done


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_breaks_it_off():
    def work():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        time.sleep(5)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        shielded(work)
    assert time.monotonic() - started < 4


def test_one_that_does_not_come_is_named():
    found = together(2, lambda processes: processes.index or processes.each(lambda: 1), wait_s=0.2)
    assert isinstance(found[0], ProcessLostError)
    assert "process 1 did not come" in str(found[0])
    assert "--wait_s" in str(found[0])


def test_one_that_died_is_named_as_the_runtime_has_it():
    text = "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 3 heartbeat "
    assert lost(ValueError(f"{text}timeout.\nmore")).startswith("process 3 has ended")
    gloo = lost(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))
    assert gloo.startswith("another process is gone")
    assert "start the same command again" in gloo


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("config.seed", (0, 1), "config.seed is 0 in process 0 and 1 in process 1"),
        ("the model", ("ab", "ac"), 'the model is "ab" in process 0 and "ac" in process 1'),
        ("config.x", (None, ()), "config.x is null in process 0 and [] in process 1"),
    ],
)
def test_what_differs_between_processes_is_named(name, values, said):
    def work(processes):
        processes.require_same({"same": 1, name: values[processes.index]})

    for found in together(2, work):
        assert isinstance(found, InputError)
        assert said in str(found)
    assert together(2, lambda processes: processes.require_same({name: values[0]})) == [None, None]


def test_a_number_of_rows_that_does_not_divide_is_refused():
    processes = Processes(0, 3)
    processes.divide_evenly(6, "six", "")
    with pytest.raises(InputError, match=r"8 prompts cannot be divided evenly among 3 processes"):
        processes.divide_evenly(8, "8 prompts", "start 2")


def test_a_single_process_returns_what_it_computes_and_sends_nothing():
    tree = {"x": jax.numpy.arange(3)}
    assert ALONE.each(lambda: tree)[0] is tree
    assert ALONE.first(lambda: tree) is tree
    assert ALONE.ahead(lambda: tree) is tree
    assert ALONE.total(lambda: tree) is tree
    assert ALONE.part(tree) is tree
    assert ALONE.divided(3, lambda rows: {"n": len(rows)}) == {"n": 3}
    assert ALONE.traffic == (0, 0)
    with pytest.raises(InputError, match="as it is"):
        ALONE.each(lambda: (_ for _ in ()).throw(InputError("as it is")))
