"""The cluster's parts: processes that are started, killed and stopped, and clones with environments of their own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil

HOST = "127.0.0.1"
PATIENCE_S = 240.0


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def wait_until(ready: Callable[[], object], what: str, patience_s: float = PATIENCE_S, every_s: float = 0.25) -> float:
    """Wait, and return the seconds; TimeoutError says for what."""
    started = time.monotonic()
    while not ready():
        if time.monotonic() - started > patience_s:
            raise TimeoutError(f"{what}: not within {patience_s:.0f} s")
        time.sleep(every_s)
    return time.monotonic() - started


def answers(url: str) -> bool:
    """Whether a server is there and well."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status < 500)
    except OSError:
        return False


class Service:
    """One process with its log; it leads a session of its own."""

    def __init__(self, name: str, command: list[str], folder: Path, environment: dict[str, str], log: Path) -> None:
        self.name, self.command, self.folder, self.environment, self.log = name, command, folder, environment, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, number: int = signal.SIGTERM, patience_s: float = 30.0) -> None:
        """Signal the process and all it started; what is left after a while is killed."""
        if self.process is None:
            return
        for process in self._tree():
            _send(process, number)
        deadline = time.monotonic() + patience_s
        while (left := self._tree()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in left:
            _send(process, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def kill(self) -> None:
        """As a power cut: every process at once."""
        self.stop(signal.SIGKILL)

    def _tree(self) -> list[psutil.Process]:
        assert self.process is not None
        try:
            leader = psutil.Process(self.process.pid)
            found = [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


class Clone:
    """A clone with an environment, a DVC cache and a scratch folder of its own."""

    def __init__(self, origin: Path, folder: Path, environment: dict[str, str], packages: list[str]) -> None:
        self.folder = folder
        if not folder.is_dir():
            run(["git", "clone", "-q", str(origin), str(folder)], origin)
        bin_folder = folder / ".venv" / "bin"
        if not bin_folder.is_dir():
            run([sys.executable, "-m", "venv", "--without-pip", str(folder / ".venv")], folder)
            (site,) = (folder / ".venv" / "lib").glob("python*/site-packages")
            # Packages are those of this interpreter; the project is the clone's own.
            (site / "cluster.pth").write_text("\n".join([str(folder), *packages]) + "\n")
            script = bin_folder / "vdmini"
            # Guarded, because stages start processes that read this file again.
            main = 'from flows.cli import app\n\nif __name__ == "__main__":\n    app()\n'
            script.write_text(f"#!{bin_folder / 'python'}\n{main}")
            script.chmod(0o755)
        self.python = str(bin_folder / "python")
        own = {
            "PATH": os.pathsep.join([str(bin_folder), os.environ["PATH"]]),
            "DVC_SITE_CACHE_DIR": str(folder / ".scratch" / "dvc-site"),
            "PREFECT_HOME": str(folder / ".scratch" / "prefect"),
        }
        (folder / ".scratch" / "prefect").mkdir(parents=True, exist_ok=True)
        self.environment = {**environment, **own}

    def call(self, *words: str, check: bool = True) -> str:
        """Run a program of the clone's environment, such as `-m dvc status`; what it prints."""
        return run([self.python, *words], self.folder, self.environment, check)

    def remote_is(self, url: str) -> None:
        """Use another place of the store from now on; it is not part of the commit."""
        (self.folder / ".dvc" / "config.local").write_text(f"['remote \"store\"']\n    url = {url}\n")

    def forget(self) -> None:
        """As new: no results, no cache, no checkpoints."""
        for name in ("artifacts", ".dvc/cache", ".dvc/tmp", ".scratch/checkpoints", ".scratch/sensitivity"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.rmtree(self.folder / ".scratch/tracking", ignore_errors=True)
        (self.folder / "dvc.lock").unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """The training steps of whole checkpoints."""
        found = (self.folder / ".scratch/checkpoints").glob("*/step-*/checkpoint.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None, check: bool = True) -> str:
    """A program's output; RuntimeError with its last lines if it fails."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout + done.stderr


class Postgres:
    """A PostgreSQL server in a folder; it refuses to run as root, so root starts it as the user postgres."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.data = folder, port, folder / "data"
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path("/usr/local/bin")]
        self.bin = found[-1]

    def start(self, *databases: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres")
        new = not self.data.is_dir()
        if new:
            self._as_user("initdb", "-D", str(self.data), "-A", "trust", "-U", "vdmini")
        options = f"-p {self.port} -c listen_addresses={HOST} -c unix_socket_directories={self.folder}"
        self._as_user("pg_ctl", "-D", str(self.data), "-w", "-l", str(self.folder / "log"), "-o", options, "start")
        for name in databases if new else ():
            self._as_user("createdb", "-h", HOST, "-p", str(self.port), "-U", "vdmini", name)

    def stop(self) -> None:
        self._as_user("pg_ctl", "-D", str(self.data), "-m", "fast", "stop", check=False)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg2://vdmini@{HOST}:{self.port}/{database}"

    def _as_user(self, program: str, *words: str, check: bool = True) -> None:
        command = [str(self.bin / program), *words]
        # The server outlives the call and must not hold its pipes.
        prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        with (self.folder / "commands.log").open("a") as log:
            done = subprocess.run([*prefix, *command], cwd=self.folder, stdout=log, stderr=log, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{program} failed; see {self.folder / 'commands.log'}")
