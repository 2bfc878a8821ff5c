#!/usr/bin/env bash
# Everything that only a GPU can show, in at most eight minutes: `tests/gpu/run.sh --help`. Runs from a clone: nothing has to be installed,
# and what git sees of the clone stays as it is.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$root:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m gpu.run "$@"
