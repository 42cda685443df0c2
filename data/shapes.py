"""What the columns of known data sets mean: a row of any of them -> prompt, completion and, for pairs, chosen and rejected.

The shapes are listed in README.md, "Your data". A data set of another shape is one more branch of standard_row, which
raises ValueError with the reason where a row has nothing to train on: it is then dropped, and counted under that reason.
"""

import re

from plumbing.tokens import Rendered, mark, special_tokens

ROLES = {"system", "user", "assistant", "tool"}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # of HH's dialogues
TLDR = "TL;DR:"
EMPTY = "empty prompt or answer"


def first_line(error):
    return (str(error) or repr(error)).strip().splitlines()[0]


def blank(value):
    """Whether a column holds nothing: null, white space or no messages."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def text_of(row, column):
    """The text of a column, '' for null."""
    value = row.get(column) or ""
    if not isinstance(value, str):
        raise ValueError(f"column {column!r}: {type(value).__name__}, not text")
    if re.search("[\ud800-\udfff]", value):  # as JSON can spell it
        raise ValueError(f"column {column!r}: half a character")
    return value


def dialogue_parts(dialogue):
    """HH's text -> prompt up to and including the last assistant marker, answer after it."""
    head, marker, answer = dialogue.rpartition(ASSISTANT)
    if not marker or HUMAN in answer:
        raise ValueError("does not end with the assistant")
    return head + marker, answer


def message_parts(turns, tokenizer):
    """Messages that end with the assistant's -> prompt and answer as the chat template writes them."""
    if not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        raise ValueError("not a list of messages")
    roles = [turn["role"] for turn in turns]
    if set(roles) - ROLES:
        raise ValueError(f"unknown role {sorted(set(roles) - ROLES)[0]!r}, known are {', '.join(sorted(ROLES))}")
    if not roles or roles[-1] != "assistant":
        raise ValueError("the messages must end with a turn of the assistant")
    contents = [turn.get("content") for turn in turns]  # note: once rendered, nothing is blank any more
    if blank(contents[-1]) or all(blank(content) for content in contents[:-1]):
        raise ValueError(EMPTY)
    turns = mark(turns, special_tokens(tokenizer))
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError("the chat template does not continue its own generation prompt")
    return Rendered(prompt), Rendered(whole[len(prompt) :])


def all_turns(prompt, turns):
    """The turns of an answer after those of its prompt, which may be text; the answer's may hold the prompt already."""
    if not isinstance(turns, list):
        raise ValueError("not a list of messages")
    if isinstance(prompt, str):
        holds = isinstance(turns[0], dict) and turns[0].get("role") in ("system", "user")
        prompt = [] if holds else [{"role": "user", "content": prompt}]
    return (prompt or []) + turns


def comparison(row):
    """Two summaries of a post and the choice between them."""
    post, summaries, choice = row["info"], row["summaries"], row["choice"]
    if blank(post) or blank(summaries) or blank(choice):
        raise ValueError(EMPTY)
    subreddit, title, text = (text_of(post, name) for name in ("subreddit", "title", "post"))
    prompt = f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {text}\n{TLDR}"
    if blank(text):  # some of its validation rows are news
        text = text_of(post, "article")
        prompt = f"{text}\n{TLDR}" * (not blank(text))
    texts = [" " + text_of(summary, "text").strip() for summary in summaries]
    return {"prompt": prompt, "completion": texts[choice], "chosen": texts[choice], "rejected": texts[1 - choice]}


def standard_row(row, tokenizer):
    """The columns of a row that the scripts know. ValueError: why there are none."""
    if row.get("label") is False:
        raise ValueError("an undesirable answer (label: false)")
    if "summaries" in row:
        return comparison(row)
    if "article" in row and "highlights" in row:
        article, highlights = text_of(row, "article"), text_of(row, "highlights")
        return {"prompt": f"{article}\n{TLDR}" * (not blank(article)), "completion": highlights}
    names = [name for name in ("completion", "chosen", "rejected") if name in row] or ["label"] * ("label" in row)
    if not names or ("prompt" not in row and "chosen" not in row):
        raise ValueError("not a known shape; needs 'prompt' and 'completion', or 'prompt', 'chosen' and 'rejected'")
    messages = any(isinstance(row.get(name), list) for name in ("prompt", *names))
    if "prompt" in row and not messages:
        return {name: row[name] for name in ("prompt", *names)} | {"completion": row[names[0]]}
    if any(blank(row[name]) for name in names):
        raise ValueError(EMPTY)
    parts = {}
    for name in names:
        try:
            turns = messages and all_turns(row.get("prompt"), row[name])
            parts[name] = message_parts(turns, tokenizer) if messages else dialogue_parts(text_of(row, name))
        except Exception as error:  # a chat template may raise anything
            place = f"column {name!r}: "
            raise ValueError(place + first_line(error).removeprefix(place)) from None
    prompts, answers = {prompt for prompt, _ in parts.values()}, {name: answer for name, (_, answer) in parts.items()}
    if len(prompts) > 1:
        raise ValueError("answers to different prompts")
    return {"prompt": prompts.pop(), **answers, "completion": answers[names[0]]}


def one_tldr_form(row, names):
    """The row with 'TL;DR:' at the end of the prompt, where its answers began with it, and a space before such answers."""
    prompt, answers = row["prompt"], {name: row[name] for name in names if not blank(row[name])}
    if isinstance(prompt, Rendered):
        return row
    if not prompt.rstrip().endswith(TLDR):
        if not answers or not all(answer.startswith(TLDR) for answer in answers.values()):
            return row
        prompt, answers = f"{prompt.rstrip()}\n{TLDR}", {name: answers[name].removeprefix(TLDR) for name in answers}
    spaced = {name: text if text.startswith(" ") else f" {text.lstrip()}" for name, text in answers.items()}
    return row | {"prompt": prompt.rstrip(), **spaced}
