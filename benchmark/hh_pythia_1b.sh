#!/usr/bin/env bash
# The paper's dialogue experiment (arXiv:2404.08495v3, Figure 3) at 1B: Anthropic HH, one GPU with 80 GB.
#   benchmark/hh_pythia_1b.sh --dry-run      a minute: flags, columns and sizes of every step, without weights
#   benchmark/hh_pythia_1b.sh
# Not run so far: no GPU and no model hub could be reached where this was written. The dry run was tested on local files of
# the same shapes. The memory at each step is that of weights, gradients and AdamW, which the dry run counts;
# activations come on top.
#
# The paper prints no hyperparameters for HH, and the official code has no HH scripts (the paper names TRLx). Used here are
# those of TL;DR (Table 5, see tldr_pythia_2.8b.sh), with three choices of our own: all weights are trained, as 1B fits;
# answers have up to 128 tokens; training samples at temperature 1. The judge decodes at 0.01, as the paper does.
# With JUDGE_MODEL set, that model at JUDGE_URL compares 600 answers; else the reward model does.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${BASE:-EleutherAI/pythia-1b-deduped}
data=${DATA:-Anthropic/hh-rlhf}
models=${MODELS:-models/hh_1b}
step() { python "$@"; }
if [ "${1:-}" = --dry-run ]; then
  chain=$(mktemp -d)
  trap 'rm -rf "$chain"' EXIT
  step() { python benchmark/dry_run.py --chain "$chain/chain.json" "$@"; }
fi
common=(--dataset "$data" --prompt-length 512 --response-length 128
  --dtype bfloat16 --micro-batch-size "${MICRO_BATCH:-16}")
train=("${common[@]}" --gradient-checkpointing --learning-rate 3e-6)
from=(--sft-path "$models/sft" --reward-path "$models/reward")
judge=(--judge reward-model)
if [ -n "${JUDGE_MODEL:-}" ]; then
  judge=(--judge api --api-model "$JUDGE_MODEL" --api-base-url "${JUDGE_URL:-http://localhost:8000/v1}"
    --judge-prompt dialogue)
fi

# supervised policy: 15 GiB
step sft.py "${train[@]}" --validation-split test --base-model "$base" --output-dir "$models/sft" --run-name hh_sft \
  --num-epochs 1 --batch-size 64
# reward model: 14 GiB
step reward_model.py "${train[@]}" --validation-split test --reference-dataset "$data" --sft-path "$models/sft" --output-dir "$models/reward" \
  --run-name hh_reward --num-epochs 1 --batch-size 64 --center-coef 0
# DPO: 15 GiB
step dpo.py "${train[@]}" --validation-split test --sft-path "$models/sft" --output-dir "$models/dpo" --run-name hh_dpo \
  --num-epochs 1 --batch-size 64 --beta 0.05 --eval-every 100
rl=("${train[@]}" --validation-split test --eval-split test "${from[@]}" --total-episodes "${EPISODES:-116736}"
  --batch-size 512 --minibatch-size 512 --num-ppo-epochs 4 --gamma 1 --gae-lambda 0.95 --clip-coef 0.2 --vf-coef 0.1
  --kl-coef 0.05 --eval-every 20)
# PPO: 36 GiB
step ppo.py "${rl[@]}" --output-dir "$models/ppo" --run-name hh_ppo
# DR-PO: 36 GiB
step drpo.py "${rl[@]}" --output-dir "$models/drpo" --run-name hh_drpo --beta 1
# the table: 15 GiB for three policies and the reward model, of which judge.py holds one or two at a time
step judge.py "${common[@]}" --policies "$models/sft" "$models/dpo" "$models/ppo" "$models/drpo" "${from[@]}" \
  --num-prompts 600 --temperature 0.01 --run-name hh_judge "${judge[@]}"
