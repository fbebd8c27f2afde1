"""Two hosts, played by network namespaces with a cable between them.

The command of docs/cluster.md gives one machine's curve.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_runs import text_config, train
from megafn.runtime.checkpoint.disk_format import checkpoints
from pool import run_script

# needs no root, and all of it is gone with the processes
UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--uts", "--mount"]

# $1: a folder; then the command that each host runs, under its own name and address, with one
# /etc/hosts
TWO_HOSTS = r"""
set -e
printf '127.0.0.1 localhost\n10.77.0.1 host0\n10.77.0.2 host1\n' > "$1/hosts"
mount --bind "$1/hosts" /etc/hosts
shift
unshare --net --uts sleep 1000 & other=$!
trap 'kill $other' EXIT
is_unshared() {
    [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ] \
        && [ "$(cat /proc/$other/comm)" = sleep ]
}
while ! is_unshared; do sleep 0.1; done
there="nsenter --target $other --net --uts"
ip link add cable type veth peer name cable netns $other
i=0
for host in "" "$there"; do
    $host sh -c "echo host$i > /proc/sys/kernel/hostname"
    $host ip link set lo up
    $host ip address add 10.77.0.$((i + 1))/24 dev cable
    $host ip link set cable up
    i=$((i + 1))
done
export GLOO_SOCKET_IFNAME=cable
$there "$@" & second=$!
"$@"
wait $second
"""

TRAIN = f"""
import os, pathlib, socket, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_hosts import config_of
import megafn as mf
curve = []

def watch(metrics):
    curve.append((metrics.iteration, metrics.loss, metrics.grad_norm))

mf.train(config_of(sys.argv[1]), on_metrics=[watch])
text = socket.gethostname() + " saw " + repr(curve)
pathlib.Path(sys.argv[2] + os.environ["RANK"]).write_text(text)
"""


def config_of(directory=None):
    return text_config(directory, pp=2, tp=2)


def two_hosts(folder, *command, **settings):
    """The CompletedProcess of `command`, run on host0 and on host1."""
    execute = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    unshared = ["-c", execute, *UNSHARE, "sh", "-c", TWO_HOSTS, "sh", folder]
    return run_script([*unshared, *command], **settings)


@pytest.fixture
def namespaces(tmp_path):
    """Skips, with the reason, if no namespaces can be made."""
    try:
        tried = two_hosts(tmp_path, "sh", "-c", "uname -n", timeout=60)
    except subprocess.TimeoutExpired as expired:
        pytest.fail(str(expired.stderr))
    if tried.returncode != 0:
        pytest.skip(f"two hosts cannot be played here: {tried.stderr.strip()[-500:]}")
    assert sorted(tried.stdout.split()) == ["host0", "host1"]


@pytest.mark.timeout(600)
def test_two_hosts_give_one_machines_curve(namespaces, pool, tmp_path):
    """tp within a host, a stage on each host, and a checkpoint folder that both share."""
    directory = tmp_path / "there"
    script = tmp_path / "script.py"
    script.write_text(TRAIN)
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    hosts_and_processes = ["--nnodes", "2", "--nproc-per-node", "2"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29500", "--rdzv-id", "run1"]
    command = [*torchrun, *hosts_and_processes, *meeting, script, directory, tmp_path / "rank"]
    ran = two_hosts(tmp_path, *command, timeout=400)
    assert ran.returncode == 0, ran.stderr[-4000:]
    texts = [(tmp_path / f"rank{rank}").read_text() for rank in range(4)]
    hosts, curves = zip(*(text.split(" saw ") for text in texts), strict=True)
    assert hosts[0] == hosts[1] != hosts[2] == hosts[3], hosts
    one_machine = pool(4, train, config_of())[0]
    assert set(curves) == {repr(one_machine.curve)}
    assert list(checkpoints(directory)) == [2, 4, 6, 7]
