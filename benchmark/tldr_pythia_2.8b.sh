#!/usr/bin/env bash
# The paper's TL;DR experiment (arXiv:2404.08495v3, Tables 1 and 5): Pythia-2.8B on one GPU with 80 GB.
#   benchmark/tldr_pythia_2.8b.sh --dry-run      a minute: flags, columns and sizes of every step, without weights
#   benchmark/tldr_pythia_2.8b.sh
# Not run so far: no GPU and no model hub could be reached where this was written. The dry run was tested on local files of
# the same shapes. The memory at each step is that of weights, gradients and AdamW, which the dry run counts;
# activations come on top.
#
# Numbers are those of the paper's Table 5. Where the official code (Cornell-RL/drpo at bd825df, src/tldr) disagrees:
#                      paper            code                     here
#   SFT                all weights      LoRA                     all weights
#   SFT batch          64               128                      64
#   reward model       not stated       all weights, batch 60    all weights, batch 64 (Table 6: LoRA is less accurate)
#   SFT, RM, DPO lr    linear decay     cosine decay             linear decay
#   RL episodes        1 epoch (117K)   1,000,000                1 epoch; EPISODES=1000000 for the other
#   RL temperature     0.1              0.7, evaluation 0.01     as the code: at 0.1 there is little left to explore
#   rewards            not stated       whitened                 not whitened
#   LoRA layers        not stated       query_key_value          query_key_value; LORA_TARGET=all-linear for more
#   reset prefix       not trained on   in KL, value loss too    masked everywhere
# Data: 117K posts and 93K pairs; DPO looks at 1,000 of the validation pairs.
# With JUDGE_MODEL set, that model at JUDGE_URL compares 600 summaries, about as many as in the paper; else the reward model.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${BASE:-EleutherAI/pythia-2.8b-deduped}
posts=${SFT_DATA:-trl-lib/tldr}
pairs=${PAIR_DATA:-trl-lib/tldr-preference}
models=${MODELS:-models/tldr_2.8b}
step() { python "$@"; }
if [ "${1:-}" = --dry-run ]; then
  chain=$(mktemp -d)
  trap 'rm -rf "$chain"' EXIT
  step() { python benchmark/dry_run.py --chain "$chain/chain.json" "$@"; }
fi
size=(--dtype bfloat16 --gradient-checkpointing --micro-batch-size "${MICRO_BATCH:-16}")
lora=(--lora-rank "${LORA_RANK:-1024}" --lora-alpha "${LORA_ALPHA:-2048}" --lora-target "${LORA_TARGET:-query_key_value}")
post=(--prompt-length 512 --response-length 53)
pair=(--prompt-length 512 --response-length 169)
from=(--sft-path "$models/sft" --reward-path "$models/reward")
judge=(--judge reward-model)
if [ -n "${JUDGE_MODEL:-}" ]; then
  judge=(--judge api --api-model "$JUDGE_MODEL" --api-base-url "${JUDGE_URL:-http://localhost:8000/v1}")
fi

# supervised policy, all weights: 41 GiB
step sft.py --dataset "$posts" --base-model "$base" --output-dir "$models/sft" --run-name tldr_sft \
  --num-epochs 1 --batch-size 64 --learning-rate 3e-6 "${post[@]}" "${size[@]}"
# reward model, all weights: 39 GiB
step reward_model.py --dataset "$pairs" --eval-split validation --reference-dataset "$posts" --sft-path "$models/sft" \
  --output-dir "$models/reward" --run-name tldr_reward --num-epochs 1 --batch-size 64 --learning-rate 3e-6 \
  --center-coef 0 "${pair[@]}" "${size[@]}"
# DPO, LoRA: 15 GiB
step dpo.py --dataset "$pairs" --sft-path "$models/sft" --output-dir "$models/dpo" --run-name tldr_dpo --eval-every 100 \
  --num-epochs 1 --batch-size 64 --learning-rate 3e-6 --beta 0.05 "${pair[@]}" "${size[@]}" "${lora[@]}"
rl=(--dataset "$posts" "${from[@]}" --total-episodes "${EPISODES:-116736}" --batch-size 512 --minibatch-size 512
  --num-ppo-epochs 4 --learning-rate 3e-6 --gamma 1 --gae-lambda 0.95 --clip-coef 0.2 --vf-coef 0.1 --kl-coef 0.05
  --temperature 0.7 --eval-every 20 "${post[@]}" "${size[@]}" "${lora[@]}")
# PPO, LoRA on policy and critic: 30 GiB; with LORA_TARGET=all-linear 60, and then a smaller MICRO_BATCH
step ppo.py --output-dir "$models/ppo" --run-name tldr_ppo "${rl[@]}"
# DR-PO: as PPO
step drpo.py --output-dir "$models/drpo" --run-name tldr_drpo --beta 1 "${rl[@]}"
# the table: 41 GiB for three policies and the reward model, of which judge.py holds one or two at a time
step judge.py --policies "$models/sft" "$models/dpo" "$models/ppo" "$models/drpo" "${from[@]}" --dataset "$posts" \
  --num-prompts 600 --train-temperature 0.7 --temperature 0.01 --run-name tldr_judge "${post[@]}" \
  --dtype bfloat16 --micro-batch-size "${MICRO_BATCH:-16}" "${judge[@]}"
