#!/usr/bin/env bash
# The whole chain on a real pretrained model, SmolLM2-135M-Instruct, without a GPU or a hub: SFT, reward model, PPO, DR-PO.
#   pip install gguf peft && benchmark/smollm2.sh      43 minutes on two cores, 5.2 GiB of memory, 3 GB on disk; goes on where it was stopped
# The posts of the embedded task; RL climbs the exact rubric, so that what comes out is not the fault of a reward model. The
# reward model is trained to be looked at: its accuracy, and its scores in the last table. docs/smollm2.md has what came out.
# 320 episodes are 16 times fewer than the embedded task's default.
set -euo pipefail
cd "$(dirname "$0")/.."
models=${MODELS:-models/smol}
export OMP_WAIT_POLICY=passive

# step NAME SCRIPT FLAGS...: runs it as runs/NAME, unless that is done, and says what it took
step() {
  python - "$@" <<'PY'
import os, resource, subprocess, sys, time

name, *command = sys.argv[1:]
if os.path.exists(f"runs/{name}/result.json"):
    sys.exit()
go_on = ["--resume", name] if os.path.exists(f"runs/{name}/args.json") else ["--run-name", name]
start = time.monotonic()
code = subprocess.run([sys.executable, *command, *go_on]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
print(f"{command[0]}: {time.monotonic() - start:.0f} s, peak {peak:.1f} GiB\n", flush=True)
sys.exit(code)
PY
}

lora=(--lora-rank 16 --lora-alpha 32 --micro-batch-size 8 --eval-rows 64)
rl=(--sft-path "$models/sft" --reward-path data/tldr_mini/rubric.py --total-episodes 320 --batch-size 32 --minibatch-size 16
  --num-ppo-epochs 1 --learning-rate 5e-4 --kl-coef 0.05 --eval-every 5)
[ -f models/smollm2/config.json ] || python data/smollm2/build.py
step smol_sft sft.py --base-model models/smollm2 --output-dir "$models/sft" \
  --max-rows 512 --num-epochs 1 --batch-size 16 --learning-rate 1e-3 --no-train-on-prompt "${lora[@]}"
step smol_reward reward_model.py --sft-path "$models/sft" --output-dir "$models/reward" \
  --max-rows 256 --num-epochs 1 --batch-size 16 --learning-rate 5e-4 "${lora[@]}"
step smol_ppo ppo.py "${rl[@]}" --output-dir "$models/ppo" "${lora[@]}"
step smol_drpo drpo.py "${rl[@]}" --output-dir "$models/drpo" --beta 1 "${lora[@]}"
step smol_judge judge.py --policies models/smollm2 "$models/sft" "$models/ppo" "$models/drpo" --sft-path "$models/sft" \
  --reward-path "$models/reward" --num-prompts 128 --temperature 1 --micro-batch-size 8
