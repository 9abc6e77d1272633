#!/bin/bash
# Start the ranks by mpirun or mpiexec, of Open MPI, MPICH or Intel MPI; the ranks need mpi4py.
#
#   launch/mpi.sh -n 16 --hostfile launch/hostfile -- --config my.yaml
#
# What stands before -- goes to mpirun, the rest to launch/init.py. Start it at the root of the repository, which every
# node must see under the same path.
set -euo pipefail

mpirun_arguments=()
while (( $# )) && [[ $1 != -- ]]; do
    mpirun_arguments+=("$1")
    shift
done
if (( ! $# )); then
    sed -n '4p' "$0" >&2
    exit 2
fi
shift
exec "${MPIRUN:-mpirun}" "${mpirun_arguments[@]}" python launch/init.py "$@"
