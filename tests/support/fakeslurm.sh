#!/bin/bash
# fakeslurm.sh start DIR SHARED [NODES=2] [CPUS=2] [GPUS=2] | exec DIR CMD... | stop DIR
# A private Slurm cluster. Every node is its own net, pid, mount, uts and ipc namespace: own address, host
# name, process table, /tmp and /dev/shm. SHARED, a folder below /tmp, is the same on all nodes, as is everything
# outside of /tmp. GPUs are fake. Needs root and slurmctld, slurmd, slurm-client, munge, iproute2, util-linux.
# With FAKESLURM_OWNER, a process id, the cluster ends with that process. With FAKESLURM_KEEP, a folder below /tmp,
# nodes see that one too.
set -eu
self=$(readlink -f "$0")
watch_owner() {
  exec > /dev/null 2>&1 < /dev/null
  while [ -n "${FAKESLURM_OWNER:-}" ] && [ -e "$D/ns.pid" ]; do
    kill -0 "$FAKESLURM_OWNER" || "$self" stop "$D"
    sleep 2
  done
}
case $1 in
start)
  D=$(readlink -f "$2"); S=$(readlink -f "$3"); N=${4:-2}; CPUS=${5:-2}; GPUS=${6:-2}
  mkdir -p "$D"/{state,spool,log}
  { echo 127.0.0.1 localhost; echo 10.77.0.1 ctl; for i in $(seq 1 "$N"); do echo "10.77.0.$((10+i)) n$i"; done; } > "$D/hosts"
  { cat <<E
ClusterName=fake
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=1,bf_interval=2
ReturnToService=2
KillWait=10
MinJobAge=3600
JobCompType=jobcomp/filetxt
JobCompLoc=$D/jobcomp.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
E
    g=; [ "$GPUS" -gt 0 ] && g="Gres=gpu:$GPUS"
    for i in $(seq 1 "$N"); do echo "NodeName=n$i NodeAddr=10.77.0.$((10+i)) CPUs=$CPUS RealMemory=8000 $g State=UNKNOWN"; done
    echo "PartitionName=debug Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP"
    echo "PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP"
  } > "$D/slurm.conf"
  : > "$D/gres.conf"; [ "$GPUS" -gt 0 ] && echo "NodeName=n[1-$N] Name=gpu File=/dev/tty[0-$((GPUS-1))]" > "$D/gres.conf"
  unshare -n -p -m -u -i -f --kill-child --mount-proc bash "$self" _ctl "$D" "$N" "$S" > "$D/log/ctl.out" 2>&1 < /dev/null &
  u=$!; disown
  for _ in $(seq 1 300); do
    p=$(tr -d ' ' < "/proc/$u/task/$u/children" 2>/dev/null) || true; echo "$p" > "$D/ns.pid"
    [ -n "$p" ] && [ "$("$self" exec "$D" sinfo -h -t idle -o %D 2>/dev/null)" = "$N" ] && { watch_owner & exit 0; }
    kill -0 $u 2>/dev/null || { cat "$D/log/ctl.out"; exit 1; }
    sleep 0.1
  done
  echo "not up after 30 s"; cat "$D/log/ctl.out"; "$self" stop "$D"; exit 1 ;;
_private) # own /tmp and /dev/shm, with the shared folder in its place
  mkdir -p /run/shared; mount -t tmpfs tmpfs /run/shared
  kept=("$2"); [ -z "${FAKESLURM_KEEP:-}" ] || kept+=("$FAKESLURM_KEEP")
  for i in "${!kept[@]}"; do mkdir "/run/shared/$i"; mount --bind "${kept[i]}" "/run/shared/$i"; done
  mount -t tmpfs tmpfs /tmp -o mode=1777
  for i in "${!kept[@]}"; do mkdir -p "${kept[i]}"; mount --bind "/run/shared/$i" "${kept[i]}"; done
  mount -t tmpfs tmpfs /dev/shm -o mode=1777 ;;
_ctl)
  D=$2; N=$3; S=$4; export SLURM_CONF=$D/slurm.conf
  hostname ctl; ip link set lo up
  mount --bind "$D/hosts" /etc/hosts
  bash "$self" _private "$S"
  mkdir -p /run/munge /run/netns
  mount -t tmpfs tmpfs /run/munge; mount -t tmpfs tmpfs /run/netns
  chown munge:munge /run/munge; runuser -u munge -- /usr/sbin/munged --log-file=/run/munge/log --pid-file=/run/munge/pid --seed-file=/run/munge/seed
  ip link add br0 type bridge; ip addr add 10.77.0.1/24 dev br0; ip link set br0 up
  slurmctld
  for i in $(seq 1 "$N"); do
    ip netns add "n$i"; ip link add "v$i" type veth peer name eth0 netns "n$i"
    ip link set "v$i" master br0 up
    ip -n "n$i" link set lo up; ip -n "n$i" addr add "10.77.0.$((10+i))/24" dev eth0; ip -n "n$i" link set eth0 up
    nsenter --net="/run/netns/n$i" unshare -p -m -u -i -f --kill-child --mount-proc bash "$self" _node "$D" "n$i" "$S" &
  done
  while :; do sleep 3600 & wait $! || true; done ;;
_node)
  export SLURM_CONF=$2/slurm.conf; hostname "$3"
  bash "$self" _private "$4"
  slurmd -D -N "$3" &
  while :; do wait $! || true; sleep 1; done ;;
exec) D=$(readlink -f "$2"); shift 2; exec nsenter -t "$(cat "$D/ns.pid")" -a --wd="$PWD" env SLURM_CONF="$D/slurm.conf" "$@" ;;
stop) D=$(readlink -f "$2"); kill -9 "$(cat "$D/ns.pid")" && rm -f "$D/ns.pid" ;;   # pid 1 of the outer pid namespace: the kernel ends everything in it
esac
