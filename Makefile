# make demo    the whole experiment on the embedded base and data, offline, in minutes
# make test    all tests that run without a GPU
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TINY := --preset tiny

.PHONY: demo test faults coverage mutation lint bench notebook simulate clean

demo: $(VENV)/ready
	$(RUN) verify_dpo_setup.py $(TINY)
	$(RUN) train_dpo.py $(TINY)
	$(RUN) evaluate_dpo.py $(TINY)

test: $(VENV)/ready
	$(RUN) -m pip install -q -r requirements-test.txt
	$(RUN) -m pytest -m "not gpu"

# Kills, full disks, mutated files: half an hour to an hour. As root the disks are real ones (tmpfs).
faults: $(VENV)/ready
	$(RUN) -m pip install -q -r requirements-test.txt
	$(RUN) -m pytest -s tests/faults

# Share of the package's lines that the tests run, commands that they start included.
coverage: $(VENV)/ready
	$(RUN) -m pip install -q -r requirements-test.txt
	$(RUN) -m pytest -m "not gpu" --cov=quantpref --cov-report=term

# Do the tests notice a changed statistic, verdict, reader or score? Survivors: mutmut results.
mutation: $(VENV)/ready
	$(RUN) -m pip install -q -r requirements-test.txt
	$(VENV)/bin/mutmut run --max-children 2

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
	rm -rf $(VENV) mutants .mypy_cache .ruff_cache .pytest_cache .hypothesis
