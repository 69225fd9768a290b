"""What `train.py` and `eval.py` are built of: settings, data, checkpoints, logs, evaluation, processes."""
