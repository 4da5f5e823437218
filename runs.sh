#!/usr/bin/env bash
# Trains a grid: every task with every method and every seed, on this machine or on Slurm. Start it again at any time,
# with the same settings: what has finished is skipped, what was stopped goes on from its checkpoint.
#
#   DRY=1 ./runs.sh                                        shows what it would do and how long that takes
#   ENVS="DI ODE" METHODS="DR DMAstar-SH" SEEDS=1-3 STEPS=50000 ./runs.sh       on all cores of this machine
#   RUNNER=slurm TIME=12:00:00 SBATCH="--mem=4G --partition=cpu" ./runs.sh      as one job array
#
# Settings are environment variables:
#   ENVS      tasks                                        default: all of the benchmark   (ENVS=list names them)
#   METHODS   methods                                      default: those of the paper     (METHODS=list names them)
#   SEEDS     seeds, such as "1 2 3" or "1-3 7"            default: 1-10
#   STEPS     length of a run in vector steps              default: each task's own
#   FLAGS     more flags for every run, such as "--track"
#   RUN_DIR   where runs are made; what they print goes to RUN_DIR/logs                    default: runs
#   JOBS      runs at a time, with one thread each         default: as many as cores; on Slurm: as it likes
#   DRY       1: only show what would be done
#   PYTHON    the Python that has the packages             default: python
#   RUNNER    local or slurm                               default: local
#   TIME      Slurm: limit of a run, which is requeued two minutes before it, three times at most; default: 24:00:00
#   SBATCH    Slurm: more flags for sbatch
#
# Ctrl-C stops all runs with a checkpoint. Exit code: 0 all runs are done, 1 some are not, 2 a setting is wrong,
# 130 stopped. Runs on Linux and on macOS; Slurm is Linux only.

if [ "$1" = --help ] || [ "$1" = -h ]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" # the lines above
    exit 0
fi

export PYTHON="${PYTHON:-python}"
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
if ! command -v "$PYTHON" >/dev/null; then
    echo "runs.sh: there is no $PYTHON; activate the virtual environment, or set PYTHON" >&2
    exit 2
fi

# Where the repository is. This file may be a link to it; Slurm runs a copy of this file, and knows from GRID_HOME.
if [ "$1" != array ] || [ -z "$GRID_HOME" ]; then
    GRID_HOME=$("$PYTHON" -c 'import os, sys; print(os.path.dirname(os.path.realpath(sys.argv[1])))' "$0") || exit 2
    export GRID_HOME
fi
exec "$PYTHON" "$GRID_HOME/tools/grid.py" "$@"
