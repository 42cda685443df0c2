#!/usr/bin/env bash
# The whole chain on a real pretrained model, SmolLM2-135M-Instruct, without a GPU or a hub: SFT, reward model, PPO, DR-PO.
#   pip install gguf peft && benchmark/smollm2.sh      about 35 minutes on two cores, 5 GiB of memory, 3 GB on disk
# The posts of the embedded task; RL climbs the exact rubric, so that what comes out is not the fault of a reward model. The
# reward model is trained to be looked at: its accuracy, and its scores in the last table. docs/smollm2.md has what came out.
# The sizes are those of half an hour: 320 episodes are 16 times fewer than the embedded task's default.
set -euo pipefail
cd "$(dirname "$0")/.."
models=${MODELS:-models/smol}
export OMP_WAIT_POLICY=passive

# step SCRIPT FLAGS...: runs it and says what it took
step() {
  python - "$@" <<'PY'
import resource, subprocess, sys, time

start = time.monotonic()
code = subprocess.run([sys.executable, *sys.argv[1:]]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
print(f"{sys.argv[1]}: {time.monotonic() - start:.0f} s, peak {peak:.1f} GiB\n", flush=True)
sys.exit(code)
PY
}

lora=(--lora-rank 16 --lora-alpha 32 --micro-batch-size 8 --eval-rows 64)
rl=(--sft-path "$models/sft" --reward-path data/tldr_mini/rubric.py --total-episodes 320 --batch-size 32 --minibatch-size 16
  --num-ppo-epochs 1 --learning-rate 5e-4 --kl-coef 0.05 --eval-every 5)
[ -d models/smollm2 ] || step data/smollm2/build.py
step sft.py --base-model models/smollm2 --output-dir "$models/sft" --run-name smol_sft \
  --max-rows 512 --num-epochs 1 --batch-size 16 --learning-rate 1e-3 --no-train-on-prompt "${lora[@]}"
step reward_model.py --sft-path "$models/sft" --output-dir "$models/reward" --run-name smol_reward \
  --max-rows 256 --num-epochs 1 --batch-size 16 --learning-rate 5e-4 "${lora[@]}"
step ppo.py "${rl[@]}" --output-dir "$models/ppo" --run-name smol_ppo "${lora[@]}"
step drpo.py "${rl[@]}" --output-dir "$models/drpo" --run-name smol_drpo --beta 1 "${lora[@]}"
step judge.py --policies models/smollm2 "$models/sft" "$models/ppo" "$models/drpo" --sft-path "$models/sft" \
  --reward-path "$models/reward" --num-prompts 128 --temperature 1 --micro-batch-size 8 --run-name smol_judge
