"""One run to a workdir: refused while held, free after any death."""

import os
import signal
import subprocess
import sys

import pytest

from jaxdiff.train.lock import WorkdirLock, WorkdirLocked

HOLD = """
import sys, time
from jaxdiff.train.lock import WorkdirLock
lock = WorkdirLock(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


def test_refused_while_held(tmp_path):
    with WorkdirLock(tmp_path / "run"):
        with pytest.raises(WorkdirLocked) as caught:
            WorkdirLock(tmp_path / "run")
        text = str(caught.value)
        assert f"process {os.getpid()} on " in text and str(tmp_path / "run") in text and "\n" not in text
        WorkdirLock(tmp_path / "other").release()
    lock = WorkdirLock(tmp_path / "run")
    lock.release()
    lock.release()


def test_free_after_kill_9(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(WorkdirLocked, match=f"process {process.pid} on "):
        WorkdirLock(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / ".lock").read_text()  # the dead run's file is still there, and does not matter
    WorkdirLock(tmp_path).release()


def test_a_forked_child_does_not_keep_it(tmp_path):
    code = (
        "import os, sys, time\n"
        "from jaxdiff.train.lock import WorkdirLock\n"
        "lock = WorkdirLock(sys.argv[1])\n"
        "if os.fork() == 0:\n    os.close(1); time.sleep(30); os._exit(0)\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, stdout=subprocess.PIPE)
    WorkdirLock(tmp_path).release()


def test_garbage_in_the_file_and_bucket_paths(tmp_path):
    (tmp_path / ".lock").write_text("not json")
    WorkdirLock(tmp_path).release()
    with WorkdirLock("gs://bucket/run") as lock:
        assert lock.path is None
