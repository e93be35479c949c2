"""A one-node Slurm cluster on this machine, for tests: Debian's slurm-wlm and munge, started by root, gone with the block."""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

CONF = """
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port1}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
KillWait=2
MinJobAge=300
SlurmdTimeout=20
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def absent() -> str:
    "Why no cluster can be started here, \"\" when it can."
    if os.getuid() != 0: return "a Slurm cluster is started by root only"
    missing = [p for p in ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel") if not shutil.which(p)]
    return f"no {', '.join(missing)} here: Debian packages slurm-wlm and munge" if missing else ""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait(what, seconds: float = 40.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := what(): return answer
        time.sleep(0.2)
    raise TimeoutError(f"{what} not within {seconds} s")


@contextlib.contextmanager
def cluster(folder: Path, cpus: int = 2):
    "Start munged, slurmctld and slurmd in `folder`; SLURM_CONF points to them inside the block."
    folder.mkdir(parents=True)
    for sub in ("state", "spool"): (folder/sub).mkdir()
    host = socket.gethostname().split(".")[0]
    conf = folder/"slurm.conf"
    conf.write_text(CONF.format(host=host, folder=folder, port=free_port(), port1=free_port(), cpus=cpus))
    key = folder/"munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    processes = []
    def daemon(*command):
        with open(folder/f"{command[0]}.out", "w") as out: processes.append(subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=os.environ | {"SLURM_CONF": str(conf)}))
    ask = lambda *command: subprocess.run(command, capture_output=True, text=True, env=os.environ | {"SLURM_CONF": str(conf)})
    before = os.environ.get("SLURM_CONF")
    try:
        daemon("munged", "-F", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed")
        wait(lambda: (folder/"munge.socket").exists())
        daemon("slurmctld", "-D", "-i")
        wait(lambda: ask("sinfo", "-h").returncode == 0)
        daemon("slurmd", "-D", "-N", host)
        wait(lambda: "idle" in ask("sinfo", "-h", "-o", "%t").stdout)
        os.environ["SLURM_CONF"] = str(conf)
        yield ask
    finally:
        ask("scancel", "-u", "root")
        if before is None: os.environ.pop("SLURM_CONF", None)
        else: os.environ["SLURM_CONF"] = before
        for process in reversed(processes):
            with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGTERM)
        for process in reversed(processes):
            try: process.wait(10)
            except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)
