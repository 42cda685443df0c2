#!/usr/bin/env bash
# The paper's transfer test (arXiv:2404.08495v3, Table 3): the policies of tldr_pythia_2.8b.sh summarise news they were never
# trained on, CNN/DailyMail, in up to 64 tokens. The table has win rate and ROUGE (pip install rouge-score).
#   benchmark/cnndm_transfer.sh --dry-run      seconds: flags, columns and sizes, without weights
#   benchmark/cnndm_transfer.sh
# Not run so far: no GPU and no model hub could be reached where this was written. The dry run was tested on local files of
# the same shapes. The memory is that of the weights, which the dry run counts.
#
# Longer articles lose their beginning, which in news says most, so the prompt takes all that Pythia's 2,048 positions leave;
# the official code's limit for TL;DR is 512, none is stated for news. The paper's row "SFT trained on CNN/DM" is not made.
# With JUDGE_MODEL set, that model at JUDGE_URL compares 600 summaries; JUDGE_PROMPT may name a file with a question for news,
# since the default one speaks of a forum post. Without it, the reward model of TL;DR compares, which is far from its data.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${NEWS_DATA:-abisee/cnn_dailymail}
models=${MODELS:-models/tldr_2.8b}
step() { python "$@"; }
if [ "${1:-}" = --dry-run ]; then # the TL;DR recipe need not have been run: its base model stands for what it makes
  for name in sft dpo ppo drpo reward; do
    stand_ins+=(--stand-in "$models/$name=${BASE:-EleutherAI/pythia-2.8b-deduped}")
  done
  step() { python benchmark/dry_run.py "${stand_ins[@]}" "$@"; }
fi
judge=(--judge reward-model)
if [ -n "${JUDGE_MODEL:-}" ]; then
  judge=(--judge api --api-model "$JUDGE_MODEL" --api-base-url "${JUDGE_URL:-http://localhost:8000/v1}"
    --judge-prompt "${JUDGE_PROMPT:-tldr}")
fi

# the table: 41 GiB for three policies and the reward model, of which judge.py holds one or two at a time
step judge.py --dataset "$data" --dataset-config "${NEWS_CONFIG-3.0.0}" --split test --num-prompts 600 \
  --policies "$models/sft" "$models/dpo" "$models/ppo" "$models/drpo" \
  --sft-path "$models/sft" --reward-path "$models/reward" --run-name cnndm_judge \
  --prompt-length 1984 --response-length 64 --temperature 0.01 --train-temperature 0.7 \
  --dtype bfloat16 --micro-batch-size "${MICRO_BATCH:-8}" "${judge[@]}"
