"""What others take for the same decodes: PEFT's mixed batch, and transformers' continuous batching without adapters.

Owns how they are run, on a model of their own, of the same weights and the same quantization. A decode's time is that
of a longer generation less that of a shorter one, so that prompts and starting are in neither. Knows nothing of the
engine.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch

from server.model.quantize import Quantization, quantization_config

_SHORT = 2  # tokens
_NUM_TIMES = 2
_PAGE = 256  # tokens


def peers(
    scratch: Path,
    quantize: str,
    device: torch.device,
    batch: int,
    num_prompt_tokens: int,
    num_steps: int,
    *,
    is_spent: Callable[[], bool],
) -> Iterator[dict[str, Any]]:
    """A row for each, with "failed" in the place of figures where it does not run on this machine, and only "skipped"
    for what time has run out for."""
    ways: dict[str, Callable[[Any], Callable[[int], object]]] = {
        "transformers continuous batching": lambda model: _continuous(model, batch, num_prompt_tokens),
        "PEFT adapter_names": lambda model: _peft(model, scratch / "adapters", batch, num_prompt_tokens),
    }
    for name, way in ways.items():
        if is_spent():
            yield {"skipped": name}
            continue
        row = {"part": name, "batch": batch, "adapters": "distinct LoRA" if "PEFT" in name else "none"}
        try:
            step_s = _step_s(way(_model(scratch / "model", quantize, device)), num_steps)
        except Exception as error:  # what others' code raises here must not cost the rest of the run
            yield {**row, "failed": f"{type(error).__name__}: {error}"}
            continue
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        yield {**row, "ms_per_step": 1000 * step_s, "tokens_per_s": batch / step_s}


def _model(folder: Path, quantize: str, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    config = quantization_config(Quantization(quantize), torch.bfloat16)
    extra = {} if config is None else {"quantization_config": config}
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": str(device)}, attn_implementation="sdpa", **extra
    )
    return model.eval()


def _step_s(generate: Callable[[int], object], num_steps: int) -> float:
    """`generate` makes so many tokens of each sequence. Raises RuntimeError where noise is more than the difference."""
    generate(_SHORT)  # warms up
    times: dict[int, float] = {}
    for num_tokens in (_SHORT, _SHORT + num_steps) * _NUM_TIMES:
        begun_s = time.perf_counter()
        generate(num_tokens)
        took_s = time.perf_counter() - begun_s
        times[num_tokens] = min(took_s, times.get(num_tokens, took_s))
    step_s = (times[_SHORT + num_steps] - times[_SHORT]) / num_steps
    if step_s <= 0:
        raise RuntimeError("a longer generation took no longer than a shorter one; measure with more --steps")
    return step_s


def _prompts(model: Any, batch: int, num_prompt_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(8, model.config.vocab_size, (batch, num_prompt_tokens), generator=generator)


def _peft(model: Any, adapters: Path, batch: int, num_prompt_tokens: int) -> Callable[[int], object]:
    """Each sequence with an adapter of its own."""
    from peft import PeftModel

    names = [f"lora-{i:03d}" for i in range(batch)]
    mixed: Any = PeftModel.from_pretrained(model, str(adapters / names[0]), adapter_name=names[0])
    for name in names[1:]:
        mixed.load_adapter(str(adapters / name), adapter_name=name)
    mixed.eval()
    prompts = _prompts(model, batch, num_prompt_tokens).to(model.device)

    @torch.inference_mode()
    def generate(num_tokens: int) -> object:
        limits = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
        return mixed.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), adapter_names=names, **limits)

    return generate


def _continuous(model: Any, batch: int, num_prompt_tokens: int) -> Callable[[int], object]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompts = _prompts(model, batch, num_prompt_tokens).tolist()
    known = {field.name for field in fields(cast(Any, ContinuousBatchingConfig))}

    def generate(num_tokens: int) -> object:
        num_pages = batch * (-(-(num_prompt_tokens + num_tokens) // _PAGE) + 1)
        # By itself it takes most of the machine's memory, and on a CPU is killed for it.
        page_size = "page_size" if "page_size" in known else "block_size"  # its name in transformers 5.17
        sizes = {page_size: _PAGE, "num_blocks": num_pages + 1, "max_batch_tokens": batch * num_prompt_tokens}
        cache = cast(Any, ContinuousBatchingConfig)(**sizes)
        limits: dict[str, Any] = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": -1}
        config = cast(Any, GenerationConfig)(**limits, pad_token_id=1)
        found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=cache)
        made = [len(output.generated_tokens) for output in found.values()]
        if made != [num_tokens] * batch:
            raise RuntimeError(f"{batch} sequences of {num_tokens} tokens were asked for; these came: {made}")
        return found

    return generate
