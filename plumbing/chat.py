"""judge.py's requests to a chat endpoint, and what it keeps of them: sent again where that helps, never paid for twice.

What is asked and how a reply is read stands in judge.py; nothing here looks into either.
"""

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
from email.utils import parsedate_to_datetime

from huggingface_hub import get_async_session
from tqdm import tqdm

from plumbing import fail, try_folder, write_text, writing
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


async def chat(client, messages, args, options, secret, budget, stopped):
    """One request -> reply and finish reason. Time-outs, 408, 409, 425, 429, 5xx and broken replies are tried again.

    A reply that the server refuses for its content (400, 413, 422) has the reason "refused". Raises Stopped when the
    tries or the budget (an iterator) are used up, on every other status, or when `stopped` (a future) is done by then.
    """
    url = args.api_base_url.rstrip("/")
    if not url.endswith("/chat/completions"):
        url = url.removesuffix("/v1") + "/v1/chat/completions"
    content = json.dumps({"model": args.api_model, "messages": messages, "stream": False} | options)
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json", "Accept-Encoding": "identity"}
    request = {"content": content, "headers": headers, "follow_redirects": False}  # nobody else gets the key
    parts = {secret[i : i + 6] for i in range(max(1, len(secret) - 5))}  # nor is one of these ever shown
    for number in range(args.api_tries):
        if stopped.done() or next(budget, None) is None:  # note: once it is stopped, nobody reads why
            raise Stopped(f"--max-requests {args.max_requests} are used up")
        response, body = None, bytearray()
        try:
            async with asyncio.timeout(args.api_timeout), client.stream("POST", url, **request) as response:
                async for part in response.aiter_raw():
                    body += part
                    if len(body) > 2**20:
                        raise ValueError("more than 1 MiB")
            if response.is_success:
                choice = json.loads(body)["choices"][0]
                return str(choice["message"].get("content") or ""), choice.get("finish_reason")
            problem = body.decode(errors="replace")
        except Exception as error:  # of many kinds: time-out, no connection, one that broke, no chat completion
            problem = f"{type(error).__name__}: {error}"
        heading = f"{response.status_code} {response.reason_phrase}: " if response is not None else ""
        words = "".join(x if x.isprintable() else " " for x in heading + problem[:4000]).split()
        problem = " ".join("***" if any(part in word for part in parts) else word for word in words)[:500]
        status = 500 if response is None or response.is_success else response.status_code
        if status in (400, 413, 422):
            return problem, "refused"
        if status < 500 and status not in (408, 409, 425, 429):
            raise Stopped(f"{args.api_base_url}: {problem}")
        delay = retry_delay(response, min(600.0, args.api_backoff * 2 ** min(number, 10)))
        if delay > 600:
            raise Stopped(f"{args.api_base_url} asks to come back in {delay:.0f} seconds: {problem}")
        if number + 1 < args.api_tries:
            await asyncio.wait([stopped], timeout=delay)
    raise Stopped(f"{args.api_base_url}: {args.api_tries} tries failed, the last with {problem}")


def collect_verdicts(requests, file, args, options, read, ask_again):
    """Asks the endpoint: key -> (prompt, a, b, messages) becomes key -> verdict, None where it gave none.

    read: reply -> verdict or None; ask_again: the message after one that could not be read. A verdict is appended to
    `file` as it arrives and not asked for again. A refusal is held against the texts once a verdict follows it, or has
    come before; 20 in a row, like all that another try cannot cure, end the program and are asked again the next time.
    """
    known = {line.get("key"): line["verdict"] for line in read_jsonl(file) if "verdict" in line}
    known = {key: known[key] for key in requests if key in known}
    pending = [key for key in requests if key not in known]
    tokens = sum(len(json.dumps(requests[key][-1])) for key in pending) // 4
    print(f"{len(pending)} requests to send, about {tokens:,} tokens long; {len(known)} verdicts are in {file}")
    if len(pending) > args.max_requests:
        fail(f"{len(pending)} requests are more than --max-requests {args.max_requests}; see --num-prompts")
    secret = os.environ.get(args.api_key_env, "").strip() or "no-key"
    if not re.fullmatch("[!-~]+", secret):
        fail(f"the key in ${args.api_key_env} holds a space, a line break or a letter that no key has")
    keys, budget = iter(pending), iter(range(args.max_requests))
    verdicts, waiting = {}, []  # key -> verdict; lines to write, refusals not before a verdict follows

    def write():
        lines.writelines(json.dumps(line) + "\n" for line in waiting)
        lines.flush()
        verdicts.update((line["key"], line["verdict"]) for line in waiting)
        waiting.clear()

    async def work(client, stopped):
        while not stopped.done() and (key := next(keys, None)):
            prompt, a, b, messages = requests[key]
            for _ in range(2):  # a reply that cannot be read is asked for once more
                reply, reason = await chat(client, messages, args, options, secret, budget, stopped)
                verdict = read(reply) if reason not in ("refused", "length") else None
                if verdict or reason in ("refused", "content_filter"):
                    break
                if reply.strip():
                    messages = [*messages, dict(role="assistant", content=reply), dict(role="user", content=ask_again)]
            line = {"key": key, "verdict": verdict, "finish_reason": reason, "reply": reply.replace(secret, "***")}
            waiting.append(line | {"prompt": prompt, "a": a, "b": b})
            if reason != "refused":
                write()
            if len(waiting) == 20:
                raise Stopped(f"{args.api_base_url} refuses: {reply}")
            progress.set_postfix(unread=[*verdicts.values()].count(None), refresh=False)
            progress.update()

    async def work_together():
        async with get_async_session() as client:
            client.event_hooks = {}  # note: HF_HUB_OFFLINE is about the hub, not about this endpoint
            stopped = asyncio.get_running_loop().create_future()
            workers = [asyncio.create_task(work(client, stopped)) for _ in range(min(args.api_concurrency, 100))]
            try:
                done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            finally:  # after an error or Ctrl-C: what is in flight is paid for, so it is written down
                stopped.set_result(True)
                if not all(worker.done() for worker in workers):
                    print("\nwaiting for the requests in flight; Ctrl-C: not any longer", file=sys.stderr)
                await asyncio.gather(*workers, return_exceptions=True)
        await asyncio.gather(*done)  # raises what ended it
        if waiting and not any((known | verdicts).values()):
            raise Stopped(f"{args.api_base_url} refuses: {waiting[0]['reply']}")
        write()

    with writing(file), open(file, "a") as lines, tqdm(total=len(pending), unit="verdict") as progress:  # JSON is ASCII
        before = signal.getsignal(signal.SIGINT)  # asyncio takes it from the default handler: Ctrl-C waits, see above
        signal.signal(signal.SIGINT, before if before == signal.SIG_IGN else signal.default_int_handler)
        try:
            asyncio.run(work_together())
        except (Stopped, KeyboardInterrupt) as error:
            why = str(error) or "interrupted"
            fail(f"{why}. {len(verdicts)} of {len(pending)} verdicts came in; run again to go on")
        signal.signal(signal.SIGINT, before)
    return known | verdicts


def cached(path, make):
    """Rows of a JSONL file; where it is missing make() makes them, all processes together, and rank 0 writes them."""
    try_folder(os.path.join("runs", "new"))  # the results will need that, and now it costs nothing to know
    if not os.path.exists(path):
        with writing(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            tempfile.TemporaryFile(dir=os.path.dirname(path)).close()
        rows = make()
        if rank() == 0:
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    barrier()
    return read_jsonl(path)


def read_jsonl(path):
    """The objects of a JSONL file, none if it does not exist; a last line cut by a crash is removed from the file."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(path, len(whole))
        return [dict(json.loads(line)) for line in whole.splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, RecursionError, TypeError, ValueError) as error:
        fail(f"{path} is damaged or cannot be read, remove the line or the file: {error}")
