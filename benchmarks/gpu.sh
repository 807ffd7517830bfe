#!/usr/bin/env bash
# What needs a GPU, in one go and in this order: its tests, make bench, a grid on the fast lane. Each is saved as it ends,
# in OUT: tests.log, bench.{md,json,log}, results.{md,json,png}, grid.log. On a GPU it is made for less than 15 minutes.
#
#   benchmarks/gpu.sh [DATA_DIR]                       # the images of tin100.yaml, a folder or tar file of one
#   DEVICE=cpu BENCH='--quick --sections operator' GRID=benchmarks/grids/digits.yaml MORE='--epochs 1' benchmarks/gpu.sh
#
# PYTHON, OUT, DEVICE, JOBS, MINUTES (of the grid), MORE (flags of every training, here 10 epochs: the grid's rows of more
# epochs are then like the others), and TESTS, BENCH, GRID (arguments of pytest, of bench.py, the grid) may be set.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-output/gpu} DEVICE=${DEVICE:-cuda} JOBS=${JOBS:-4} MINUTES=${MINUTES:-4}
TESTS=${TESTS:-} BENCH=${BENCH:---quick --sections operator loader step memory} GRID=${GRID:-benchmarks/grids/tin100.yaml}
MORE=${MORE:---epochs 10}
mkdir -p "$OUT"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 SYNERMIX_TEST_DEVICE=$DEVICE
status=0

part() { # part NAME SECONDS COMMAND...: its log, how it ended, how long it took
    local name=$1 limit=$2 start=$SECONDS ended
    shift 2
    timeout --signal INT --kill-after 20 "$limit" "$@" >"$OUT/$name.log" 2>&1
    ended=$?
    [ $ended = 0 ] || status=1
    echo "$name: exit code $ended after $((SECONDS - start)) s"
    tail -n 3 "$OUT/$name.log"
}

# shellcheck disable=SC2086  # several words each
part tests 240 "$PYTHON" -m pytest -q -rs --durations=0 -p no:cacheprovider -m '' tests/test_gpu.py $TESTS

# shellcheck disable=SC2086
part bench 200 "$PYTHON" benchmarks/bench.py --device "$DEVICE" $BENCH --output "$WORK/bench"
cp "$WORK"/bench/bench.* "$OUT" 2>/dev/null

# shellcheck disable=SC2086
part grid $((60 * MINUTES + 120)) "$PYTHON" benchmarks/reproduce.py "$GRID" ${1:+--data-dir "$1"} --device "$DEVICE" \
    --seeds 0 --jobs "$JOBS" --budget-minutes "$MINUTES" --output "$WORK/grid" -- $MORE
cp "$WORK"/grid/*/results.* "$OUT" 2>/dev/null
exit $status
