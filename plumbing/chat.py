"""judge.py's requests to a chat endpoint, and what it keeps of them; what is asked and what replies mean is its own."""

import asyncio
import json
import os
import re
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime

from huggingface_hub import get_async_session
from tqdm import tqdm

from plumbing import fail, try_folder, write_text, writing
from plumbing.processes import barrier, rank


async def chat(client, messages, args, options, secret, budget):
    """One request -> reply and finish reason, "refused" at 400, 413 and 422: the content is not to the server's liking.

    Time-outs, 408, 409, 425, 429, 5xx and broken replies are tried again. ConnectionError: at any other status, and when
    the tries or the budget (an iterator) are used up.
    """
    url = args.api_base_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    content = json.dumps({"model": args.api_model, "messages": messages, "stream": False} | options)
    parts = {secret[i : i + 6] for i in range(max(1, len(secret) - 5))}  # none of these is ever shown
    for number in range(1, args.api_tries + 1):
        if next(budget, None) is None:
            raise ConnectionError(f"--max-requests {args.max_requests} are used up")
        status, heading, after, body = 0, "", "", b""
        try:
            async with asyncio.timeout(args.api_timeout), client.stream("POST", url, content=content) as response:
                status, after = response.status_code, response.headers.get("retry-after", "")
                heading = f"{status} {response.reason_phrase} {after and f'(Retry-After: {after})'} "
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > 2**20:
                        raise ValueError("more than 1 MiB")
            if response.is_success:
                choice = json.loads(body)["choices"][0]
                return str(choice["message"].get("content") or ""), choice.get("finish_reason")
            problem = body.decode(errors="replace")
        except Exception as error:  # of many kinds: time-out, no connection, one that broke, no chat completion
            problem = repr(error)
        words = "".join(x if x.isprintable() else " " for x in (heading + problem)[:4000]).split()
        problem = " ".join("***" if any(part in word for part in parts) else word for word in words)[:500]
        if status in (400, 413, 422):
            return problem, "refused"
        final = 300 <= status < 500 and status not in (408, 409, 425, 429)
        delay = min(600.0, args.api_backoff * 2 ** min(number - 1, 10))
        with suppress(ValueError, OverflowError):  # where the server does not say how many seconds, or until when
            delay = float(after) if after.isdigit() else parsedate_to_datetime(after).timestamp() - time.time()
        if final or delay > 600 or number == args.api_tries:
            raise ConnectionError(f"{args.api_base_url}, try {number} of {args.api_tries}: {problem}")
        await asyncio.sleep(delay)


def collect_verdicts(requests, file, args, options, read, ask_again):
    """Asks the endpoint: key -> (prompt, a, b, messages) becomes key -> verdict, None where it gave none.

    read: reply -> verdict or None; ask_again: the message after one that could not be read. Verdicts go to `file` when
    they come. Refusals wait for another reply: 20 in a row, or nothing else, are not about texts; they end the program.
    """
    known = {line.get("key"): line["verdict"] for line in read_jsonl(file) if "verdict" in line}
    verdicts = {key: known[key] for key in requests if key in known}
    pending = [key for key in requests if key not in verdicts]
    tokens = sum(len(json.dumps(requests[key][-1])) for key in pending) // 4
    print(f"{len(pending)} requests to send, about {tokens:,} tokens long; {len(verdicts)} verdicts are in {file}")
    if len(pending) > args.max_requests:
        fail(f"{len(pending)} requests are more than --max-requests {args.max_requests}; see --num-prompts")
    secret = os.environ.get(args.api_key_env, "").strip() or "no-key"
    if not re.fullmatch("[!-~]+", secret):
        fail(f"the key in ${args.api_key_env} holds a space, a line break or a letter that no key has")
    keys, budget, waiting = iter(pending), iter(range(args.max_requests)), []

    def write():
        lines.writelines(json.dumps(line) + "\n" for line in waiting)
        verdicts.update((line["key"], line["verdict"]) for line in waiting)
        progress.update(len(waiting))
        progress.set_postfix(unread=[*verdicts.values()].count(None), refresh=False)
        waiting.clear()

    async def work(client):
        for key in keys:
            prompt, a, b, messages = requests[key]
            for _ in range(2):  # a reply that cannot be read is asked for once more
                reply, reason = await chat(client, messages, args, options, secret, budget)
                verdict = read(reply) if reason not in ("refused", "length") else None
                if verdict or reason in ("refused", "content_filter"):
                    break
                if reply.strip():
                    messages = [*messages, dict(role="assistant", content=reply), dict(role="user", content=ask_again)]
            line = {"key": key, "verdict": verdict, "finish_reason": reason, "reply": reply.replace(secret, "***")}
            waiting.append(line | {"prompt": prompt, "a": a, "b": b})
            if reason != "refused":
                write()
            elif len(waiting) == min(20, len(requests)):
                raise ConnectionError(f"{args.api_base_url} refuses: {reply}")

    async def work_together():
        async with get_async_session() as client:
            client.event_hooks = {}  # note: HF_HUB_OFFLINE is about the hub, not about this endpoint
            client.follow_redirects = False  # nobody else gets the key
            client.headers |= {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
            await asyncio.gather(*(work(client) for _ in range(min(args.api_concurrency, 100))))
        write()

    with writing(file), open(file, "a", buffering=1) as lines, tqdm(total=len(pending), unit="verdict") as progress:
        try:
            asyncio.run(work_together())
        except ConnectionError as error:
            fail(f"{error} ({progress.n} of {len(pending)} verdicts came in; run again to go on)")
    return verdicts


def cached(path, make):
    """Rows of a JSONL file; where it is missing make() makes them, all processes together, and rank 0 writes them."""
    if not os.path.exists(path):
        try_folder(os.path.dirname(path))
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
