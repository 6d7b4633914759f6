"""`refopt finetune`: a model of transformers on your own text, with 4-bit weights and adapters (transformers, peft)."""
