# `make quickstart` and `make test` need Python 3.11 or newer and a package registry, nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: everything quickstart test processors lint types wheel clean

# uv resolves and downloads in parallel; everything else goes through the same registry settings as pip.
.venv/.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraints constraints.txt --group dev --editable .
	touch $@

# Every further format, in the same environment.
FORMATS := openvino,executorch,litert,ncnn,coreml,tensorrt-rtx
everything: .venv/.done
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraints constraints.txt --editable ".[$(FORMATS)]"

quickstart: .venv/.done
	$(BIN)/edgekit distill recipes/mobilenet.toml
	$(BIN)/edgekit export --int8
	@# Exit code 3 with the verdict `inconclusive` is an honest answer of a small test split, not a failure of the line.
	@$(BIN)/edgekit verify --attack pgd20; code=$$?; \
	verdict=$$($(BIN)/python -m json.tool runs/latest/verdicts/$$(ls runs/latest/verdicts | sort -n | tail -n 1)/verdict.json \
		| sed -n 's/^    "verdict": "\(.*\)",$$/\1/p'); \
	if [ $$code = 3 ] && [ "$$verdict" = inconclusive ]; then \
		echo "quickstart: every command ran. Inconclusive means that these test images cannot tell a harmless change"; \
		echo "from one beyond the tolerance; more images, or a wider --tolerance, can."; \
		exit 0; \
	fi; exit $$code

test: .venv/.done
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Other processors for `verify --on`, emulated: into the cache folder, from Debian's, Python's and npm's packages.
processors: .venv/.done
	$(BIN)/python -m edgekit.processors $(NAMES)

lint: .venv/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.done
	$(BIN)/pyright

wheel: .venv/.done
	$(BIN)/python -m build --wheel --installer uv

clean:
	rm -rf .venv .venv-peers dist runs
