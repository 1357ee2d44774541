"""One question, several voices, at the same time: the base and some of its adapters, streamed side by side.

make serve                      # in another terminal
python examples/two_voices.py "Tell me about the baker." pirate-lora poet-dora
"""

import asyncio
import sys

from openai import AsyncOpenAI

client = AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")


async def ask(adapter: str | None, question: str) -> tuple[str, str]:
    stream = await client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": question}],
        max_tokens=60,
        temperature=0,
        stream=True,
        extra_body={"adapter": adapter},
    )
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    return adapter or "base", "".join(parts)


async def main(question: str, adapters: list[str]) -> None:
    for name, text in await asyncio.gather(*(ask(adapter, question) for adapter in [None, *adapters])):
        sys.stdout.write(f"{name:>14}: {text}\n")


if __name__ == "__main__":
    words = sys.argv[1:] or ["Tell me about the baker.", "pirate-lora", "poet-dora", "robot-ia3"]
    asyncio.run(main(words[0], words[1:]))
