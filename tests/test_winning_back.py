"""The jobs of `benchmarks/winning_back.py`: real processes, of commands that cost nothing."""

import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

from qsparse_hf.errors import UserError

SCRIPT = REPOSITORY / "benchmarks" / "winning_back.py"
script = runpy.run_path(str(SCRIPT))
Job, Study = script["Job"], script["Study"]


@pytest.fixture
def study(tmp_path):
    return Study("dense", tmp_path, [], [], [], 0, 1, 1, [], [])


def job(name: str, code: str, *needs, trains=None):
    return Job(name, ["-c", code], needs, trains)


def test_a_job_waits_for_those_that_it_needs(study):
    wrote, after = study.folder / "wrote", study.folder / "after"
    slow = f"import time; open({str(wrote)!r}, 'w').close(); time.sleep(1); print('done')"
    reads = f"open({str(after)!r}, 'w').write(open({str(study.folder / 'slow.log')!r}).read())"
    study.run([job("reader", reads, study.mark("slow")), job("slow", slow)], ["0", "1"])
    assert after.read_text() == "done\n"  # and did not begin when its file was there
    assert not study.failed


def test_what_fails_is_told_with_what_needed_it_and_done_again(study, capsys):
    jobs = [job("bad", "raise SystemExit('no room')"), job("next", "", study.mark("bad")), job("other", "")]
    study.run(jobs, [""])
    assert study.failed == ["bad", "next (not begun)"]
    assert "bad failed: no room" in capsys.readouterr().out
    again = Study("dense", study.folder, [], [], [], 0, 1, 1, [], [])
    assert [again.is_done(each) for each in jobs] == [False, False, True]


def test_a_job_that_dies_in_silence_is_a_failure(study, capsys):
    study.run([job("killed", "import os; os.kill(os.getpid(), 9)")], [""])
    assert study.failed == ["killed"]
    assert "killed failed: -9" in capsys.readouterr().out


def test_another_command_of_the_same_name_is_refused(study):
    study.run([job("one", "1")], [""])
    with pytest.raises(UserError, match=r"one in .* was made with other arguments"):
        study.run([job("one", "2")], [""])


def test_an_interrupted_training_goes_on(study):
    (study.folder / "model" / "checkpoint-2").mkdir(parents=True)
    study.run([job("train", "import sys; print(sys.argv[1:])", trains=study.folder / "model")], [""])
    assert (study.folder / "train.log").read_text() == "['resume_from_checkpoint=last']\n"


def test_sigterm_stops_the_jobs_too(tmp_path):
    code = f"""
import runpy, signal, sys
from pathlib import Path
script = runpy.run_path({str(SCRIPT)!r})
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
study = script["Study"]("dense", Path({str(tmp_path)!r}), [], [], [], 0, 1, 1, [], [])
sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
study.run([script["Job"]("sleeper", ["-c", sleep])], [""])
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    log = tmp_path / "sleeper.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    sleeper = int(log.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(sleeper, 0)
