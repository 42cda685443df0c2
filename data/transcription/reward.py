"""The transcription task's reward: 1 if the whole list is copied right, else 0.

python drpo.py --dataset data/transcription --reset-column answer --sft-path models/transcription \\
    --reward-path data/transcription/reward.py --kl-coef 0.01
"""


def score(prompt, response, row):
    return float(response == prompt.removesuffix(" ="))
