"""lm-evaluation-harness on our decoders: the model (`model.py`) and tasks from local files (`task.py`)."""
