#!/usr/bin/env bash
# cluster/submit.sh CONFIG [OPTION OF RUN...]: run a study as a Ray job. RAY_API_SERVER_ADDRESS names the cluster, such
# as http://127.0.0.1:8265. The same command again goes on where the last job stopped.
set -euo pipefail
config=${1:?give the config: cluster/submit.sh CONFIG [OPTION OF RUN...]}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- \
  python -m mllm_shapx.cli run --config "$config" --resume "${@:2}"
