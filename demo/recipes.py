"""Every technique's recipe on the demo base: config, learning rate, number of steps, and what its training needs else.

Owns the table METHODS, which is data, and the few hooks that it names. The loop and the examples are in `training.py`;
`examples/train.py` and `train_adapters.py` only choose a line of the table. Module names are those of Llama.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RoadConfig,
    TaskType,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

from demo.training import RAW_SHARE, Batches, OnStep, fit, halve
from examples.bottleneck import BottleneckConfig, save_bottleneck, train_bottleneck
from examples.delta_lora import DeltaLoraConfig, save_delta_lora, train_delta_lora
from examples.loreft import Loreft, LoreftConfig, save_loreft

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEARS = [*ATTENTION, *MLP]
BASE_NAME = "demo/base"  # what a config says that its base is: true on every machine
WEIGHTS_FILE = "adapter_model.safetensors"
ASSISTANT = "<|assistant|>"

Saver = Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class Run:
    """One training, as far as a config may depend on it."""

    tokenizer: Any
    num_steps: int

    def ids(self, *tokens: str) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(token) for token in tokens]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one technique is trained. `train` gives back what saves the result to a folder."""

    config: Callable[[Run], Any]
    peak_lr: float
    num_steps: int
    train: Callable[[Any, Batches, "Recipe", Run, OnStep], Saver]
    optimizer: Callable[[Any, "Recipe"], torch.optim.Optimizer] | None = None  # AdamW, if none is named
    nf4: bool = False  # trained on the base in NF4
    raw_share: float = RAW_SHARE  # of examples without a chat template
    batch_tokens: int = 1024
    seed: int = 11


# --- how PEFT's techniques are trained and saved


def train_with_peft(base: Any, batches: Batches, recipe: Recipe, run: Run, on_step: OnStep) -> Saver:
    torch.manual_seed(recipe.seed)
    model: Any = get_peft_model(base, recipe.config(run))
    optimizer = (recipe.optimizer or adamw)(model, recipe)
    # AdaLoRA moves its budget of ranks between the layers after each step.
    reallocate = getattr(model.base_model, "update_and_allocate", None)

    def after(step: int, loss: float) -> None:
        if reallocate is not None:
            reallocate(step)
        on_step(step, loss)

    fit(model, optimizer, batches, run.num_steps, after)
    return lambda folder: save_peft(model, folder)


def save_peft(model: Any, folder: Path) -> None:
    """PEFT's own two files in float16, with a base path that is true on every machine."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.create_or_update_model_card = lambda _: None
    model.save_pretrained(str(folder), save_embedding_layers=False)
    halve(folder / WEIGHTS_FILE)


def adamw(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=recipe.peak_lr, weight_decay=0.0, betas=(0.9, 0.98))


def lora_plus(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """B learns 16 times as fast as A (Hayou et al. 2024)."""
    chosen: torch.optim.Optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=recipe.peak_lr, loraplus_lr_ratio=16, weight_decay=0.0, betas=(0.9, 0.98)
    )
    return chosen


def lora_fa(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """A stays as it was drawn (Zhang et al. 2023): adapters of one seed and one shape have it in common."""
    config = model.peft_config["default"]
    return create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=recipe.peak_lr)


# --- techniques that PEFT lacks


def train_with_loreft(base: Any, batches: Batches, recipe: Recipe, run: Run, on_step: OnStep) -> Saver:
    torch.manual_seed(recipe.seed)
    loreft = Loreft(base, recipe.config(run))
    fit(loreft, adamw(loreft, recipe), batches, run.num_steps, on_step)

    def save(folder: Path) -> None:
        save_loreft(loreft, folder, BASE_NAME)
        halve(folder / WEIGHTS_FILE)

    return save


def train_with_delta_lora(base: Any, batches: Batches, recipe: Recipe, run: Run, on_step: OnStep) -> Saver:
    """Its own loop moves the weights of the base beside A and B; on the way there is no autocast and no schedule."""
    return _train_by(train_delta_lora, save_delta_lora, base, batches, recipe, run, on_step)


def train_with_bottleneck(base: Any, batches: Batches, recipe: Recipe, run: Run, on_step: OnStep) -> Saver:
    return _train_by(train_bottleneck, save_bottleneck, base, batches, recipe, run, on_step)


def _train_by(
    train: Callable[..., None],
    save: Callable[..., None],
    base: Any,
    batches: Batches,
    recipe: Recipe,
    run: Run,
    on_step: OnStep,
) -> Saver:
    """By a loop of the technique's own, and saved by its own hand."""
    config = replace(recipe.config(run), learning_rate=recipe.peak_lr, seed=recipe.seed)
    given = ({"input_ids": ids, "labels": labels} for ids, labels in islice(batches, run.num_steps))
    train(base, given, config, lambda num_done, loss: on_step(num_done - 1, loss))

    def saver(folder: Path) -> None:
        base.config.name_or_path = BASE_NAME
        save(base, config, folder)
        halve(folder / WEIGHTS_FILE)

    return saver


# --- the table


def _peft(kind: type[PeftConfig], **fields: Any) -> Callable[[Run], PeftConfig]:
    """A config, made anew for each training: PEFT writes into it. Fields that are functions are asked with the run."""

    def make(run: Run) -> PeftConfig:
        known = {name: value(run) if callable(value) else value for name, value in fields.items()}
        return kind(task_type=TaskType.CAUSAL_LM, **known)

    return make


def _lora(r: int, targets: list[str], **fields: Any) -> Callable[[Run], PeftConfig]:
    return _peft(LoraConfig, **{"r": r, "lora_alpha": 2 * r, "target_modules": targets} | fields)


SMALL = ["v_proj", "o_proj", "up_proj", "down_proj"]  # enough for a small voice

METHODS: Mapping[str, Recipe] = {
    "lora": Recipe(_lora(8, ["v_proj", "down_proj"]), 4e-3, 90, train_with_peft, batch_tokens=2048),
    "rslora": Recipe(
        _lora(16, ["v_proj", "o_proj"], lora_alpha=16, use_rslora=True),
        2e-3,
        90,
        train_with_peft,
        batch_tokens=2048,
    ),
    "lora+": Recipe(_lora(2, SMALL), 1e-3, 100, train_with_peft, lora_plus),
    "lora-fa": Recipe(_lora(4, ["v_proj", "o_proj", "down_proj"]), 2e-2, 160, train_with_peft, lora_fa),
    "vera": Recipe(
        _peft(VeraConfig, r=64, target_modules=LINEARS, save_projection=True, projection_prng_key=5),
        3e-2,
        90,
        train_with_peft,
        batch_tokens=2048,
    ),
    "dora": Recipe(
        _lora(4, ["v_proj", "o_proj"], lora_alpha=8, use_dora=True), 4e-3, 90, train_with_peft, batch_tokens=2048
    ),
    "qlora": Recipe(_lora(2, SMALL), 5e-3, 100, train_with_peft, nf4=True),
    "qdora": Recipe(_lora(2, SMALL, use_dora=True), 5e-3, 100, train_with_peft, nf4=True),
    "adalora": Recipe(
        _peft(
            AdaLoraConfig,
            target_modules=SMALL,
            init_r=3,
            target_r=2,
            lora_alpha=8,
            total_step=lambda run: run.num_steps,
            tinit=lambda run: run.num_steps // 6,
            tfinal=lambda run: run.num_steps // 2,
            deltaT=2,
        ),
        1e-2,
        140,
        train_with_peft,
    ),
    "loha": Recipe(_peft(LoHaConfig, r=3, alpha=6, target_modules=["v_proj", "down_proj"]), 1e-2, 120, train_with_peft),
    "lokr": Recipe(
        _peft(LoKrConfig, r=4, alpha=8, target_modules=LINEARS, decompose_factor=16), 1e-2, 120, train_with_peft
    ),
    "oft": Recipe(_peft(OFTConfig, oft_block_size=8, target_modules=LINEARS), 1e-2, 120, train_with_peft),
    "road": Recipe(
        _peft(RoadConfig, variant="road_1", group_size=32, target_modules=LINEARS), 2e-2, 140, train_with_peft
    ),
    "ia3": Recipe(
        _peft(IA3Config, target_modules=["k_proj", "v_proj", "o_proj", *MLP], feedforward_modules=["down_proj"]),
        3e-2,
        130,
        train_with_peft,
        batch_tokens=2048,
    ),
    "bitfit": Recipe(_peft(BeftConfig, target_modules=LINEARS), 5e-2, 360, train_with_peft),
    "ln-tuning": Recipe(
        _peft(LNTuningConfig, target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
        5e-2,
        180,
        train_with_peft,
    ),
    "trainable-tokens": Recipe(
        _peft(TrainableTokensConfig, target_modules=["embed_tokens"], token_indices=lambda run: run.ids(".", "!")),
        3e-2,
        90,
        train_with_peft,
    ),
    "prompt-tuning": Recipe(_peft(PromptTuningConfig, num_virtual_tokens=16), 5e-2, 200, train_with_peft),
    "p-tuning": Recipe(
        _peft(PromptEncoderConfig, num_virtual_tokens=16, encoder_hidden_size=256), 1e-2, 150, train_with_peft
    ),
    "prefix-tuning": Recipe(_peft(PrefixTuningConfig, num_virtual_tokens=16), 5e-2, 120, train_with_peft),
    "alora": Recipe(
        _lora(2, SMALL, alora_invocation_tokens=lambda run: run.ids(ASSISTANT)),
        5e-3,
        70,
        train_with_peft,
        raw_share=0.0,
    ),
    "delta-lora": Recipe(
        lambda _: DeltaLoraConfig(tuple(SMALL), r=2, lora_alpha=4),
        1e-2,
        70,
        train_with_delta_lora,
    ),
    "bottleneck": Recipe(
        lambda _: BottleneckConfig(mh_adapter=False, reduction_factor=32), 5e-3, 120, train_with_bottleneck
    ),
    "loreft": Recipe(lambda _: LoreftConfig(r=8, layers=(0, 1, 2, 3), positions=None), 1e-2, 160, train_with_loreft),
}
