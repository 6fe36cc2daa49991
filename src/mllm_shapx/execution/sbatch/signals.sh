# --- Signals
# USR1 comes before the time limit and at a preemption: the study drains and the job is requeued.
# TERM comes when Slurm ends the job: the study drains, and Slurm decides what becomes of the job.
asked='' woken='' driver=''
ask() {
  woken=1
  [ -z "$asked" ] || return 0
  asked=$1
  [ -z "$driver" ] || kill -TERM "$driver" 2> /dev/null
}
trap 'ask USR1' USR1
trap 'ask TERM' TERM

# Runs the study and leaves its exit code in $code. A signal ends `wait` early, which is then called again.
run_study() {
  code=143
  [ -z "$asked" ] || return 0
  "$@" &
  driver=$!
  [ -z "$asked" ] || kill -TERM "$driver" 2> /dev/null
  while :; do
    woken=''
    wait "$driver"
    code=$?
    [ -n "$woken" ] || return 0
  done
}
