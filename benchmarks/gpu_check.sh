#!/usr/bin/env bash
# Does qdv_gpu work on this machine's GPU, and how fast? For any CUDA machine, with or without internet.
#
#   benchmarks/gpu_check.sh [--out DIR] [--python PYTHON] [STAGE...]
#
# Stages, all of them if none is named: install doctor tests memcheck racecheck, and those of `python -m benchmarks`.
# Each writes DIR/<stage>.json as soon as it is done, and its output to DIR/<stage>.log; verdict.json sums up. The exit
# status is 0 if every stage that ran is ok. A stage whose tool is missing is "skipped", with the reason. What the
# benchmarks measure is in DIR/benchmarks.json, which later runs with other stages add to.
set -uo pipefail
cd "$(dirname "$0")/.."

out=gpu-check python=python3
benchmarks=(transfer forward layers pca affinities tsne neighbors unpool deconv table3 trace)
stages=()
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out=$2; shift 2 ;;
        --python) python=$2; shift 2 ;;
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) echo "unknown option $1 (--out DIR, --python PYTHON)" >&2; exit 2 ;;
        *) stages+=("$1"); shift ;;
    esac
done
known=(install doctor tests memcheck racecheck "${benchmarks[@]}")
[ ${#stages[@]} -gt 0 ] || stages=("${known[@]}")
for stage in "${stages[@]}"; do
    [[ " ${known[*]} " == *" $stage "* ]] || { echo "unknown stage $stage: allowed are ${known[*]}" >&2; exit 2; }
done
mkdir -p "$out"
out=$(cd "$out" && pwd)

# Kernel tests that a sanitizer, which slows them down a hundredfold, gets through in a minute.
kernel_tests=(tests/test_kernels.py tests/deconv/test_unpool.py -m gpu -q -x -k "autograd and (31 or batch) or bits_of_the_cpu")

sanitize() {
    local tool
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) || {
        echo "compute-sanitizer is not installed"
        return 77
    }
    timeout 240 "$tool" --tool "$1" --error-exitcode 1 "$python" -m pytest "${kernel_tests[@]}"
}

run_stage() {
    case "$1" in
        install) "$python" -m pip install --quiet --no-deps --no-build-isolation . ;;
        doctor) "$python" -c 'from qdv_gpu.cli import main; main()' doctor --device cuda ;;
        tests) timeout 300 "$python" -m pytest -m gpu -q ;;
        memcheck | racecheck) sanitize "$1" ;;
        *) timeout 300 "$python" -m benchmarks --device cuda --stage "$1" --json "$out/benchmarks.json" ;;
    esac
}

failed=0
for stage in "${stages[@]}"; do
    started=$(date +%s.%N)
    run_stage "$stage" >"$out/$stage.log" 2>&1
    status=$?
    case $status in 0) result=ok ;; 77) result=skipped ;; *) result=failed; failed=1 ;; esac
    "$python" - "$out" "$stage" "$result" "$started" <<'PYTHON'
import json, pathlib, sys, time
out, stage, result, started = pathlib.Path(sys.argv[1]), *sys.argv[2:]
lines = (out / f"{stage}.log").read_text(errors="replace").strip().splitlines()
entry = {"stage": stage, "result": result, "seconds": round(time.time() - float(started), 1), "last_lines": lines[-12:]}
missed = [line.strip() for line in lines if line.strip().startswith("MISSED")]
(out / f"{stage}.json").write_text(json.dumps(entry | ({"missed": missed} if missed else {}), indent=2) + "\n")
print(f"{stage:<11}{result:<9}{entry['seconds']:>7} s  {'; '.join(missed) or (lines[-1] if lines and result != 'ok' else '')}")
PYTHON
done
"$python" - "$out" "${known[@]}" <<'PYTHON'
import json, pathlib, sys
out, known = pathlib.Path(sys.argv[1]), sys.argv[2:]
entries = [json.loads((out / f"{stage}.json").read_text()) for stage in known if (out / f"{stage}.json").is_file()]
verdict = {"ok": all(entry["result"] != "failed" for entry in entries), "seconds": round(sum(e["seconds"] for e in entries), 1)}
verdict |= {"bars_missed": [line for entry in entries for line in entry.get("missed", [])]}
verdict |= {"stages": {entry["stage"]: entry["result"] for entry in entries}}
(out / "verdict.json").write_text(json.dumps(verdict, indent=2) + "\n")
print(f"{'ok' if verdict['ok'] else 'FAILED'}: {out / 'verdict.json'}")
PYTHON
exit $failed
