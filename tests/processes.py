"""Runs a program as several processes that find each other on this machine."""

import json
import socket
import subprocess
import sys

TIMEOUT = 120  # seconds


def start(program, processes, request):
    """Starts `program PORT PROCESSES INDEX REQUEST`, REQUEST in JSON, once for each index."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, program, str(port), str(processes), str(i), json.dumps(request)],
            stdout=subprocess.PIPE,
        )
        for i in range(processes)
    ]


def results(started):
    """What each process printed last, in JSON, once all have ended well."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started)
    return [json.loads(output.splitlines()[-1]) for output in outputs]  # after what Gloo prints
