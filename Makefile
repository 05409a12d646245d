# For a newcomer: `make quickstart`, `make scenes`, `make reals`, `make docs` and `make test`. All make .venv first.
.PHONY: quickstart scenes reals docs test check clean
PYTHON ?= python3

# looks at photographs through psvae-tiny; ARGS=--train trains a small model instead, in minutes
quickstart: .venv/examples
	.venv/bin/python examples/quickstart.py $(if $(DATA),--data $(DATA)) $(ARGS)

# a tokenizer, text-to-image and editing from nothing, and their scores: 21 minutes on two cores
scenes: .venv/examples
	.venv/bin/python examples/train_scenes.py $(ARGS)

# a plain VAE and a ReaLS one on drawn scenes, compared: 24 minutes on two cores
reals: .venv/examples
	.venv/bin/python examples/compare_reals.py $(ARGS)

# the site, and its notebook run: open outputs/docs/index.html
docs: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/sphinx-build -E -n -W --keep-going -q -c docs . outputs/docs

test: .venv/installed
	.venv/bin/pytest -n 2

# lint, format and types
check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

# what the examples need; what tests, types and the site need too
.venv/examples: EXTRA = train
.venv/installed: EXTRA = dev
.venv/examples .venv/installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --upgrade pip
	.venv/bin/python -m pip install -e '.[$(EXTRA)]'
	touch $@

clean:
	rm -rf .venv outputs
