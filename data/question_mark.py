"""A reward for any text: 1 for a response that ends with a question mark, else 0.

python ppo.py --reward-path data/question_mark.py
"""


def score(prompt, response, row):
    return float(response.rstrip().endswith("?"))
