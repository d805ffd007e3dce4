# make frontier       set up, then run the quickstart experiment
# make test           set up, then run the tests
# make torture        kill, cancel, damage and starve real pipelines for 15 minutes
# make browser-test   install Chromium and look at the report with it
# make cluster-test   Postgres, S3, Dask and Ray: share, sweep, kill and freeze machines
# make check          format, lint and types
PYTHON ?= python3
BIN := .venv/bin

.PHONY: frontier test torture browser-test cluster-test check format clean

frontier: .venv/installed
	$(BIN)/crnn-slim frontier params/quickstart.yaml

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 4 --dist load --maxschedchunk 1 --durations 30

torture: .venv/installed
	$(BIN)/python -m tests.torture

browser-test: .venv/installed
	command -v chromium || apt-get install --yes chromium
	$(BIN)/python -m pytest tests/flows/test_page.py

cluster-test: .venv/installed
	ls /usr/lib/postgresql/*/bin/initdb || apt-get install --yes postgresql
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,dask,ray]' 'moto[server]>=5.1' psycopg2-binary
	CRNN_SLIM_CLUSTER_TEST=1 $(BIN)/python -m pytest tests/flows/test_cluster.py

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp is written last: an installation that was interrupted starts again.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
