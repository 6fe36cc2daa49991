# --- Many nodes: Ray on each of them, with a token, ports and folders of this job
read -r -d '' -a nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
others=$((SLURM_JOB_NUM_NODES - 1))
folder=/tmp/shapx-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
port=$((20000 + SLURM_JOB_ID % 4000 * 3))
ray_log=$SLURM_JOB_NAME-$SLURM_JOB_ID-ray.log
export SLURM_EXPORT_ENV=ALL RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')

step() { # step NODES OPTION... COMMAND...
  srun --overlap --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    --kill-on-bad-exit=0 "${@:2}"
}
# Ray opens its own folder to everybody; the one around it is closed. Slurm ends the steps with the job.
ray_node='
  mkdir -m 700 "$0" || exit
  trap : TERM
  ray start --block --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port="$1" \
    --object-store-memory=1000000000 --disable-usage-stats "${@:2}"
  code=$?
  rm -rf "$0"
  exit "$code"'

# The address of the first node as the second one sees it.
head=$(step 1 --nodelist="${nodes[1]}" getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 {print $1}')
if [ -z "$head" ]; then
  echo "error: ${nodes[1]} finds no IPv4 address of ${nodes[0]}" >&2
  exit 1
fi
step 1 --nodelist="${nodes[0]}" bash -c "$ray_node" "$folder" "$((port + 1))" --head --port="$port" \
  --node-ip-address="$head" --ray-client-server-port="$((port + 2))" \
  --temp-dir="$folder/r" --include-dashboard=false >> "$ray_log" 2>&1 &
head_step=$!
until ray health-check --address "$head:$port" > /dev/null 2>&1; do
  if ! kill -0 "$head_step" 2> /dev/null; then
    echo "error: Ray did not start on ${nodes[0]}; see $ray_log" >&2
    exit 1
  fi
  sleep 1
done
step "$others" --exclude="${nodes[0]}" bash -c "$ray_node" "$folder" "$((port + 1))" \
  --address="$head:$port" >> "$ray_log" 2>&1 &
run_study "${study[@]}" --address "$head:$port" --wait-for-nodes "$SLURM_JOB_NUM_NODES"
