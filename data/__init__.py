"""What the scripts run on without a hub: the embedded tasks, a model for them, and how their models are made."""

# folder -> the script that trains it, with its flags; the scripts run that themselves where the folder is missing
POLICIES = ("sft", "dpo", "dpo_ln", "ppo", "drpo", "rto", "online_dpo", "xpo", "rejection_sampling")
COMMANDS = {f"models/{name}": (f"{name}.py",) for name in POLICIES}
COMMANDS |= {"models/reward": ("reward_model.py",)}
COMMANDS |= {
    "models/transcription": (
        "sft.py",
        *("--dataset", "data/transcription", "--base-model", "data/transcription/base", "--num-epochs", "6"),
        *("--learning-rate", "4e-3", "--output-dir", "models/transcription"),
    )
}
