"""Scripts run in forks of a process that has imported vLLM already: the import takes seconds.

`launch` takes the arguments of `subprocess.run` that the tests use. Processes with the same
environment at import time, of whichever pytest worker, are forks of one parent. A parent ends when
the tests end, or when nobody asked for a while. A fork begins with one thread and no process group:
what it does after the import is what a fresh process does.

Run as a script, this file is that parent.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

# What is read while modules are imported; anything else may differ from fork to fork.
AT_IMPORT = ("PYTHON", "OMP_", "TORCH", "TRITON_", "HF_", "LD_", "VLLM_LOGGING")
# What vLLM and OpenCV set when they are imported, as some tests do: a process that was started
# later would not share a parent with those before it.
BY_IMPORT = (
    "LD_LIBRARY_PATH",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCHINDUCTOR_COMPILE_THREADS",
    "TRITON_CACHE_AUTOTUNING",
)
AT_START = {name: os.environ[name] for name in BY_IMPORT if name in os.environ}
# Seconds without a job after which a parent ends. Each takes 500 MB, and 5 s to start. Those of
# eight releases may stay, which are asked again in each file of tests/releases.
IDLE = 240
IDLE_RELEASE = 60 if os.environ.get("MOE_LORA_ALL") == "1" else 900
PRELOADED = (
    "torch",
    "transformers",
    "vllm",
    "vllm.config",
    "vllm.engine.arg_utils",
    "vllm.distributed",
)
# Not where a script is to put stand-ins for a GPU before them.
ENGINE = (
    "vllm.entrypoints.llm",
    "vllm.lora.layers",
    "vllm.lora.request",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_model_runner",
)


def launch(command, env=None, timeout=None, **more):
    """`subprocess.run` of ``[python, script or -c or -m, ...]``: a `CompletedProcess` with text.

    Raises:
        subprocess.TimeoutExpired: with what was printed; the process and its children are killed.
    """
    assert command[0] == sys.executable
    env = _without_imports(dict(os.environ) if env is None else env)
    with tempfile.TemporaryDirectory() as folder, _connected(env) as parent:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = {"argv": command[1:], "env": env, "cwd": os.getcwd(), "out": str(out)}
        job["err"] = str(out if more.get("stderr") == subprocess.STDOUT else err)
        parent.sendall(json.dumps(job).encode() + b"\n")
        parent.settimeout(timeout)
        try:
            answer = parent.makefile().readline()
        except TimeoutError:  # closing the connection ends the fork
            raise subprocess.TimeoutExpired(command, timeout, _text(out).encode()) from None
        assert answer, f"the parent of forks died: {_text(out)}{_text(err)}"
        return subprocess.CompletedProcess(command, int(answer), _text(out), _text(err))


def _without_imports(env):
    """``env`` as if this process had imported nothing; what a test chose itself stays."""
    ours = {name for name in BY_IMPORT if env.get(name) == os.environ.get(name)}
    kept = {name: value for name, value in env.items() if name not in ours}
    return kept | {name: AT_START[name] for name in ours if name in AT_START}


def _text(file):
    return file.read_text(errors="replace") if file.exists() else ""


@contextlib.contextmanager
def _connected(env):
    """A connection to the parent for ``env``, which is started where there is none."""
    early = {name: value for name, value in env.items() if name.startswith(AT_IMPORT)}
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    name = hashlib.sha256(json.dumps([run, early], sort_keys=True).encode()).hexdigest()[:16]
    place = Path(tempfile.gettempdir(), f"moe-lora-forks-{name}")
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _try(place)
        if found is None:
            place.unlink(missing_ok=True)
            owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
            with place.with_suffix(".log").open("w") as log:
                started = subprocess.Popen(
                    [sys.executable, __file__, str(place), str(owner)],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            while (found := _try(place)) is None:
                assert started.poll() is None, place.with_suffix(".log").read_text()[-3000:]
                time.sleep(0.05)
    with found:
        yield found


def _try(place):
    made = socket.socket(socket.AF_UNIX)
    try:
        made.connect(str(place))
    except OSError:
        made.close()
        return None
    return made


# -- the parent ------------------------------------------------------------------------------------


def serve(place, owner):
    """Fork for each connection to ``place``, until ``owner`` is gone or nobody asks."""
    idle = IDLE_RELEASE if _import() else IDLE
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(16)
    running, last = {}, time.monotonic()  # connection -> (its child, the child's pidfd)
    while os.path.exists(f"/proc/{owner}") and (running or time.monotonic() - last < idle):
        ends = {pidfd: made for made, (_, pidfd) in running.items()}
        ready, _, _ = select.select([listener, *running, *ends], [], [], 2)
        for one in ready:
            last = time.monotonic()
            if one is listener:
                made, _ = listener.accept()
                pid = _fork(made, listener, running)
                with contextlib.suppress(OSError):
                    os.setpgid(pid, pid)  # as the fork does: whoever comes first
                running[made] = pid, os.pidfd_open(pid)
                continue
            made = ends.get(one, one)
            if made not in running:
                continue  # both it and its end were ready
            pid, pidfd = running.pop(made)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it left behind, or itself if nobody waits
            _, status = os.waitpid(pid, 0)
            os.close(pidfd)
            with contextlib.suppress(OSError):
                made.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            made.close()
    with contextlib.suppress(OSError):
        os.unlink(place)


def _import():
    """Import vLLM. Returns whether with the stand-ins of tests/releases."""
    sys.path[0:1] = []  # this file's folder
    sys.argv = [""]
    release = True
    try:
        importlib.import_module("packages").modules()  # as the scripts of tests/releases do first
    except ImportError:
        release = False
    for name in PRELOADED if release else PRELOADED + ENGINE:
        with contextlib.suppress(ImportError):  # other releases have other modules
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        # In a process of its own a model's class is asked what it can do: one more import of vLLM.
        from vllm.model_executor.models import registry

        registry._run_in_subprocess = lambda function: function()
    gc.collect()
    gc.freeze()  # vLLM collects several times while it starts; what is imported stays
    return release


def _fork(made, listener, running):
    job = json.loads(made.makefile().readline())
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        listener.close()
        for other, (_, pidfd) in running.items():
            other.close()
            os.close(pidfd)
        made.close()
        for stream, file in ((1, job["out"]), (2, job["err"])):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(opened, stream)
            os.close(opened)
        imported = {name: os.environ[name] for name in BY_IMPORT if name in os.environ}
        os.environ.clear()
        os.environ.update(imported | job["env"])
        os.chdir(job["cwd"])
        _run(job["argv"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(argv):
    """What ``python *argv`` does."""
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(argv[1], vars(types.ModuleType("__main__")))
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
