"""A one-node Slurm cluster on this machine, for tests: Debian's slurm-wlm and munge, started by root, gone with the
block."""
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
AuthInfo=socket={folder}/munge.socket,cred_expire=6
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
SlurmdTimeout=6
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10
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


def wait(what, seconds: float = 300.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := what(): return answer
        time.sleep(0.2)
    raise TimeoutError(f"{what} not within {seconds} s")


class Cluster:
    "The running cluster: call it to ask Slurm something, kill its node, bring the node back."
    def __init__(self, folder: Path, cpus: int):
        self.folder, self.host, self.processes = folder, socket.gethostname().split(".")[0], []
        conf = folder/"slurm.conf"
        conf.write_text(CONF.format(host=self.host, folder=folder, port=free_port(), port1=free_port(), cpus=cpus))
        self.conf, self.env = str(conf), os.environ | {"SLURM_CONF": str(conf)}

    def __call__(self, *command): return subprocess.run(command, capture_output=True, text=True, env=self.env)

    def daemon(self, *command):
        with open(self.folder/f"{command[0]}.out", "a") as out:
            self.processes.append(
                subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=self.env)
            )
        return self.processes[-1]

    def start_node(self):
        self.node = self.daemon("slurmd", "-D", "-N", self.host)
        wait(lambda: self("sinfo", "-h", "-o", "%t").stdout.split()[:1] in (["idle"], ["mix"], ["alloc"]))

    def kill_node(self):
        "As when the power goes: the node's daemon and the jobs on it, at once."
        own = {p.pid for p in self.processes}
        for pid in [self.node.pid, *(p for p in processes_with("SLURM_JOB_ID=", self.conf) if p not in own)]:
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        self.node.wait()


def processes_with(*texts: str) -> list[int]:
    "Process numbers of those that have all these in their environment or command line."
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try: about = (folder/"environ").read_bytes() + b"\0" + (folder/"cmdline").read_bytes()
        except OSError: continue
        if all(t.encode() in about for t in texts) or b"slurmstepd" in about and texts[-1].encode() in about:
            found.append(int(folder.name))
    return found


@contextlib.contextmanager
def cluster(folder: Path, cpus: int = 2):
    "Start munged, slurmctld and slurmd in `folder`; SLURM_CONF points to them inside the block."
    folder.mkdir(parents=True)
    for sub in ("state", "spool"): (folder/sub).mkdir()
    key = folder/"munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    here, before = Cluster(folder, cpus), os.environ.get("SLURM_CONF")
    try:
        here.daemon(
            "munged", "-F", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
        )
        wait(lambda: (folder/"munge.socket").exists())
        here.daemon("slurmctld", "-D", "-i")
        wait(lambda: here("sinfo", "-h").returncode == 0)
        here.start_node()
        os.environ["SLURM_CONF"] = here.conf
        yield here
    finally:
        here("scancel", "-u", "root")
        if before is None: os.environ.pop("SLURM_CONF", None)
        else: os.environ["SLURM_CONF"] = before
        for process in reversed(here.processes):
            with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGTERM)
        for process in reversed(here.processes):
            try: process.wait(10)
            except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)
