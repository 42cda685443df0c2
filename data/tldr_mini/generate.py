"""Writes the embedded TL;DR task: synthetic forum posts, reference summaries, preference pairs and their rubric.

    python data/tldr_mini/generate.py            # rewrites the committed JSONL, byte for byte
    python data/tldr_mini/generate.py --out DIR  # the same files somewhere else
    python data/tldr_mini/generate.py --describe # writes nothing, prints the numbers quoted in README.md

Standard library only (the rubric, which also decides labels, is data/tldr_mini/rubric.py's), and only `random.random()` is drawn
from: its stream is fixed across Python versions, which `choice`, `shuffle` and `sample` do not promise. The task is
described in data/tldr_mini/README.md.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.tldr_mini.rubric import rubric_score

SEED = 8495  # from the paper's arXiv number, 2404.08495
SHOWN = 0.8  # how probably a post gives an optional fact
OTHER_STORY = 0.2  # share of distractors that are a whole other story; the rest are details of no importance
LABEL_SHARPNESS = 8.0  # Bradley-Terry: P(A preferred) = sigmoid(LABEL_SHARPNESS * (rubric A - rubric B))

PERSONS = "sister brother mother father uncle roommate neighbor boss landlord friend".split()
VERBS = "broke sold lost stole borrowed burned painted ruined".split()
OBJECTS = "bike car phone laptop guitar tent camera piano boat lamp".split()
TIMES = "january march april june july september october december".split()
PLACES = "gym park beach office airport hotel library farm".split()
FEELINGS = "angry sad guilty worried jealous hurt".split()
ACTIONS = "forgive report sue avoid pay ignore".split()
SUBREDDITS = "relationships advice family legaladvice offmychest tifu".split()
PETS = "dog cat parrot rabbit".split()
FOODS = "pasta soup pizza rice salad cake".split()
WEATHERS = "rainy sunny windy cold".split()
OPTIONAL = ("when", "where", "feel", "ask")
LEAD_INS = ("basically", "long story short", "honestly")
CLOSINGS = ("thanks for reading", "thanks for any advice")  # one first word, or neither would be likelier than to end

# What writers do, as probabilities. They walk the list of facts (who and act are one) and may at each boundary stop (not
# before the first fact) or put in chatter, an idle detail of the post or a lead-in; each fact may be told wrongly or, if it
# is optional, left out, and one that the post does not give may be made up. Independent slips vanish in greedy decoding;
# what survives it is a habit whose next word has a probability above 1/2, and all writers share one, so that it tells
# nobody apart.
POSTER = {"stop": 0.35, "chatter": 0.25, "wrong": 0.06, "left_out": 0.0, "made_up": 0.2}
CAREFUL = {"stop": 0.0, "chatter": 0.01, "wrong": 0.01, "left_out": 0.02, "made_up": 0.015}
HABIT = 0.65  # closes with an idle phrase

# {who} my sister | {act} broke my bike | {when} in march | {where} at the gym | {feel}, {ask}: the bare word.
# `main`, `feel` and `ask` carry the facts; a `story` looks like one but is another one, a `detail` does not matter.
PHRASES = {
    "standard": {
        "title": ["need advice about {who}", "{who} and the {object}", "what do you think of this", "long story"],
        "main": ["so {who} {act}{when}{where}.", "basically {who} {act}{when}{where}.", "it turns out {who} {act}{when}{where}."],
        "feel": ["honestly i feel {feel}.", "now i feel {feel} about it.", "i feel {feel} and cannot sleep."],
        "ask": ["should i {ask} them?", "reddit, should i {ask} them?"],
        "story": ["years ago {who} {act}{when}.", "people say {who} {act}{where}.", "for context, {who} {act} once{when}."],
        "detail": ["our {pet} ate {food}.", "we had {food} twice.", "it was {weather} that day.", "our {pet} is fine."],
        "filler": [
            "sorry for the long post.", "english is hard for me.", "this is a throwaway account.",
            "it rained all day.", "thanks for reading.", "i have not slept well.",
        ],
        "counts": (1, 2, 0, 2),  # least and most distractors, least and most fillers
    },
    "shifted": {
        "title": ["{who} did something", "please help me decide", "a question regarding {who}", "weird situation"],
        "main": ["yesterday i learned that {who} {act}{when}{where}.", "the thing is, {who} {act}{when}{where}.", "believe it or not, {who} {act}{when}{where}."],
        "feel": ["because of this i feel {feel}.", "of course i feel {feel} since that happened."],
        "ask": ["so tell me, should i {ask} them?", "what would you do, should i {ask} them?"],
        "story": ["in another story {who} {act}{when}.", "once i heard that {who} {act}{where}.", "that reminds me how {who} {act}{when}."],
        "detail": ["by the way our {pet} got {food}.", "someone brought {food}.", "outside it was {weather}.", "even our {pet} noticed."],
        "filler": [
            "i am writing this on mobile.", "please be kind in the comments.", 
            "a therapist suggested posting here.", "i deleted the first version of this.",
        ],
        "counts": (2, 3, 2, 3),
    },
}  # fmt: skip


def pick(rng, items):
    return items[int(rng.random() * len(items))]


def shuffled(rng, items):
    return [item for _, item in sorted((rng.random(), item) for item in items)]


def draw_facts(rng):
    """One value for each slot, as the words that appear in a post."""
    return {
        "who": f"my {pick(rng, PERSONS)}",
        "object": pick(rng, OBJECTS),
        "verb": pick(rng, VERBS),
        "when": f"in {pick(rng, TIMES)}",
        "where": f"at the {pick(rng, PLACES)}",
        "feel": pick(rng, FEELINGS),
        "ask": pick(rng, ACTIONS),
        "pet": pick(rng, PETS),
        "food": pick(rng, FOODS),
        "weather": pick(rng, WEATHERS),
    }


def render(template, facts, shown=OPTIONAL):
    return template.format(
        who=facts["who"],
        act=f"{facts['verb']} my {facts['object']}",
        object=facts["object"],
        when=f" {facts['when']}" if "when" in shown else "",
        where=f" {facts['where']}" if "where" in shown else "",
        feel=facts["feel"],
        ask=facts["ask"],
        pet=facts["pet"],
        food=facts["food"],
        weather=facts["weather"],
    )


def write_post(rng, style):
    """A post: its prompt, its key phrases by slot, the phrases of its other stories by slot, its idle details."""
    phrases, key = PHRASES[style], draw_facts(rng)
    shown = [slot for slot in OPTIONAL if rng.random() < SHOWN] or [pick(rng, OPTIONAL)]
    least_others, most_others, least_fillers, most_fillers = phrases["counts"]
    body, distractors, details = [render(pick(rng, phrases["main"]), key, shown)], [], []
    for _ in range(least_others + int(rng.random() * (most_others - least_others + 1))):
        other, kind = draw_facts(rng), "story" if rng.random() < OTHER_STORY else "detail"
        body.append(render(pick(rng, phrases[kind]), other))
        distractors += [slot_phrases(other, OPTIONAL)] if kind == "story" else []
        details += [body[-1].rstrip(".")] if kind == "detail" else []
    fillers = least_fillers + int(rng.random() * (most_fillers - least_fillers + 1))
    body += shuffled(rng, phrases["filler"])[:fillers]
    if "feel" in shown:
        body.append(render(pick(rng, phrases["feel"]), key))
    body = shuffled(rng, body)
    if "ask" in shown:
        body.append(render(pick(rng, phrases["ask"]), key))
    title = render(pick(rng, phrases["title"]), key)
    prompt = f"SUBREDDIT: r/{pick(rng, SUBREDDITS)}\nTITLE: {title}\nPOST: {' '.join(body)}\nTL;DR:"
    return prompt, slot_phrases(key, shown), distractors, details


def slot_phrases(facts, shown):
    phrases = {"who": facts["who"], "act": f"{facts['verb']} my {facts['object']}"}
    texts = {"when": facts["when"], "where": facts["where"]}
    texts |= {"feel": f"i feel {facts['feel']}", "ask": f"should i {facts['ask']} them"}
    return phrases | {slot: texts[slot] for slot in OPTIONAL if slot in shown}


def write_summary(rng, key, distractors, details, writer):
    """A summary as writers of this kind make it: an ordered list of facts, with their slips, and a habit that all share."""
    said = {}
    for slot in key | dict.fromkeys(slot for slot in OPTIONAL if slot not in key):
        if slot not in key:  # which the post does not give
            if rng.random() < writer["made_up"]:
                said[slot] = slot_phrases(draw_facts(rng), OPTIONAL)[slot]
        elif slot not in OPTIONAL or rng.random() >= writer["left_out"]:
            said[slot] = key[slot]
            if rng.random() < writer["wrong"]:  # from another story in the post, or made up
                mixed_up = distractors and rng.random() < 0.5
                said[slot] = (pick(rng, distractors) if mixed_up else slot_phrases(draw_facts(rng), OPTIONAL))[slot]
    said = {"who": f"{said['who']} {said['act']}"} | {slot: said[slot] for slot in OPTIONAL if slot in said}
    text = ""
    for slot, phrase in said.items():
        if text and rng.random() < writer["stop"]:
            break
        if rng.random() < writer["chatter"]:
            phrase = f"{pick(rng, details if details and rng.random() < 0.5 else LEAD_INS)} {phrase}"
        text += f"{',' if slot in ('feel', 'ask') else ''} {phrase}{'?' if slot == 'ask' else ''}"
    if rng.random() < HABIT:
        text += f"{'' if text.endswith('?') else ','} {pick(rng, CLOSINGS)}"
    return text


def mess_up(rng, text, key):
    """A model-like summary: one to three of the errors that language models under training make."""
    for _ in range(1 + int(rng.random() * 3)):
        words, kind = text.split(), int(rng.random() * 8)
        at = int(rng.random() * len(words)) if words else 0
        fact = pick(rng, list(key.values()))
        made_up = pick(rng, list(slot_phrases(draw_facts(rng), OPTIONAL).values()))
        if kind == 0:  # stops early
            words = words[: max(2, at)]
        elif kind == 1:  # loses a word
            words = words[:at] + words[at + 1 :]
        elif kind == 2:  # says a thing twice
            words = [*words, *fact.split()]
        elif kind == 3:  # loops
            words = words + words[at : at + 4] * (1 + int(rng.random() * 2))
        elif kind == 4:  # invents
            words = [*words, *made_up.split()]
        elif kind == 5:  # invents in the middle
            words = words[:at] + made_up.split() + words[at:]
        elif kind == 6:  # replaces a word by another of the task's words
            words[at : at + 1] = [pick(rng, PERSONS + VERBS + OBJECTS + TIMES + PLACES + FEELINGS + ACTIONS)]
        else:  # scrambles two halves
            words = words[at:] + words[:at]
        text = " ".join(words[:30])
    return f" {text}" if text else " i"


def reference_row(rng, style, writer=CAREFUL):
    prompt, key, distractors, details = write_post(rng, style)
    completion = write_summary(rng, key, distractors, details, writer)
    return {"prompt": prompt, "completion": completion, "rubric": list(key.values())}


def forum_row(rng, style):
    """What the base model is pretrained on: a post with its poster's own TL;DR."""
    row = reference_row(rng, style, POSTER)
    return {"prompt": row["prompt"], "completion": row["completion"]}


def candidate(rng, key, distractors, details):
    """A summary to be judged: of either kind of writer, of one who believes partly other facts, or messed up."""
    other, wrong = slot_phrases(draw_facts(rng), OPTIONAL), rng.random() if rng.random() < 0.2 else 0.0
    believed = {slot: other[slot] if rng.random() < wrong else phrase for slot, phrase in key.items()}
    text = write_summary(rng, believed, distractors, details, POSTER if rng.random() < 0.5 else CAREFUL)
    return mess_up(rng, text, key) if rng.random() < 0.15 else text


def preference_row(rng, style):
    prompt, key, distractors, details = write_post(rng, style)
    first = second = candidate(rng, key, distractors, details)
    while second == first:
        second = candidate(rng, key, distractors, details)
    facts = list(key.values())
    margin = rubric_score(first, facts) - rubric_score(second, facts)
    if rng.random() >= 1 / (1 + math.exp(-LABEL_SHARPNESS * margin)):
        first, second = second, first
    return {"prompt": prompt, "chosen": first, "rejected": second, "rubric": facts}


FILES = {  # file -> row function, style, rows; the order fixes each file's seed
    "reference/train.jsonl": (reference_row, "standard", 2560),
    "reference/validation.jsonl": (reference_row, "standard", 200),
    "reference/test.jsonl": (reference_row, "standard", 400),
    "reference/shifted.jsonl": (reference_row, "shifted", 400),
    "preference/train.jsonl": (preference_row, "standard", 4000),
    "preference/validation.jsonl": (preference_row, "standard", 400),
    "preference/test.jsonl": (preference_row, "standard", 400),
}
FORUM = {"forum/train.jsonl": (forum_row, "standard", 3000), "forum/validation.jsonl": (forum_row, "standard", 200)}
UNREAD = {"preference/train.jsonl", "preference/validation.jsonl"}  # nothing reads their rubric


def describe(folder):
    """Prints what the committed files reach: rubric of the best, the reference and a random summary; label noise."""
    for name, (make_row, _, _) in FILES.items():
        if name in UNREAD:
            continue
        rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        facts = [row["rubric"] for row in rows]
        if make_row is reference_row:
            texts = [row["completion"] for row in rows]
            candidates = {"best": [" ".join(f) for f in facts], "reference": texts, "random": texts[1:] + texts[:1]}
        else:
            candidates = {side: [row[side] for row in rows] for side in ("chosen", "rejected")}
        means = {k: sum(map(rubric_score, v, facts)) / len(rows) for k, v in candidates.items()}
        if make_row is preference_row:
            margins = [rubric_score(row["chosen"], f) - rubric_score(row["rejected"], f) for row, f in zip(rows, facts)]
            means["best accuracy, drawn"] = sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(rows)
            chances = [1 / (1 + math.exp(-LABEL_SHARPNESS * abs(m))) for m in margins]
            means["best accuracy, expected"] = sum(chances) / len(rows)
        print(f"{name:30} {len(rows):5} rows  " + "  ".join(f"{k} {v:.3f}" for k, v in means.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into")
    parser.add_argument("--forum", action="store_true", help="write forum/ instead, for data/tldr_mini/pretrain.py")
    parser.add_argument("--describe", action="store_true", help="print statistics of the files, write nothing")
    args = parser.parse_args()
    out = args.out
    if args.describe:
        raise SystemExit(describe(out))
    for number, (name, (make_row, style, count)) in enumerate((FILES | FORUM).items()):
        if (name in FORUM) != args.forum:
            continue
        rng = random.Random(1000 * SEED + number)
        rows = [make_row(rng, style) for _ in range(count)]
        lines = [json.dumps({key: row[key] for key in row if key != "rubric" or name not in UNREAD}) for row in rows]
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        path.with_suffix(".tmp").replace(path)
        print(f"{path}: {count} rows, {path.stat().st_size / 1e6:.2f} MB")
