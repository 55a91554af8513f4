"""Run a program many times, each in a fork of one process that has imported everything.

A run then takes only the time of its work: a hundred of them can be killed in minutes.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

SERVER = """
import gc, json, os, sys, time
import machine.running
import torch
import extract_tokens_train, machine.running, matplotlib.pyplot, speculative_decode, train_and_evaluate
import acceptance.evaluation, decoding.answers, decoding.drafts, decoding.results
import drafting.hybrid, reports.task_report
import prepare_dsec, training.loop, training.phases
from clips import dataset
from vlm import batches, eventgpt, video_llava
torch.set_num_threads(1)
gc.freeze()                            # else each fork's first collection copies all that was imported
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
    elif (answer := os.fork()) == 0:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(log, 1), os.dup2(log, 2)
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        clock = time.time
        time.time = lambda: clock() + asked["ahead_s"]
        sys.argv = asked["argv"]
        try:
            machine.running.run(sys.modules[sys.argv[0].removesuffix(".py")].main, together=True)
            code = 0
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        os._exit(code)                 # to take everything down in order is a second's work
    print(answer, flush=True)
"""


class Warm:
    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=environment,
                                       text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.server.stdout.readline() == "ready\n"

    def _ask(self, **what) -> int:
        self.server.stdin.write(json.dumps(what) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, flags: list, log: Path, program: str = "extract_tokens_train.py", *,
              environment: dict | None = None, folder: Path = ROOT, ahead_s: float = 0) -> int:
        """Start a run with these flags, its output appended to the log. Returns its process number.

        ahead_s: how far its clock is ahead.
        """
        return self._ask(argv=[program, *map(str, flags)], log=str(log), environment=environment or {},
                         folder=str(folder), ahead_s=ahead_s)

    def wait(self, process: int) -> int:
        """Its exit code, or less than 0 when a signal ended it."""
        return self._ask(wait=process)

    def killed_after(self, process: int, seconds: float) -> bool:
        """kill -9 after so many seconds; False if the process had ended before."""
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        return self.wait(process) == -signal.SIGKILL

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(60)
