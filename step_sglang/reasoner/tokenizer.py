"""Builds the embedded reasoner's tokenizer: 512 tokens, any text round-trips exactly.

Numbers, words and the "\\n\\n" boundary are single tokens; whatever else a user types falls back to
bytes. The chat template opens the think block, so a reply begins with the first reasoning step.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from step_sglang.reasoner.task import BOUNDARY, BOXED, CHECK_LAST, LABELS, LOOK_BACK, THINK_END

VOCABULARY_SIZE = 512
EOS = "<|end|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
THINK_START = "<think>"
_WORDS = (BOUNDARY, BOXED, LOOK_BACK, CHECK_LAST, "ok", "no", *LABELS, *"}:;+-*=?", *"0123456789")
_PIECES = r"\n\n|\\boxed\{|[a-z]+,?|[0-9]+|[\s\S]"

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    f"{{{{- '{ASSISTANT}' + message.content + '{EOS}' }}}}"
    "{%- else %}"
    f"{{{{- '{USER}' + message.content }}}}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    f"{{{{- '{ASSISTANT}{THINK_START}' }}}}"
    "{%- endif %}"
)


def prompt_text(question: str) -> str:
    """What the chat template makes of one user message."""
    return f"{USER}{question}{ASSISTANT}{THINK_START}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, from nothing but the tables above."""
    controls = (EOS, USER, ASSISTANT, THINK_START, THINK_END)
    vocabulary = [*controls, *_WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    # the rest are numbers: no id is left without a text
    vocabulary += [str(10 + i) for i in range(VOCABULARY_SIZE - len(vocabulary))]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate(vocabulary)},
            merges=[],
            ignore_merges=True,  # a piece found in the vocabulary is one token
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in (EOS, USER, ASSISTANT)]
    )
    # not special: they stay visible in decoded text
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in (THINK_START, THINK_END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
