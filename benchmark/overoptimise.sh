#!/usr/bin/env bash
# Over-optimisation: no KL penalty, 200 updates. The reward-model score keeps rising, the rubric does not.
# Uses the models of `python benchmark/seeds.py --seeds 1`; both runs at once on one thread each, about 8 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
for script in ppo drpo; do
  python $script.py --kl-coef 0 --total-episodes 12800 --eval-every 20 --run-name overoptimise_$script \
    --sft-path models/seeds_1/sft --reward-path models/seeds_1/reward --output-dir models/overoptimise_$script &
  pids="${pids:-} $!"
done
for pid in $pids; do wait "$pid"; done
