# The two commands of the README: `make demo` and `make test`. Both set up what they need in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed-train
	$(BIN)/python train.py --config configs/examples/pola_vit_digits.yaml --output output/demo
	$(BIN)/python eval.py --checkpoint output/demo/best.pt --output output/demo/eval
	@echo "learning curve: output/demo/curve.png"

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package with one of its extras, of which dev holds all.
$(VENV)/installed-%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
