"""How a step's waits for the device are seen without disturbing other threads."""

import threading
import warnings

import pytest
from graph_emulated import install
from torch import nn

from rgtg_fast.decode import waits


@pytest.fixture
def cuda(monkeypatch):
    return install(monkeypatch)


def wait(cuda):
    """What torch does where the host waits."""
    if cuda.sync_debug_mode == 1:
        warnings.warn(waits.WAITED, UserWarning, stacklevel=2)


class Asks(nn.Module):
    def forward(self, cuda):
        wait(cuda)


def elsewhere(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_every_wait_of_this_thread_is_noted_with_its_module(cuda):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("ignore")
        for _ in range(2):  # the same place again, of which the default filter would say nothing
            with waits.waits_noted() as places:
                Asks()(cuda)
                wait(cuda)
            assert len(places) == 2
            assert places[0].startswith(" in Asks (test_waits.py:")
            assert places[1].startswith(" at test_waits.py:")
    assert not shown


def test_waits_of_another_thread_are_neither_noted_nor_shown(cuda):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with waits.waits_noted() as places:
            elsewhere(lambda: wait(cuda))
    assert not places and not shown


def test_other_warnings_are_shown(cuda):
    with pytest.warns(UserWarning, match="of another thread") as shown:  # noqa: SIM117
        with waits.waits_noted() as places:
            elsewhere(lambda: warnings.warn("of another thread", stacklevel=1))
            warnings.warn("of this one", stacklevel=1)
    assert not places and len(shown) == 2


def test_warnings_that_are_errors_stay_so_but_for_waits(cuda):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with waits.waits_noted() as places:
            wait(cuda)
            with pytest.raises(UserWarning, match="mine"):
                warnings.warn("mine", stacklevel=1)
    assert len(places) == 1


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
@pytest.mark.parametrize("fails", [False, True])
def test_mode_and_filters_are_as_before(cuda, mode, fails):
    cuda.set_sync_debug_mode(mode)
    before = cuda.sync_debug_mode, warnings.showwarning, list(warnings.filters)
    try:
        with waits.waits_noted():
            assert cuda.sync_debug_mode == max(1, before[0])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert (cuda.sync_debug_mode, warnings.showwarning, list(warnings.filters)) == before


def test_a_mode_that_the_user_set_still_shows(cuda):
    cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match=waits.WAITED), waits.waits_noted() as places:
        wait(cuda)
        elsewhere(lambda: wait(cuda))
    assert len(places) == 1


def test_a_context_of_another_thread_that_ends_later_leaves_nothing_behind(cuda, monkeypatch):
    """`warnings.catch_warnings` copies the filters, and puts back what it found."""
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda *args: shown.append(args))
    filters = list(warnings.filters)
    other = warnings.catch_warnings()
    with waits.waits_noted() as places:
        other.__enter__()
    assert list(warnings.filters) == filters
    other.__exit__(None, None, None)
    assert list(warnings.filters) == filters
    warnings.simplefilter("always")
    cuda.sync_debug_mode = 1
    wait(cuda)
    assert len(shown) == 1 and not places


def test_one_thread_at_a_time(cuda):
    order = []

    def second():
        with waits.waits_noted():
            order.append(("second", cuda.sync_debug_mode))

    thread = threading.Thread(target=second)
    with waits.waits_noted():
        thread.start()
        thread.join(0.2)
        order.append(("first", cuda.sync_debug_mode))
    thread.join()
    assert order == [("first", 1), ("second", 1)] and cuda.sync_debug_mode == 0
