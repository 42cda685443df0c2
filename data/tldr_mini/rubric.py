"""The embedded task's exact measure of quality, explained in data/tldr_mini/README.md; as a reward:

python drpo.py --reward-path data/tldr_mini/rubric.py
"""

import re

FUNCTION_WORDS = frozenset(
    "a about and at because but feel felt i in is it my now of on should so that the them this to was with".split()
)


def rubric_score(summary, facts):
    """Quality of `summary` (text) against `facts` (the key phrases of the post), in [-1, 1]; data/tldr_mini/README.md.

    +1 for each fact stated word for word, -1/2 for each repetition of a fact and for each content word that belongs
    to no stated fact, all over the number of facts; -0.05 for each word past the length of all facts plus six.
    """
    words = re.findall(r"[a-z0-9']+", summary.lower())
    text, stated, repeated = f" {' '.join(words)} ", 0, 0
    for fact in facts:
        count = text.count(f" {fact} ")
        stated, repeated = stated + (count > 0), repeated + max(0, count - 1)
        text = text.replace(f" {fact} ", " | ")
    unsupported = sum(word != "|" and word not in FUNCTION_WORDS for word in text.split())
    excess = max(0, len(words) - sum(len(fact.split()) for fact in facts) - 6)
    return max(-1.0, (stated - 0.5 * repeated - 0.5 * unsupported) / len(facts) - 0.05 * excess)


def score(prompt, response, row):
    return rubric_score(response, row["rubric"])
