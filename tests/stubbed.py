"""The workflow script with programs that take a moment and then write their result."""

import os
import subprocess
import time
from pathlib import Path

from tests.conftest import ROOT

SCRIPT = str(ROOT / "run_full_workflow.sh")
STUB = """#!/usr/bin/env bash
# Stands for python: every program takes a moment and then writes its result.
[[ "$1" != base.py && "$1" != -c ]] || exit 0
if [[ "$*" == *--output* || "$*" == *--task_folder* ]]; then
  (IFS=$'\\x1f'; echo "$*" >> "${CALLS%/*}/words")
fi
result=''
while (( $# )); do
  case "$1" in
    --output_file) result="$2" ;;
    --task_folder) result="$2/RESULTS.md" ;;
    --output_folder) result="$2/DECODE.md" ;;
    --output_dir) mkdir -p "$2/my_egpt_dsec_test/my_egpt_dsec_seq_"{1s,500ms}
                  result="$2/my_egpt_dsec_test/my_egpt_dsec_seq_500ms/EventGPT_Instruction_Subset.json" ;;
  esac
  shift
done
[[ -n "${result}" ]] || exit 0                 # the SUMMARY
stops=0
stop() { (( ++stops <= ${STUBBORN:-0} )) || { echo "stopped ${result}" >> "${CALLS}"; exit 143; }; }
trap stop TERM
echo "begin ${result}" >> "${CALLS}"
echo "${WORKFLOW_STEP}" >> "${CALLS%/*}/steps"
for (( i = 0; i < ${LOOPS:-6}; i++ )); do sleep 0.02; done
mkdir -p "$(dirname "${result}")"
echo x > "${result}"
echo "end ${result}" >> "${CALLS}"
"""
STEPS = 11             # of the demo: its data; then twice two extractions, two trainings, a decoding


class Stubbed:
    """The workflow script with programs that take a moment."""

    def __init__(self, folder: Path):
        self.folder, self.calls, self.log = folder, folder / "calls", folder / "log"
        (folder / "python").write_text(STUB)
        (folder / "python").chmod(0o755)
        self.calls.touch()

    def environment(self, **settings: str) -> dict:
        return {**os.environ, "VIRTUAL_ENV": str(self.folder), "PYTHON": str(self.folder / "python"),
                "CALLS": str(self.calls), "DATA_ROOT": str(self.folder / "data"),
                "TOKENS_DIR": str(self.folder / "tokens"), "TASK_DIR": str(self.folder / "task"),
                **settings}

    def start(self, **settings: str) -> subprocess.Popen:
        with open(self.log, "a") as out:
            return subprocess.Popen(
                ["bash", SCRIPT, "--demo"], env=self.environment(**settings), stdout=out,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)

    def lines(self, word: str) -> list[str]:
        lines = self.calls.read_text().splitlines()
        return [line.split(" ", 1)[1] for line in lines if line.startswith(word)]

    def wait_until_begun(self, steps: int, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 60
        while len(self.lines("begin")) < steps:
            assert time.monotonic() < deadline and process.poll() is None, self.log.read_text()
            time.sleep(0.005)
