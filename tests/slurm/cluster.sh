#!/bin/sh
# tests/slurm/cluster.sh COMMAND …: run a command on a Slurm of its own: this machine is controller and node. Debian, root.
# Its files, key, ports and daemons are separate from a Slurm that is installed here; they end with the command.
set -eu

missing=
for name in slurmctld slurmd sbatch munged; do command -v $name >/dev/null || missing=yes; done
if [ -n "$missing" ]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
fi

place=$(mktemp -d /tmp/hipexp-slurm-XXXXXX)
chmod 755 "$place"
mkdir "$place/state" "$place/spool"
host=$(hostname -s)
cpus=$(nproc)

(umask 077 && dd if=/dev/urandom of="$place/munge.key" bs=128 count=1 status=none)

# cred_expire is also how long a requeued job waits. low is preempted by high: SIGTERM, GraceTime seconds, SIGKILL, back into the queue.
cat >"$place/slurm.conf" <<CONF
ClusterName=hipexp
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$place/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
ReturnToService=2
MpiDefault=none
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=low Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=3
PartitionName=high Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off
CONF
export SLURM_CONF="$place/slurm.conf"

stop() {
  [ -z "${command:-}" ] || kill "$command" 2>/dev/null || true
  scancel --full --signal=KILL --quiet --user root 2>/dev/null || true
  scancel --quiet --user root 2>/dev/null || true
  tries=0
  while [ $tries -lt 60 ] && [ -n "$(squeue --noheader 2>/dev/null)" ]; do
    tries=$((tries + 1))
    sleep 0.5
  done
  for name in slurmd slurmctld munged; do
    [ -f "$place/$name.pid" ] || continue
    pid=$(cat "$place/$name.pid")
    kill "$pid" 2>/dev/null || true
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
  done
  [ -n "${KEEP:-}" ] && echo "kept: $place" || rm -rf "$place"
}
trap stop EXIT
trap 'exit 130' INT TERM

munged --force --key-file="$place/munge.key" --socket="$place/munge.socket" --pid-file="$place/munged.pid" \
  --log-file="$place/munged.log" --seed-file="$place/munged.seed"
slurmctld
slurmd -N "$host"
tries=0
until sinfo --noheader --partition low --format %T 2>/dev/null | grep -q idle; do
  tries=$((tries + 1))
  if [ $tries -gt 60 ]; then
    cat "$place"/*.log >&2
    exit 1
  fi
  sleep 0.5
done
"$@" & # in the background, so that signals end it and the daemons at once
command=$!
wait $command
