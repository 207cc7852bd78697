"""Many starts of the trainer in a short time: a process that has imported everything forks one process per rank.

`Starts()` runs this file. Each line that it reads is a start, {"argv", "world", "port", "log"}, answered by the pids,
or {"wait": pids}, answered by the exit codes (-9: killed).
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class Starts:
    """The process that forks. Use as a context manager; nothing of it is left behind."""

    def __enter__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process, self.pids = subprocess.Popen([sys.executable, __file__], **pipes), []
        return self

    def __exit__(self, *error):
        self.kill()
        self.process.kill()
        self.process.wait()

    def ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, argv, world, log):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.pids = self.ask(argv=list(map(str, argv)), world=world, port=port, log=str(log))
        return self.pids

    def wait(self):
        """Exit codes of the ranks, when all have ended."""
        codes = self.ask(wait=self.pids)
        self.pids = []
        return codes

    def kill(self, signal=9):
        for pid in self.pids:
            os.killpg(pid, signal)  # its workers as well

    def run(self, argv, world, log):
        self.start(argv, world, log)
        codes = self.wait()
        assert codes == [0] * world, Path(log).read_text()[-4000:]


def serve():
    sys.path.insert(0, str(REPOSITORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print
    import train_eagle3
    from core import ranks

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in request["wait"]]
            print(json.dumps(codes), file=answers, flush=True)
            continue
        pids = []
        for rank in range(request["world"]):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)
                log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(request["world"]),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(request["port"]),
                )
                code = 1
                try:
                    ranks.run_watched(train_eagle3.main, train_eagle3.parse_args(request["argv"]))
                    code = 0
                    if ranks.Watch.running:
                        ranks.Watch.running.send("")  # as at the exit of a process that was not forked
                except SystemExit as stop:
                    code = stop.code
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)


if __name__ == "__main__":
    serve()
