"""``transformers serve`` on a saved model, asked over HTTP by OpenAI's client."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from torchao.quantization import quantize_

import grinqh_ao
from models import tiny_model, tiny_tokenizer

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")


@contextlib.contextmanager
def serving(directory):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", directory, "--device", "cpu", "--trust-remote-code"]
    log = directory.parent / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=output,
            stderr=output,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            time.sleep(0.5)
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def test_serves_what_generate_gives(tmp_path):
    words = " ".join(f"w{i}" for i in range(300))
    tokenizer = tiny_tokenizer(words)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    model = tiny_model("llama", tied=True)
    quantize_(model, grinqh_ao.GrinqhConfig(bits=3))
    directory = tmp_path / "tiny-q"
    grinqh_ao.save(model, directory, tokenizer)
    inputs = tokenizer("w1 w2 w3", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(output[0, 3:], skip_special_tokens=True)
    with serving(directory) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        answer = client.chat.completions.create(
            model=str(directory),
            messages=[{"role": "user", "content": "w1 w2 w3"}],
            max_tokens=5,
            temperature=0,
        )
    assert answer.choices[0].message.content.strip() == expected.strip()
    assert answer.usage.completion_tokens == 5
