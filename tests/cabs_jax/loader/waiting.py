"""What tests of the loader's threads wait for."""

import threading
import time


def reading_threads():
    return [thread for thread in threading.enumerate() if "read-ahead" in thread.name]


def wait_until(condition):
    deadline = time.monotonic() + 60  # seconds, on a busy machine
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
