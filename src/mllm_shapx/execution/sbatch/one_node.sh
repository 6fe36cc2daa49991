# --- One node: the study starts a Ray instance of its own, closed to other users
export RAY_OVERRIDE_RESOURCES="{\"CPU\": $SLURM_CPUS_ON_NODE, \"GPU\": ${SLURM_GPUS_ON_NODE:-0}}"
run_study "${study[@]}" --address local
