# make demo    the whole experiment on the embedded base and data, offline, in minutes
# make test    all tests that run without a GPU
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TINY := --preset tiny

.PHONY: demo test lint bench notebook simulate clean

demo: $(VENV)/ready
	$(RUN) verify_dpo_setup.py $(TINY)
	$(RUN) train_dpo.py $(TINY)
	$(RUN) evaluate_dpo.py $(TINY)

test: $(VENV)/ready
	$(RUN) -m pip install -q -r requirements-test.txt
	$(RUN) -m pytest -m "not gpu"

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/ready
	$(RUN) benchmarks/shared_prefix_cpu.py

# The executed notebook as a page in outputs/tiny; the committed one stays without outputs. Stored widget state
# would make the page fetch widget code from the network.
notebook: $(VENV)/ready
	$(VENV)/bin/jupyter nbconvert --to html --execute --ExecutePreprocessor.store_widget_state=False \
		--output-dir outputs/tiny dpo_comparison.ipynb

# The whole analysis on simulated arms: does the verdict keep its promises? Exit status 1 where it does not.
simulate: $(VENV)/ready
	$(RUN) benchmarks/simulate_verdict.py

$(VENV)/ready: requirements-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements-cpu.txt
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
