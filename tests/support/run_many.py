"""python run_many.py FILE: the command with each line's flags, a JSON list, in this one process.

A line that is an object names a script and its arguments instead. Answers each with a line: exit
code and what it said on standard error.
"""

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runner.cli import main

if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr
    for line in Path(sys.argv[1]).read_text().splitlines():
        asked = json.loads(line)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            if isinstance(asked, list):
                code = main(asked)
            else:
                sys.argv, code = [asked["script"], *asked["arguments"]], 0
                runpy.run_path(asked["script"], run_name="__main__")
        print(json.dumps([code, said.getvalue()]), file=answers, flush=True)
