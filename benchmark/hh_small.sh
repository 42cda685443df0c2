#!/usr/bin/env bash
# The whole chain on real dialogues (Anthropic HH) with a small model from scratch: does everything hold on real data?
# It is no quality result: 3.4 million random weights learn little from 1,300 dialogues.
#   benchmark/hh_small.sh DATASET      a folder or hub name: Anthropic/hh-rlhf, or rows of its form
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?which dataset? for example Anthropic/hh-rlhf}
export OMP_WAIT_POLICY=passive
models=models/hh
splits="--train-split train"
lengths="--prompt-length 192 --response-length 64"
python data/tiny_pythia/build.py --out $models/base --dataset "$data" --vocab-size 4096 --width 192 --layers 4
python sft.py --dataset "$data" $splits --validation-split test --base-model $models/base --output-dir $models/sft \
  --run-name hh_sft --num-epochs 2 --learning-rate 1e-3 $lengths
python reward_model.py --dataset "$data" $splits --validation-split test --reference-dataset "$data" --sft-path $models/sft \
  --output-dir $models/reward --run-name hh_reward --num-epochs 1 --learning-rate 3e-4 $lengths
python dpo.py --dataset "$data" $splits --validation-split test --sft-path $models/sft \
  --output-dir $models/dpo --run-name hh_dpo --batch-size 32 $lengths
python drpo.py --dataset "$data" $splits --validation-split test --eval-split test --sft-path $models/sft \
  --reward-path $models/reward --output-dir $models/drpo --run-name hh_drpo --total-episodes 640 --eval-rows 64 $lengths
python judge.py --dataset "$data" --judge reward-model --policies $models/sft $models/dpo $models/drpo \
  --sft-path $models/sft --reward-path $models/reward --run-name hh_judge $lengths
