"""Writes GSM8K as prompts: `python prepare.py FOLDER [SOURCE]` makes train.jsonl and test.jsonl.

SOURCE is a folder with train.jsonl and test.jsonl that have the columns question and answer; by default openai/gsm8k
comes from the Hugging Face hub.
"""

import json
import sys
from pathlib import Path

from datasets import load_dataset


def main(folder: Path, source: Path | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        if source is None:
            rows = load_dataset("openai/gsm8k", "main", split=split)
        else:
            rows = map(json.loads, (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines())
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                # The solution ends with a line "#### 1,234".
                answer = row["answer"].rsplit("####", 1)[1].strip().replace(",", "")
                prompt = [{"role": "user", "content": row["question"]}]
                file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
