"""Uploads a folder that PEFT has saved, asks the new adapter, and removes it again.

make serve                      # in another terminal
python examples/upload.py my-adapter path/to/folder "Once upon a time"
"""

import sys
from pathlib import Path

import httpx


def main(name: str, folder: Path, prompt: str) -> None:
    with httpx.Client(base_url="http://127.0.0.1:8000", timeout=60) as client:
        with (
            (folder / "adapter_config.json").open("rb") as config,
            (folder / "adapter_model.safetensors").open("rb") as weights,
        ):
            files = {"config": config, "weights": weights}
            answer = client.post("/v1/adapters", params={"replace": "true"}, data={"name": name}, files=files)
        sys.stdout.write(f"{answer.status_code} {answer.text}\n")
        answer.raise_for_status()
        body = {"adapter": name, "prompt": prompt, "max_tokens": 40, "temperature": 0}
        text = client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]
        sys.stdout.write(f"{prompt}{text}\n")
        client.delete(f"/v1/adapters/{name}").raise_for_status()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
