# --- The end: 143 says that the study was interrupted and can go on
if [ "$asked" = USR1 ] && [ "$code" -eq 143 ]; then
  if scontrol requeue "JOB_TO_REQUEUE"; then
    echo "requeued; the next start goes on with the study (starts so far: $((${SLURM_RESTART_COUNT:-0} + 1)))"
  else
    echo "the job could not be requeued; submit it again to go on" >&2
  fi
fi
exit "$code"
