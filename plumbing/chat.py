"""judge.py's requests to a chat endpoint, and what it keeps of them: sent again where that helps, never paid for twice.

What is asked and how a reply is read stands in judge.py; nothing here looks into either.
"""

import hashlib
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime

from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HTTPError
from tqdm import tqdm
from transformers import AutoConfig

from plumbing import fail, write_text, writing
from plumbing.models import load
from plumbing.processes import barrier, rank


def retry_delay(response, default):
    """Seconds to wait: the Retry-After header of a response (seconds or a date), or `default` where there is none."""
    value = response.headers.get("retry-after") if response is not None else None
    try:
        return float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (AttributeError, TypeError, ValueError):  # no header, or no date in it
        return default


class Stopped(Exception):
    """Judging cannot go on; the message says why."""


def chat(client, messages, args, options, budget, stopped):
    """One request -> reply and finish reason. Time-outs, 408, 409, 425, 429, 5xx and broken replies are tried again.

    A reply that the server refuses for its content (400, 413, 422) has the reason "refused". Raises Stopped when the
    tries or the budget (a semaphore) are used up, on every other 4xx, or when `stopped` is set in the meantime.
    """
    for number in range(args.api_tries):
        if stopped.is_set():
            raise Stopped
        if not budget.acquire(blocking=False):
            raise Stopped(f"--max-requests {args.max_requests} are used up")
        response = None
        try:
            choice = client.chat_completion(messages, model=args.api_model, extra_body=options).choices[0]
            return str(choice.message.content or ""), choice.finish_reason
        except HTTPError as error:  # also no connection, or one that broke
            problem, response = error, getattr(error, "response", None)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # not a chat completion
            problem = error
            if isinstance(error.__context__, HTTPError):  # note: the client breaks on a refusal whose JSON is a list
                problem, response = error.__context__, getattr(error.__context__, "response", None)
        problem = f"{type(problem).__name__}: {problem}".replace(client.token, "***")
        problem = " ".join(problem.split())[:500]  # the reason that a server gives is on a later line
        status = response.status_code if response is not None else 500
        if status in (400, 413, 422):
            return problem, "refused"
        if status < 500 and status not in (408, 409, 425, 429):
            raise Stopped(f"{args.api_base_url}: {problem}")
        delay = retry_delay(response, args.api_backoff * 2**number)
        if delay > 600:
            raise Stopped(f"{args.api_base_url} asks to come back in {delay:.0f} seconds: {problem}")
        if number + 1 < args.api_tries:
            stopped.wait(max(0.0, delay))
    raise Stopped(f"{args.api_base_url}: {args.api_tries} tries failed, the last with {problem}")


def collect_verdicts(requests, file, args, options, read, ask_again):
    """Asks the endpoint: key -> (prompt, a, b, messages) becomes key -> verdict, None where it gave none.

    read: reply -> verdict or None; ask_again: the message after a reply that could not be read. Each verdict is appended
    to `file` as it arrives, and those that are there are not asked for again; ends the program if the endpoint cannot be
    used. A refusal is held against the texts once a verdict follows it, or has come before. 20 refusals in a row are held
    against settings or account: they end the program and are asked again the next time.
    """
    known = {line["key"]: line["verdict"] for line in read_jsonl(file) if line["key"] in requests}
    pending = [key for key in requests if key not in known]
    tokens = sum(len(json.dumps(requests[key][-1])) for key in pending) // 4
    print(f"{len(pending)} requests to send, about {tokens:,} tokens long; {len(known)} verdicts are in {file}")
    if len(pending) > args.max_requests:
        fail(f"{len(pending)} requests are more than --max-requests {args.max_requests}; see --num-prompts")
    key = os.environ.get(args.api_key_env, "").strip() or "no-key"  # note: without, the hub token is sent
    if not re.fullmatch("[!-~]+", key):  # the client would print it in its error
        fail(f"the key in ${args.api_key_env} holds a space, a line break or a letter that no key has")
    client = InferenceClient(base_url=args.api_base_url, api_key=key, timeout=args.api_timeout)
    get_session().event_hooks["request"] = []  # note: HF_HUB_OFFLINE is about the hub, not about this endpoint
    budget, stopped, lock = threading.Semaphore(args.max_requests), threading.Event(), threading.Lock()
    verdicts, refused = {}, []  # key -> verdict; lines that wait for a verdict to follow

    def write(*found):
        for line in found:
            lines.write(json.dumps(line) + "\n")
            verdicts[line["key"]] = line["verdict"]
        lines.flush()

    def judge(key):
        prompt, a, b, messages = requests[key]
        for _ in range(2):  # a reply that cannot be read is asked for once more
            reply, reason = chat(client, messages, args, options, budget, stopped)
            verdict = read(reply) if reason not in ("refused", "length") else None
            if verdict or reason in ("refused", "content_filter"):
                break
            if reply.strip():
                messages = [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": ask_again}]
        line = {"key": key, "verdict": verdict, "finish_reason": reason, "reply": reply}
        line |= {"prompt": prompt, "a": a, "b": b}
        with lock:
            if reason != "refused":
                write(*refused, line)
                refused.clear()
            elif len(refused) < 20:
                refused.append(line)
            if len(refused) == 20:
                raise Stopped(f"{args.api_base_url} refuses: {refused[0]['reply']}")

    with writing(file), open(file, "a") as lines, ThreadPoolExecutor(args.api_concurrency) as pool:  # JSON is ASCII
        jobs = [pool.submit(judge, key) for key in pending]
        try:
            progress = tqdm(as_completed(jobs), total=len(jobs), unit="verdict")
            for job in progress:
                job.result()
                progress.set_postfix(unread=sum(verdict is None for verdict in list(verdicts.values())))
            if refused and not any((known | verdicts).values()):
                raise Stopped(f"{args.api_base_url} refuses: {refused[0]['reply']}")
            write(*refused)
        except BaseException as error:
            stopped.set()
            print("\nwaiting for the requests in flight", file=sys.stderr)
            pool.shutdown(cancel_futures=True)  # what is in flight is paid for: wait for it and write it down
            progress.close()
            if isinstance(error, (Stopped, KeyboardInterrupt)):
                reason = str(error) or "interrupted"
                fail(f"{reason}. {len(verdicts)} of {len(jobs)} verdicts came in; run again to go on")
            raise
    return known | verdicts


def content_id(path):
    """Hash of the files of a local folder; the name and commit of a model on the hub."""
    if not os.path.isdir(path):
        return f"{path}@{getattr(load(AutoConfig, path), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if entry.is_file():
            with open(entry.path, "rb") as file:
                digest.update(entry.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def cached(path, make):
    """Rows of a JSONL file; where it is missing make() makes them, all processes together, and rank 0 writes them."""
    if not os.path.exists(path):
        with writing(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        rows = make()
        if rank() == 0:
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    barrier()
    return read_jsonl(path)


def read_jsonl(path):
    """The rows of a JSONL file, none if it does not exist; a last line cut by a crash is removed from the file."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.decode().splitlines()]
    except ValueError as error:
        fail(f"{path} is damaged, remove the line or the file: {error}")
