"""Data: from files and hub datasets to prompts and preference pairs, and from token ids back to text.

loading reads records, records checks them, prompts turns them into token ids, text decodes completions. Every mistake
in the data is found here, before a model is loaded, and told with the row it is in.
"""

from remax.data.loading import load_records
from remax.data.prompts import prepare_prompts
from remax.data.records import check_columns, load_preferences
from remax.data.references import check_references, has_references, load_references
from remax.data.text import check_tokenizer, decode_completions, eos_token_ids

__all__ = [
    "check_columns",
    "check_references",
    "check_tokenizer",
    "decode_completions",
    "eos_token_ids",
    "has_references",
    "load_preferences",
    "load_records",
    "load_references",
    "prepare_prompts",
]
