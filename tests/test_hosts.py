"""Two hosts, played by network namespaces with a cable between them: the command of docs/cluster.md gives one machine's curve."""

import subprocess
import sys
from pathlib import Path

import pytest

from megafn.runtime.checkpoint import checkpoint
from pool import run_script
from test_checkpoint import text_config, train

UNSHARE = [
    "unshare",
    "--user",
    "--map-root-user",
    "--net",
    "--uts",
    "--mount",
]  # needs no root, and all of it goes with the processes

# $1: a folder; then the command that each host runs, under its own name and address, with one /etc/hosts
TWO_HOSTS = r"""
set -e
printf '127.0.0.1 localhost\n10.77.0.1 host0\n10.77.0.2 host1\n' > "$1/hosts"
mount --bind "$1/hosts" /etc/hosts
shift
unshare --net --uts sleep 1000 & other=$!
trap 'kill $other' EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/$$/ns/net)" ] || [ "$(cat /proc/$other/comm)" != sleep ]; do sleep 0.1; done
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
seen = []
mf.train(config_of(sys.argv[1]), on_metrics=[lambda metrics: seen.append((metrics.iteration, metrics.loss, metrics.grad_norm))])
pathlib.Path(sys.argv[2] + os.environ["RANK"]).write_text(socket.gethostname() + " saw " + repr(seen))
"""


def config_of(directory=None):
    return text_config(directory, pp=2, tp=2)


def two_hosts(folder, *command, **settings):
    """The CompletedProcess of `command`, run on host0 and on host1."""
    unshared = [
        "-c",
        "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])",
        *UNSHARE,
        "sh",
        "-c",
        TWO_HOSTS,
        "sh",
        folder,
    ]
    return run_script([*unshared, *command], **settings)


@pytest.fixture
def namespaces(tmp_path):
    """Skips, with the reason, where no namespaces can be made."""
    try:
        tried = two_hosts(tmp_path, "sh", "-c", "uname -n", timeout=60)
    except subprocess.TimeoutExpired as expired:
        pytest.fail(str(expired.stderr))
    if tried.returncode != 0:
        pytest.skip(f"no two hosts can be played here: {tried.stderr.strip()[-500:]}")
    assert sorted(tried.stdout.split()) == ["host0", "host1"]


@pytest.mark.timeout(600)
def test_two_hosts_give_one_machines_curve(namespaces, pool, tmp_path):
    """tp within a host, the two stages on a host each, and a checkpoint folder that both share."""
    directory, script = tmp_path / "there", tmp_path / "script.py"
    script.write_text(TRAIN)
    done = two_hosts(
        tmp_path,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "host0:29500",
        "--rdzv-id",
        "run1",
        script,
        directory,
        tmp_path / "rank",
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    hosts, curves = zip(
        *((tmp_path / f"rank{rank}").read_text().split(" saw ") for rank in range(4))
    )
    assert hosts[0] == hosts[1] != hosts[2] == hosts[3], hosts
    (curve, *_), *_ = pool(4, train, config_of())
    assert set(curves) == {repr(curve)}
    assert list(checkpoint.checkpoints(directory)) == [2, 4, 6, 7]
