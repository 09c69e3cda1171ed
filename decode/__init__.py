"""Commands that decode: `python -m decode.run`, `python -m decode.eval`."""
