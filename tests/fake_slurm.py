"""A stand-in for a Slurm cluster with docker on every node, on one machine: sbatch, srun, scontrol, getent, docker.

`Cluster` makes a folder with these commands, to be put on PATH. Scripts run as they are, as processes. A node is a name
and a loopback address (node2 is 127.X.Y.2), so that every node can use the same ports. A container is a process in a
session of its own which only `docker` ends, as with the real one: it outlives the command that started it. Inside,
`python3 -m sglang...` and `etcd` are small servers without a model (serving_stand_in.py), and they say so.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
HERE = Path(__file__).resolve()
TOOLS = ("sbatch", "srun", "scontrol", "docker")
#: Commands that are so small that a shell does: no job waits for Python to start. A second of the scripts' waiting is a
#: fifth here; seconds that they count by the clock are seconds.
SMALL = {
    "hostname": 'echo "$FAKE_NODE"',
    "getent": 'echo "$FAKE_NET.${2#node}  STREAM $2"; echo "$FAKE_NET.${2#node}  DGRAM $2"',
    "sleep": 'exec "$FAKE_SLEEP" 0.2',
}
INSIDE = ("python3", "etcd")
#: Options of `docker run` that have a value.
VALUED = {
    "--name",
    "--network",
    "--ipc",
    "--ulimit",
    "--volume",
    "--env",
    "--gpus",
    "--device",
    "--cap-add",
    "--group-add",
}


class Cluster:
    """The commands, in `folder`/bin, and what happens to be run with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Of this process, so that tests which run at the same time on this machine do not meet.
        self.net = f"127.{1 + os.getpid() // 250 % 250}.{os.getpid() % 250}"
        for name, tools in (("bin", TOOLS), ("inside", INSIDE)):
            (folder / name).mkdir(parents=True)
            for tool in tools:
                file = folder / name / tool
                file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -ES "{HERE}" {tool} "$@"\n')
                file.chmod(0o755)
        for tool, does in SMALL.items():
            file = folder / "bin" / tool
            file.write_text(f"#!/bin/sh\n{does}\n")
            file.chmod(0o755)
        (folder / "containers").mkdir()

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        sleep = shutil.which("sleep")
        assert sleep is not None
        return {
            **os.environ,
            "PATH": path,
            "FAKE_SLEEP": sleep,
            "FAKE_SLURM": str(self.folder),
            "FAKE_NET": self.net,
            **given,
        }

    def submit(self, recipe: Path, nodes: int, given: Mapping[str, str]) -> subprocess.Popen[str]:
        """sbatch of the recipe's script; the process ends when the job does, with its code."""
        return subprocess.Popen(
            ["sbatch", f"--nodes={nodes}", "run_xPyD_models.slurm"],
            cwd=recipe,
            env=self.environment(given),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def containers(self) -> list[dict[str, list[str] | str]]:
        """Every container that was ever started: its node, name, flags, image and command."""
        log = self.folder / "docker.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def processes(self) -> list[str]:
        """Command lines of processes of this cluster that are still there."""
        return list(self._mine().values())

    def kill(self) -> None:
        for process in self._mine():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _mine(self) -> dict[int, str]:
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"FAKE_SLURM={self.folder}\0".encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        return found


# --- The commands -----------------------------------------------------------------------------------------------------


def sbatch(words: list[str]) -> int:
    """Run the script as the batch step of job 71, on the first node; wait for it."""
    nodes = int(next(word for word in words if word.startswith("--nodes=")).partition("=")[2])
    spool = Path(os.environ["FAKE_SLURM"]) / "spool"
    spool.mkdir()
    script = shutil.copy(words[-1], spool / "slurm_script")
    environment = {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": f"node[1-{nodes}]", "FAKE_NODE": "node1"}
    environment |= {"SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_JOB_NUM_NODES": str(nodes)}
    return _run(["bash", str(script)], {**os.environ, **environment})


def srun(words: list[str]) -> int:
    """One task on the node of --nodelist. Signals go to it, as srun hands them on."""
    options, command = [], list(words)
    while command and command[0].startswith("--"):
        options.append(command.pop(0))
    node = next(option.partition("=")[2] for option in options if option.startswith("--nodelist="))
    if node == os.environ.get("FAKE_BLIND"):  # a node that does not have the shared folder
        command = [word.replace("shared logs", "not shared") for word in command]
    return _run(command, {**os.environ, "FAKE_NODE": node, "SLURM_PROCID": "0"})


def scontrol(words: list[str]) -> int:
    assert words[:2] == ["show", "hostnames"], words
    found = re.fullmatch(r"node\[1-(\d+)\]", words[2])
    assert found is not None, words
    print("\n".join(f"node{i}" for i in range(1, int(found[1]) + 1)))
    return 0


def docker(words: list[str]) -> int:
    command, *rest = words
    folder = Path(os.environ["FAKE_SLURM"]) / "containers"
    if command == "run":
        return _docker_run(rest, folder)
    if command == "stop":
        assert rest[0] == "-t", rest
        return 0 if _end([folder / name for name in rest[2:]], grace=float(rest[1])) else 1
    if command == "rm":
        return 0 if _end([folder / name for name in rest[1:]], grace=0) else 1
    if command == "ps":
        prefix = rest[rest.index("--filter") + 1].removeprefix("name=")
        print("\n".join(file.name for file in folder.iterdir() if file.name.startswith(prefix)))
        return 0
    sys.exit(f"docker stand-in: {command}?")


def _docker_run(words: list[str], folder: Path) -> int:
    flags, environment, name = [], {}, ""
    command = list(words)
    while command[0].startswith("--"):
        flag = command.pop(0)
        value = command.pop(0) if flag in VALUED else ""
        flags += [flag, value] if value else [flag]
        if flag == "--name":
            name = value
        elif flag == "--env":
            variable, equals, content = value.partition("=")
            if equals or variable in os.environ:
                environment[variable] = content if equals else os.environ[variable]
    image = command.pop(0)
    record = {"node": os.environ["FAKE_NODE"], "name": name, "flags": flags, "image": image, "command": command}
    with (folder.parent / "docker.jsonl").open("a") as log:
        log.write(json.dumps(record) + "\n")
    environment |= {key: value for key, value in os.environ.items() if key.startswith("FAKE_")}
    environment["PATH"] = f"{folder.parent / 'inside'}:{os.environ['PATH']}"
    return _run(command, environment, folder / name)  # signals go to the container, as with --sig-proxy


def _end(files: Sequence[Path], grace: float) -> bool:
    """SIGTERM to all, and SIGKILL after `grace` seconds. False if one of them is no container."""
    processes = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            processes[file] = int(file.read_text())
    deadline = time.monotonic() + grace
    for process in processes.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGTERM if grace else signal.SIGKILL)
    for file, process in processes.items():
        with contextlib.suppress(ProcessLookupError):
            while file.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            os.killpg(process, signal.SIGKILL)
        file.unlink(missing_ok=True)
    return len(processes) == len(files)


def _run(command: Sequence[str], environment: Mapping[str, str], container: Path | None = None) -> int:
    """Run it, hand signals on to it, return its code. A container has a session of its own, and a file with its id."""
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until there is a process to hand them to

    def begin() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        if container is None:  # a step goes with its srun, as slurmd sees to it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    process = subprocess.Popen(command, env=environment, start_new_session=container is not None, preexec_fn=begin)
    if container is not None:
        container.write_text(str(process.pid))
    for name in signals:
        signal.signal(name, lambda number, _: process.send_signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    code = process.wait()
    if container is not None:
        container.unlink(missing_ok=True)
    return code if code >= 0 else 128 - code


# --- Inside a container -----------------------------------------------------------------------------------------------


def _values(words: list[str]) -> Iterator[tuple[str, str]]:
    return ((word, words[i + 1]) for i, word in enumerate(words[:-1]) if word.startswith("--"))


def python3(words: list[str]) -> int:
    """What `python3 -m MODULE` is in the image. FAKE_PREFILL, FAKE_DECODE: more options of the stand-in."""
    if words[0] == "-c":  # whether the image has a package
        return int(any(word == os.environ.get("FAKE_LACKS") for word in words[2:]))
    module, options = words[1], dict(_values(words))
    if module == "sglang.benchmark.serving":
        script, more = "serving_client_stand_in.py", words[2:]
    else:
        mode = options.get("--disaggregation-mode", "router")
        assert module == ("sglang_router.launch_router" if mode == "router" else "sglang.launch_server"), words
        script, more = "serving_stand_in.py", ["--host", options["--host"], "--port", options["--port"], "--mode", mode]
        more += os.environ.get(f"FAKE_{mode.upper()}", "").split()
    return os.execv(sys.executable, [sys.executable, "-ES", str(HERE.parent / script), *more])


def etcd(words: list[str]) -> int:
    """Answers /health."""
    host, port = dict(_values(words))["--listen-client-urls"].removeprefix("http://").split(":")
    server = [sys.executable, "-ES", str(HERE.parent / "serving_stand_in.py"), "--mode", "etcd"]
    os.execv(sys.executable, [*server, "--host", host, "--port", port])


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
