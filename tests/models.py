"""Small random models with a real byte-level BPE tokenizer, built on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from step_sglang.scoring.scorer import Scorer, ScorerInfo, save_scorer

HIDDEN = 64
TEXT = [
    "First, add the numbers.\n\nThen we check: 12 + 30 = 42.\n\nSo the answer is right!\n\n",
    "Wait (is it?)\n\nLet x = 3;\n\nthen x * x = 9,\n\nand the sum is 51.\n\n",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<think>\n{% endif %}"
)


def build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """About 300 tokens; a dozen of them contain two newlines, so random text has many steps."""
    tokenizer = Tokenizer(models.BPE())
    # No splitting at white space, so that merges such as ".\n\n" appear, as they do in real ones.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|user|>", "<think>", "</think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    newline = TEXT + ["\n\n", ".\n\n", ")\n\n", ":\n\n", "!\n\n"] * 200
    tokenizer.train_from_iterator(newline, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def build_model(
    folder: Path,
    kind: str = "qwen3",
    seed: int = 0,
    context: int = 4096,
    layers: int = 2,
    vocab: int | None = None,
    kv_heads: int = 2,
) -> Path:
    """A random model of hidden size 64 in fp32, with its tokenizer.

    ``kind`` is qwen3, llama, phi3 or qwen3_moe.
    ``vocab`` token ids are understood (by default the tokenizer's); all are of the tokenizer that
    the model writes. As many ranks as it has ``kv_heads`` can share it, if ``vocab`` is divisible
    by 64 and by them.
    """
    tokenizer = build_tokenizer(folder)
    common = {
        "vocab_size": vocab or (len(tokenizer) + 63) // 64 * 64,
        "hidden_size": HIDDEN,
        "intermediate_size": 64 * kv_heads,
        "num_hidden_layers": layers,
        "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    config = {
        "qwen3": lambda: Qwen3Config(**common, head_dim=16),
        "llama": lambda: LlamaConfig(**common),
        "phi3": lambda: Phi3Config(**common, original_max_position_embeddings=context),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **common,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            norm_topk_prob=True,
        ),
    }[kind]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():  # spread the hidden states, so that scores differ between traces
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0 if "embed" in name or "lm_head" in name else 3.0)
        if vocab is not None:
            model.lm_head.weight[len(tokenizer) :] = 0
    model.save_pretrained(folder)
    return folder


def build_adapter(folder: Path, base: Path, merged: Path, seed: int = 1) -> Path:
    """A random LoRA adapter of the query and value projections, in peft's format.

    Args:
        folder: where the adapter goes.
        base: the model that it adapts.
        merged: where the base model with the adapter merged into its weights goes.
    """
    rank, alpha = 4, 8
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if not name.endswith(("q_proj", "v_proj")):
                continue
            rows, columns = module.weight.shape
            a = torch.randn(rank, columns, generator=generator) / columns**0.5
            b = torch.randn(rows, rank, generator=generator)
            module.weight += alpha / rank * b @ a
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
    model.save_pretrained(merged)
    build_tokenizer(merged)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def build_eagle_draft(folder: Path, target: Path) -> Path:
    """One random layer that guesses from a Llama's hidden states: nearly always wrong.

    Args:
        folder: where it goes.
        target: the model that it drafts for.
    """
    config = json.loads((target / "config.json").read_text())
    torch.manual_seed(1)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    inner = config["intermediate_size"]
    shapes = {
        "fc.weight": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj.weight": (hidden, hidden),
        "layers.0.self_attn.k_proj.weight": (kv, hidden),
        "layers.0.self_attn.v_proj.weight": (kv, hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, hidden),
        "layers.0.mlp.gate_proj.weight": (inner, hidden),
        "layers.0.mlp.up_proj.weight": (inner, hidden),
        "layers.0.mlp.down_proj.weight": (hidden, inner),
    }
    folder.mkdir()
    weights = {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    weights["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    save_file(weights, folder / "model.safetensors")
    config.update(architectures=["LlamaForCausalLMEagle"], num_hidden_layers=1)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build_scorer(
    path: Path, hidden: int = HIDDEN, seed: int = 0, delimiters: tuple[str, ...] = ("\n\n",)
) -> Path:
    """A random scorer in our format."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    w1, w2 = draw(512, hidden) / hidden**0.5, draw(512) / 512**0.5 * 3
    scorer = Scorer(w1, draw(512) * 0.1, w2, draw(1) * 0.1, ScorerInfo("random", delimiters))
    save_scorer(scorer, path)
    return path
