"""selva.training.stopping: signals, and programs that train in a thread."""

from __future__ import annotations

import signal
import threading

from selva.training.stopping import StopRequest


def test_a_signal_asks_to_stop_and_the_handlers_return():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop() and stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_program_asks_to_stop_in_a_thread():
    answers, errors, wants = [], [], False

    def work():
        nonlocal wants
        try:
            with StopRequest(lambda: wants) as stop:
                answers.append(stop())
                wants = True
                answers.append(stop())
                answers.append(stop.signal)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (answers, errors) == ([False, True, None], [])
