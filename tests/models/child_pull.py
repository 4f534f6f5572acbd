"""A pull in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec

from models.catalog import Entry

Env = dict[str, str]

# It prints the name of the error's class, so that its circumstances (a user without rights, a limit, a kill) are the
# operating system's and not a stub's.
CHILD = """
import json, os, resource, sys
from pathlib import Path
import msgspec
from models.catalog import Entry
from models.pull import pull
from protocol.errors import PullError
job = json.loads(sys.stdin.read())
entry = msgspec.convert(job["entry"], Entry)
if job["largest_file"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
os.chdir(job["folder"])  # while still allowed to
if job["drop"] and os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    print(pull(entry, Path("."), env=os.environ).source)
except PullError as error:
    print(type(error).__name__, error)
"""


def start(entry: Entry, folder: Path, env: Env, *, largest_file: int = 0, drop: bool = False) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    job = {"entry": msgspec.to_builtins(entry), "folder": str(folder), "largest_file": largest_file, "drop": drop}
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env | {"PYTHONPATH": root},
    )
    assert process.stdin
    process.stdin.write(json.dumps(job))
    process.stdin.close()
    return process


def outcome(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    with process.stdout as output:
        text = output.read()
    process.wait()
    return text
