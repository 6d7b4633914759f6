"""The main job: a small transformer trained on real text, once an optimizer, same weights, same batches."""
