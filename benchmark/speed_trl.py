"""One process of benchmark/speed.py: TRL's trainer on the models and rows that speed.py made; prints seconds per update.

pip install trl==1.12.0                       # the last release with a PPOTrainer, in an environment of its own
python benchmark/speed_trl.py ppo FOLDER --batch 64 --updates 3
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    logging,
)


class Clock(TrainerCallback):
    """Seconds from the end of one optimizer step (PPO: of one update) to the end of the next; the first is warm-up."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("trainer", choices=["ppo", "dpo", "reward_model"])
parser.add_argument("folder", type=Path)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--updates", type=int, required=True)
parser.add_argument("--response-length", type=int, default=53)
parser.add_argument("--micro-batch", type=int, required=True)
parser.add_argument("--stop", action="store_true", help="responses end at EOS")
args = parser.parse_args()
logging.set_verbosity_error()
disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(args.folder / "sft", padding_side="left")
causal = [AutoModelForCausalLM.from_pretrained(args.folder / "sft", dtype=torch.float32) for _ in range(2)]
scalar = [AutoModelForSequenceClassification.from_pretrained(args.folder / "reward", dtype=torch.float32)] * 2
scalar[1] = AutoModelForSequenceClassification.from_pretrained(args.folder / "reward", dtype=torch.float32)
task = "reference" if args.trainer == "ppo" else "preference"
lines = (args.folder / task / "train.jsonl").read_text().splitlines()
rows = [json.loads(line) for line in lines][: args.batch * (args.updates + 1)]
clock = Clock()
with tempfile.TemporaryDirectory() as out:
    settings = {"output_dir": out, "learning_rate": 3e-6, "use_cpu": True}
    settings |= {"per_device_train_batch_size": args.micro_batch}
    settings |= {"gradient_accumulation_steps": args.batch // args.micro_batch}
    settings |= {"bf16": False, "fp16": False, "gradient_checkpointing": False, "save_strategy": "no", "seed": 1}
    settings |= {"report_to": "none", "disable_tqdm": True}
    if args.trainer == "ppo":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        prompts = Dataset.from_dict({"input_ids": [tokenizer(row["prompt"]).input_ids for row in rows]})
        config = PPOConfig(
            **settings,
            total_episodes=len(rows),
            num_ppo_epochs=4,
            num_mini_batches=1,
            local_rollout_forward_batch_size=args.batch,
            response_length=args.response_length,
            temperature=0.7,
            stop_token="eos" if args.stop else None,
            num_sample_generations=0,
            kl_coef=0.05,
        )
        models = dict(zip(("model", "ref_model", "reward_model", "value_model"), causal + scalar))
        sets = {"train_dataset": prompts, "eval_dataset": prompts.select(range(2))}
        trainer = PPOTrainer(args=config, processing_class=tokenizer, **models, **sets, callbacks=[clock])
    else:
        from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

        settings |= {"max_length": None, "dataloader_pin_memory": False, "num_train_epochs": 1, "logging_steps": 10_000}
        data = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
        common = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [clock]}
        if args.trainer == "dpo":
            trainer = DPOTrainer(model=causal[0], ref_model=causal[1], args=DPOConfig(**settings, beta=0.05), **common)
        else:
            trainer = RewardTrainer(model=scalar[0], args=RewardConfig(**settings), **common)
    trainer.train()
seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:])]
print(json.dumps(seconds))
