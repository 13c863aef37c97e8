"""`remax chat`: talk to a checkpoint in the terminal."""

from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from remax import data, models
from remax.config import ChatConfig, ModelOptions
from remax.errors import UserError
from remax.loading import load_policy
from remax.processes import make_accelerator
from remax.untrusted import printable, shown

HELP = "Type a message and Enter; /new starts a new conversation, an empty line or Ctrl-D ends."


def chat(model: str, args: ChatConfig) -> None:
    """Reads messages from standard input and streams the model's answers until the input ends.

    A model with a chat template has a conversation; one without continues each text on its own.

    Raises:
        UserError: the model cannot be loaded.
    """
    models.check_model_exists(model, flag="--model")
    tokenizer = models.load_tokenizer(model, flag="--model")
    data.check_tokenizer(tokenizer, flag="--model")
    accelerator = make_accelerator(args.bf16)
    options = ModelOptions(dtype=args.dtype, attn_implementation=args.attn_implementation)
    policy = load_policy(model, options).to(accelerator.device)
    eos_token_ids = list(data.eos_token_ids(policy.generation_config, tokenizer))
    limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    if args.system_prompt and not tokenizer.chat_template:
        raise UserError(
            f"--system_prompt is set, but {shown(model)} has no chat template: it continues texts and would never see "
            "it; leave it out."
        )
    policy.generation_config = GenerationConfig()  # the flags alone decide, not what the checkpoint recommends
    torch.manual_seed(args.seed)
    beginning = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    messages: list[dict[str, str]] = list(beginning)
    print(HELP if tokenizer.chat_template else f"{HELP} This model has no chat template: it continues your text.")
    while text := _read():
        if text == "/new":
            messages = list(beginning)
            continue
        if tokenizer.chat_template:
            messages.append({"role": "user", "content": text})
            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
            while limit and len(messages) > len(beginning) + 1 and _too_long(inputs, args, limit):
                del messages[len(beginning)]  # the oldest message makes room
                inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        else:
            inputs = tokenizer(text, return_tensors="pt")
        with accelerator.autocast():
            answer = _answer(policy, tokenizer, inputs.to(accelerator.device), args, eos_token_ids)
        messages.append({"role": "assistant", "content": answer})


def _read() -> str:
    try:
        # Half a character, which no tokenizer takes, becomes a question mark.
        return input("> ").strip().encode(errors="replace").decode()
    except EOFError:
        print()
        return ""
    except UnicodeDecodeError:
        raise UserError("what was typed is not UTF-8: it cannot be read; set the terminal to UTF-8.") from None


def _too_long(inputs: Any, args: ChatConfig, limit: int) -> bool:
    return bool(inputs["input_ids"].shape[1] + args.max_completion_length > limit)


class _PrintableStreamer(TextStreamer):  # type: ignore[misc]
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


@torch.no_grad()
def _answer(policy: Any, tokenizer: Any, inputs: Any, args: ChatConfig, eos_token_ids: list[int]) -> str:
    generated = policy.generate(
        **{name: inputs[name] for name in ("input_ids", "attention_mask")},
        streamer=_PrintableStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        do_sample=True,
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=eos_token_ids,
    )
    answer: str = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer
