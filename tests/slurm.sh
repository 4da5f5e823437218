#!/usr/bin/env bash
# Starts a real Slurm with one node, this machine, and leaves it running: tests/slurm.sh DIR [CPUS]. Needs root and Debian's
# packages slurm-wlm and munge. Its files are in DIR; use it with SLURM_CONF=DIR/slurm.conf. tests/slurm.sh DIR stop ends it.
set -euo pipefail
dir=$(realpath "$1")
if [[ ${2:-} == stop ]]; then
    for name in slurmctld slurmd munged; do kill "$(cat "$dir/$name.pid")" 2>/dev/null || true; done
    exit 0
fi
for tool in munged slurmctld slurmd sbatch; do
    command -v "$tool" >/dev/null || { echo "$tool is not installed (Debian: slurm-wlm, munge)" >&2; exit 1; }
done
[[ $(id -u) == 0 ]] || { echo "only root can start slurmd" >&2; exit 1; }
mkdir -p "$dir/state" "$dir/spool"
dd if=/dev/urandom of="$dir/munge.key" bs=1024 count=1 status=none
chmod 400 "$dir/munge.key"
chmod 755 "$dir"
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
host=$(hostname -s)
cat >"$dir/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${SLURM_PORT:-6817}
SlurmdPort=$((${SLURM_PORT:-6817} + 1))
SlurmUser=root
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SchedulerParameters=requeue_delay=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=${2:-2} State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOF
export SLURM_CONF=$dir/slurm.conf
slurmctld
slurmd
for _ in $(seq 30); do
    [[ $(sinfo --noheader --format=%t 2>/dev/null) == idle ]] && exit 0
    sleep 1
done
echo "Slurm has not come up: $(tail -n 1 "$dir/slurmctld.log") $(tail -n 1 "$dir/slurmd.log")" >&2
exit 1
