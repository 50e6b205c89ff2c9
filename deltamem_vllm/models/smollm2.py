# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""SmolLM2-135M-Instruct: from the 4-bit GGUF its package carries to a bfloat16 checkpoint.

vLLM reads safetensors, and eviction is judged on dense weights, so the quantised file is expanded once.
The result is checked before it may enter the cache: a transformers release that converts differently
must fail here and not as strange text from a server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deltamem_vllm.models.errors import ModelError, SourceMissing
from deltamem_vllm.models.store import Report

# GGUF stores the norm's epsilon as float32 and leaves the tokenizer's length limit out.
_RMS_NORM_EPS = 1e-5
# What transformers asks for, in its own words only after seconds of importing, when it meets a GGUF file.
_NEEDED = ("torch", "transformers", "accelerate", "gguf")
_END_OF_TURN = "<|im_end|>"
# Accents, CJK, an emoji, runs of blanks and digits: each goes through another tokenizer rule.
_SAMPLE = "Größe: 日本語 \U0001f600\n\ttabs  and   blanks, 12345 don't"


def convert_smollm2(source: Path, folder: Path, report: Report) -> None:
    """Write config, generation config, tokenizer and bfloat16 weights of `source` into `folder`."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise SourceMissing(
            f"converting SmolLM2 needs {', '.join(missing)}; install it: pip install {' '.join(missing)}"
        )
    report("loading transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with _no_progress_bars():
        report("expanding the 4-bit weights to bfloat16")
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        report("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(**where)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.config.rms_norm_eps = _RMS_NORM_EPS
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        report("writing the checkpoint")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    report("checking the result")
    check_checkpoint(folder)


def check_checkpoint(folder: Path) -> None:
    """Raise `ModelError` unless the written checkpoint chats and stops as SmolLM2-Instruct does."""
    from safetensors import safe_open
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    generation = GenerationConfig.from_pretrained(str(folder))
    end_of_turn = tokenizer.convert_tokens_to_ids(_END_OF_TURN)
    chat: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": _SAMPLE}], add_generation_prompt=True, tokenize=False
    )
    with safe_open(str(folder / "model.safetensors"), framework="pt") as weights:
        dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    problems = [
        what
        for what, good in {
            "text does not survive the tokenizer": tokenizer.decode(tokenizer(_SAMPLE).input_ids) == _SAMPLE,
            f"generation does not end at {_END_OF_TURN}": generation.eos_token_id == end_of_turn,
            "the chat template does not open the assistant's turn": chat.endswith(
                f"{_SAMPLE}{_END_OF_TURN}\n<|im_start|>assistant\n"
            ),
            "turn markers are not single tokens": tokenizer(chat).input_ids.count(end_of_turn) == 2,
            f"weights are {sorted(dtypes)}, not bfloat16": dtypes == {"BF16"},
        }.items()
        if not good
    ]
    if problems:
        raise ModelError(
            f"the converted SmolLM2 is wrong: {'; '.join(problems)}. The installed transformers converts it "
            "in another way than the locked one: pip install --no-deps -r requirements/cpu.txt"
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' bars for steps that take no time; the one of the expansion stays."""
    from transformers.utils import logging as hf_logging

    was_on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()
