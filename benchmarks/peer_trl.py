"""TRL's preparation of a data set, timed: runs in TRL's own virtual environment.

`python -m benchmarks.peer_trl ROWS.parquet TOKENIZER_DIR ROW_LENGTH NUM_PROCESSES` has SFTTrainer
tokenise and pack rows in its conversational form {prompt: [turn], completion: [turn]}, and prints
one JSON line. What it does before that (the trainer, a model of a few numbers) is not timed.
"""

import json
import sys
import tempfile
import time
from typing import Any

import datasets
import transformers
from trl import SFTConfig, SFTTrainer

# Gemma's template, for turns that alternate; the same tokens as jaxsft.data.chat.
TEMPLATE = """\
{{ bos_token }}{% for turn in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}\
{{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else 'user') + '\\n' }}\
{{ turn['content'] + '<end_of_turn>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '\\n<start_of_turn>model\\n' }}{% endif %}"""
NUM_SHOWN = 16  # samples whose ids are returned, to be compared


class _TimedTrainer(SFTTrainer):  # type: ignore[misc]
    prepare_s = 0.0

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        dataset = super()._prepare_dataset(*args, **kwargs)
        self.prepare_s = time.perf_counter() - start
        return dataset


def main(rows_file: str, tokenizer_dir: str, row_length: int, num_processes: int) -> dict[str, Any]:
    """Prepares the rows; seconds, packed rows, tokens in them, and the first samples' ids."""
    tokenizer = transformers.GemmaTokenizerFast.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = transformers.Gemma3TextConfig(vocab_size=len(tokenizer), **sizes, **heads)
    with tempfile.TemporaryDirectory() as scratch:
        # A cache of its own: what an earlier run prepared must not be found.
        found = datasets.load_dataset(
            "parquet", data_files=rows_file, split="train", cache_dir=scratch
        )
        trainer = _TimedTrainer(
            model=transformers.Gemma3ForCausalLM(config),
            args=SFTConfig(
                output_dir=scratch,
                max_length=row_length,
                packing=True,
                packing_strategy="bfd",
                dataset_num_proc=num_processes,
                use_cpu=True,
                bf16=False,
                report_to=[],
            ),
            train_dataset=found,
            processing_class=tokenizer,
        )
        packed = trainer.train_dataset
        shown = [
            tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
            for row in found.select(range(min(NUM_SHOWN, len(found))))
        ]
        return {
            "prepare_s": trainer.prepare_s,
            "rows": len(packed),
            "num_tokens": sum(sum(lengths) for lengths in packed["seq_lengths"]),
            "samples": sum(len(lengths) for lengths in packed["seq_lengths"]),
            "first_ids": shown,
        }


if __name__ == "__main__":
    rows_file_, tokenizer_dir_, *numbers = sys.argv[1:]
    print(json.dumps(main(rows_file_, tokenizer_dir_, *map(int, numbers))))
