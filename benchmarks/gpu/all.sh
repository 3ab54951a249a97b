#!/usr/bin/env bash
# All GPU benchmarks in under 9 minutes:  benchmarks/gpu/all.sh FOLDER [OPTIONS FOR EVERY SCRIPT]
#
# Writes FOLDER/<name>.json, <name>.log and figures, goes on after a failure, and exits with 1 if a script failed
# or an aim was missed. PYTHON names the interpreter, SECONDS_IN_ALL (540) bounds the whole.
set -u
folder=${1:?usage: all.sh FOLDER [OPTIONS]}
shift
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
limit=${SECONDS_IN_ALL:-540}
export PYTHONPATH="$here/../../src${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$folder"
names=()
started=$SECONDS

run() { # NAME SECONDS OPTIONS…: no longer than SECONDS, nor than what is left of the whole
    local name=$1 seconds=$2 left=$((limit - 10 - (SECONDS - started)))
    shift 2
    names+=("$name")
    rm -f "$folder/$name.json"
    ((left < seconds)) && seconds=$left
    if ((seconds < 5)); then
        echo "$name: no time is left" | tee "$folder/$name.log"
        return
    fi
    local began=$SECONDS status=0
    timeout --kill-after=5 "$seconds" "$python" "$here/$name.py" "$@" \
        >"$folder/$name.out" 2>"$folder/$name.log" || status=$?
    tail -n 1 "$folder/$name.out" | grep '^{' >"$folder/$name.json" || rm -f "$folder/$name.json"
    cat "$folder/$name.out" >>"$folder/$name.log"
    rm "$folder/$name.out"
    echo "$name: status $status after $((SECONDS - began)) s"
}

run correctness 90 "$@"
run kernel_speed 60 "$@"
run decode_step 60 "$@"
run prefill 40 "$@"
run load 40 "$@"
run cold_start 110 --rounds 8 "$@"
run adapters_2000 90 "$@"
run peft_throughput 60 "$@"
run workloads 200 --scenarios S3 --seconds 6 --longest-response 256 --stop-after 130 "$@"
echo
"$python" "$here/summary.py" "$folder" "${names[@]}"
