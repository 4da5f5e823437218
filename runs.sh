#!/usr/bin/env bash
# The grid: every task with every method and seed, on this machine or on Slurm. Start it again at any time: what has
# finished is skipped, what was stopped goes on from its checkpoint.
#
#   DRY=1 ./runs.sh                                                       shows what would run; the whole grid of the paper
#   ENVS="DI ODE" METHODS="DR DMAstar-SH" SEEDS="1 2 3" STEPS=50000 ./runs.sh        on all cores of this machine
#   RUNNER=slurm TIME=12:00:00 SBATCH="--mem=4G --partition=cpu" ./runs.sh           as one job array
set -uo pipefail

ENVS=${ENVS:-DI DI-Friction DI-Perm ODE Cartpole Cheetah Reacher-E Reacher-H Reacher-H-Perm BallInCup Walker WalkerGym HopperGym}
METHODS=${METHODS:-DR Concat DA DMA DMA-Pearl DMAstar DMAstar-SH}
SEEDS=${SEEDS:-1 2 3 4 5 6 7 8 9 10}
STEPS=${STEPS:-}              # default: each task's own number
FLAGS=${FLAGS:-}              # more flags for every run, such as "--track"
RUN_DIR=${RUN_DIR:-runs}      # runs are made here; what they print goes to $RUN_DIR/logs
at_once=${JOBS:+%$JOBS}       # Slurm: as many at a time as JOBS says, or as Slurm likes
JOBS=${JOBS:-$(env -u OMP_NUM_THREADS nproc)}  # runs at a time, with one thread each
PYTHON=${PYTHON:-python}
RUNNER=${RUNNER:-local}       # or slurm
TIME=${TIME:-24:00:00}        # Slurm: limit of a run, which is requeued two minutes before it, three times at most
SBATCH=${SBATCH:-}            # Slurm: more flags of sbatch
DRY=${DRY:-}
export ENVS METHODS SEEDS STEPS FLAGS RUN_DIR JOBS PYTHON RUNNER TIME SBATCH
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
here=${GRID_HOME:-$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")}  # Slurm runs a copy of this file
export GRID_HOME=$here

refuse() { echo "runs.sh: $1" >&2; exit 2; }
[[ -n ${ENVS//[[:space:]]/} && -n ${METHODS//[[:space:]]/} && -n ${SEEDS//[[:space:]]/} ]] || refuse "ENVS, METHODS and SEEDS must not be empty"
[[ $JOBS =~ ^[1-9][0-9]{0,3}$ ]] || refuse "JOBS must be a number from 1 to 9999; got $JOBS"
[[ $RUNNER == local || $RUNNER == slurm ]] || refuse "RUNNER must be local or slurm; got $RUNNER"
[[ $RUN_DIR != -* && $RUN_DIR =~ ^[^[:space:]*?[]+$ ]] || refuse "RUN_DIR must not have spaces or any of *?[, nor begin with -; got '$RUN_DIR'"

script_of() {  # a method's script and flags
    case $1 in
        DR) echo dr_sac.py ;;
        Concat) echo dr_sac.py --context-aware ;;
        Concat-scaled) echo dr_sac.py --context-aware --scale-context ;;
        DA) echo da_sac.py ;;
        DA-scaled) echo da_sac.py --scale-context ;;
        DMA) echo dma_sac.py --mask-prob 0 --no-normalise ;;
        DMA-Pearl) echo dma_sac.py --kl-beta 0.4 ;;
        DMAstar) echo dma_sac.py ;;
        DMAstar-nomask) echo dma_sac.py --mask-prob 0 ;;
        DMAstar-nonorm) echo dma_sac.py --no-normalise ;;
        DMAstar-H) echo dmah_sac.py ;;
        DMAstar-H-RLonly) echo dmah_sac.py --rl-only ;;
        DMA-SH) echo dmash_sac.py --mask-prob 0 --no-normalise ;;
        DMAstar-SH) echo dmash_sac.py ;;
        DMAstar-SH-nomask) echo dmash_sac.py --mask-prob 0 ;;
        DMAstar-SH-nonorm) echo dmash_sac.py --no-normalise ;;
        DMAstar-SH-nodetach-critic) echo dmash_sac.py --no-detach-critic ;;
        DMAstar-SH-nodetach-actor) echo dmash_sac.py --no-detach-actor ;;
        DMAstar-SH-nodetach-critic-nodetach-actor) echo dmash_sac.py --no-detach-critic --no-detach-actor ;;
        HyperZero) echo hyperzero.py ;;
        HyperZero-noQ) echo hyperzero.py --no-q --no-td ;;
        HyperZero-noTD) echo hyperzero.py --no-td ;;
        MLP) echo hyperzero.py --model mlp --no-q --no-td ;;
        UVFA) echo hyperzero.py --model mlp ;;
        HyperDynamics) echo hyperdynamics.py ;;
        HyperDynamics-global) echo hyperdynamics.py --model global ;;
        HyperDynamics-concat) echo hyperdynamics.py --model concat ;;
        HyperDynamics-recurrent) echo hyperdynamics.py --model recurrent ;;
        HyperDynamics-expert) echo hyperdynamics.py --model expert ;;
        *) echo "runs.sh: unknown method $1; allowed: $(sed -n 's/^ *\([A-Z][A-Za-z0-9-]*\)) echo .*/\1/p' "$here/runs.sh" | xargs)" >&2
           return 2 ;;
    esac
}

plan() {  # one line for each run: STATUS HOURS TASK METHOD SEED command ...
    local task method seed script jobs=
    for task in $1; do
        for method in $2; do
            script=$(script_of "$method") || return 2
            for seed in $3; do
                jobs+="$task $method $seed $script ${STEPS:+--total-timesteps $STEPS} ${FLAGS//$'\n'/ }"$'\n'
            done
        done
    done
    PYTHONPATH=$here "$PYTHON" "$here/aib_tools.py" plan "$RUN_DIR" <<<"${jobs%$'\n'}"
}

log_of() { echo "$RUN_DIR/logs/$1__$2__$3.log"; }

one() {  # one run, from whatever state it is in; this shell becomes the run, and its log is locked until that ends
    local status command
    exec 9>>"$(log_of "$1" "$2" "$3")"
    flock --nonblock 9 || { echo "runs.sh: another grid is running this" >&2; exit 75; }
    read -r status _ _ _ _ command < <(plan "$1" "$2" "$3") || exit 2
    [[ $status == done ]] && exit 0
    # shellcheck disable=SC2086
    exec "$PYTHON" "$here/"$command
}

on_slurm() {  # a task of the job array: one run, which is requeued before the time limit or after a crash
    local requeue=1 code
    trap 'requeue=1; kill -TERM $run 2>/dev/null' USR1  # the time limit is near
    trap 'requeue=0; kill -TERM $run 2>/dev/null' TERM  # scancel, or Slurm requeues by itself
    one "$@" &
    run=$!
    while true; do
        wait "$run"
        code=$?
        kill -0 "$run" 2>/dev/null || break
    done
    case $code in 0 | 2 | 3 | 75) requeue=0 ;; esac  # finished; wrong flag or full disk; not finite; runs elsewhere
    if ((requeue && ${SLURM_RESTART_COUNT:-0} < 3)); then
        echo "exit code $code: requeued"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60  # until Slurm ends this one
    fi
    exit "$code"
}

run_local() {  # JOBS runs at a time; Ctrl-C and other signals reach them as SIGTERM, so that they end with a checkpoint
    local task method seed pids=()
    trap 'stopped=1; kill -TERM "${pids[@]}" 2>/dev/null; echo "stopping; start again to go on"' INT TERM HUP
    while read -r _ _ task method seed _; do
        while (($(jobs -rp | wc -l) >= JOBS)); do wait -n; done
        ((stopped)) && break
        setsid "$here/runs.sh" one "$task" "$method" "$seed" >>"$(log_of "$task" "$method" "$seed")" 2>&1 &
        pids+=($!)
    done
    while (($(jobs -rp | wc -l))); do wait -n; done
}

case ${1:-} in
    one) one "$2" "$3" "$4" ;;
    array) read -r _ _ task method seed _ < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$2")
        exec >>"$(log_of "$task" "$method" "$seed")" 2>&1
        on_slurm "$task" "$method" "$seed" ;;
    "") ;;
    *) echo "runs.sh: takes no arguments; its settings are environment variables (see the top of the file)" >&2; exit 2 ;;
esac

planned=$(plan "$ENVS" "$METHODS" "$SEEDS") || exit 2
echo "$planned" | awk '{ command = $6; for (i = 7; i <= NF; i++) command = command " " $i
    printf "%-7s %8s h  %-15s %-12s seed %-3s %s\n", $1, $2, $3, $4, $5, command }'
echo "$planned" | awk '{ n[$1]++; if ($2 == "?") unknown++; else hours += $2 }
    END { printf "%d new, %d to resume, %d done: %.1f core-hours", n["new"], n["resume"], n["done"], hours
          if (n["running"]) printf ", %d running elsewhere", n["running"]
          if (unknown) printf ", and %d runs of unknown speed", unknown; print "" }'
[[ -n $DRY ]] && exit 0
todo=$(grep -v -e ^done -e ^running <<<"$planned") || { echo "nothing to do"; exit 0; }
mkdir -p "$RUN_DIR/logs" || exit 2

if [[ $RUNNER == slurm ]]; then
    list=$RUN_DIR/logs/grid-$(date +%Y%m%d-%H%M%S-%N).txt
    echo "$todo" >"$list"
    # shellcheck disable=SC2086
    exec sbatch --job-name=aib --array="0-$(($(wc -l <"$list") - 1))$at_once" --requeue --open-mode=append --time="$TIME" \
        --signal=B:USR1@120 --cpus-per-task=1 --output=/dev/null --export=ALL $SBATCH "$here/runs.sh" array "$list"
fi

stopped=0
run_local <<<"$todo"
failed=0
echo "--- result"
while read -r status _ task method seed _; do
    log=$(log_of "$task" "$method" "$seed")
    case $status in
        done) echo "done    $task $method seed $seed" ;;
        running) failed=1; echo "RUNNING $task $method seed $seed: elsewhere" ;;
        *) failed=1
           label=FAILED
           ((stopped)) && label=STOPPED
           reason=$(tr '\r' '\n' <"$log" 2>/dev/null | grep -v '^ *$' | tail -n 1)
           echo "$label  $task $method seed $seed: ${reason:-not started} ($log)" ;;
    esac
done < <(plan "$ENVS" "$METHODS" "$SEEDS")
((stopped)) && exit 130
exit "$failed"
