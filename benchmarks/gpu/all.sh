#!/usr/bin/env bash
# All GPU benchmarks in under 9 minutes:  benchmarks/gpu/all.sh FOLDER [OPTIONS FOR EVERY SCRIPT]
#
# Compiles all kernels first, on all cores, then runs what is short and tells most first. Writes FOLDER/<name>.json,
# <name>.log and figures, and FOLDER.tar.gz of all of it. Goes on after a failure; a script that is stopped leaves what
# it had measured by then, and so does this one: on SIGTERM it ends the script, and packs what there is. Exits with 1 if a script failed or an aim was missed. PYTHON names the interpreter,
# SECONDS_IN_ALL (540) bounds the whole, ONLY names the scripts to run (default: all).
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
child=
is_stopped=0

stop() {
    is_stopped=1
    [[ -z $child ]] || kill "$child" 2>/dev/null
}
trap stop TERM INT

bounded() { # SECONDS COMMAND…: a signal is heard while it runs, and ends it
    timeout --kill-after=5 "$@" &
    child=$!
    ((is_stopped)) && kill "$child" 2>/dev/null
    local status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child" || status=$?; done
    child=
    return "$status"
}

run() { # NAME SECONDS OPTIONS…: no longer than SECONDS, nor than what is left of the whole
    local name=$1 seconds=$2 left=$((limit - 10 - (SECONDS - started)))
    shift 2
    [[ " ${ONLY:-$name} " == *" $name "* ]] || return 0
    ((is_stopped)) && return 0
    names+=("$name")
    rm -f "$folder/$name.json"
    ((left < seconds)) && seconds=$left
    if ((seconds < 5)); then
        echo "$name: no time is left" | tee "$folder/$name.log"
        return
    fi
    local began=$SECONDS status=0
    bounded "$seconds" "$python" "$here/$name.py" "$@" >"$folder/$name.out" 2>"$folder/$name.log" || status=$?
    grep '^{' "$folder/$name.out" | tail -n 1 >"$folder/$name.json"
    [[ -s "$folder/$name.json" ]] || rm "$folder/$name.json"
    cat "$folder/$name.out" >>"$folder/$name.log"
    rm "$folder/$name.out"
    echo "$name: status $status after $((SECONDS - began)) s"
}

# What the scripts launch is compiled by as many processes as there are cores: later steps find it in Triton's cache.
bounded 60 "$python" "$here/compile_here.py" "$@" >"$folder/compile.log" 2>&1
echo "compile: status $? after $((SECONDS - started)) s"
run load 40 "$@"
run prefill 40 "$@"
run decode_step 60 "$@"
run kernel_speed 60 "$@"
run correctness 120 "$@"
run cold_start 110 --rounds 8 "$@"
run adapters_2000 90 "$@"
run peft_throughput 60 "$@"
run workloads 200 --scenarios S3 --seconds 6 --longest-response 256 --stop-after 130 "$@"
echo
status=0
"$python" "$here/summary.py" "$folder" "${names[@]}" | tee "$folder/summary.txt"
status=${PIPESTATUS[0]}
tar -czf "${folder%/}.tar.gz" -C "$(dirname "$folder")" "$(basename "$folder")"
((is_stopped)) && status=143
exit "$status"
